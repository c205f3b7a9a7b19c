"""Muon on the matrices inside the blocks, AdamW on everything else.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) takes the momentum of a weight matrix and replaces its
singular values by ones, so that rare directions move as far as common ones. In pretraining, copying from
the prompt came sooner with it (LOG.md). Embeddings, norms and heads are no maps between hidden states: AdamW has them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW behind one optimizer, so that Trainer, scheduler and resume see one.

    Groups with `use_muon` go to Muon, the others to AdamW; both halves share these group dictionaries, so a learning
    rate that a scheduler sets is theirs.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        groups = list(params)
        super().__init__(groups, {"lr": 1e-3})
        self.halves = [
            half(chosen)
            for half, chosen in (
                (_muon, [g for g in self.param_groups if g["use_muon"]]),
                (_adamw, [g for g in self.param_groups if not g["use_muon"]]),
            )
            if chosen
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        """Let each half use our group dictionaries and our state, whoever set them last."""
        for half in self.halves:
            own = isinstance(half, torch.optim.Muon)
            mine = [g for g in self.param_groups if g["use_muon"] == own]
            for group, defaults in zip(mine, half.param_groups, strict=True):
                for key, value in defaults.items():
                    group.setdefault(key, value)
            half.param_groups, half.state = mine, self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:
        """One step of both halves."""
        loss = closure() if closure is not None else None
        for half in self.halves:
            half.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and hand the new groups and state to the halves."""
        super().load_state_dict(state_dict)
        self._share_groups()


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Muon([dict(g) for g in groups], momentum=0.95, nesterov=True)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([dict(g) for g in groups], fused=True)


def parameter_groups(
    model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float, adam_beta2: float
) -> list[dict[str, Any]]:
    """Groups for MuonWithAdamW: hidden matrices to Muon; embeddings, heads and norms to AdamW without decay."""
    hidden, tables, vectors = [], [], []
    tables_and_heads = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    ends = {id(p) for module in tables_and_heads if module is not None for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) in ends:
            tables.append(parameter)
        else:
            (hidden if parameter.ndim == 2 else vectors).append(parameter)
    betas = (0.9, adam_beta2)
    return [
        {"params": hidden, "use_muon": True, "lr": muon_learning_rate, "weight_decay": weight_decay},
        {"params": tables, "use_muon": False, "lr": learning_rate, "weight_decay": 0.0, "betas": betas},
        {"params": vectors, "use_muon": False, "lr": learning_rate, "weight_decay": 0.0, "betas": betas},
    ]


class MuonFactory:
    """What the Trainer takes as `optimizer_cls_and_kwargs`: called with the model, it builds the optimizer."""

    def __call__(self, model: nn.Module, **kwargs: float) -> MuonWithAdamW:
        """Keyword arguments are those of parameter_groups."""
        bare = getattr(model, "module", model)
        return MuonWithAdamW(parameter_groups(bare, **kwargs))
