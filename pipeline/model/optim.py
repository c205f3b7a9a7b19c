"""Muon on the matrices inside the blocks, AdamW on everything else.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) takes the momentum of a weight matrix and replaces its
singular values by ones, so that rare directions move as far as common ones. In pretraining, copying from
the prompt came sooner with it (LOG.md). Embeddings, norms and heads are no maps between hidden states: AdamW has them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW behind one optimizer, so that Trainer, scheduler and resume see one.

    Groups with `use_muon` go to Muon, the others to AdamW; both halves share these group dictionaries, so a learning
    rate that a scheduler sets is theirs.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 1e-3})
        muon, adamw = ([dict(g) for g in self.param_groups if g["use_muon"] == chosen] for chosen in (True, False))
        self.halves: list[torch.optim.Optimizer] = []
        if muon:
            self.halves.append(torch.optim.Muon(muon, momentum=0.95, nesterov=True))
        if adamw:
            self.halves.append(torch.optim.AdamW(adamw, fused=True))
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
    def step(self, closure: Any = None) -> Any:
        """One step of both halves."""
        loss = closure() if closure is not None else None
        for half in self.halves:
            half.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and hand the new groups and state to the halves."""
        super().load_state_dict(state_dict)
        self._share_groups()


def parameter_groups(
    model: PreTrainedModel, muon_learning_rate: float, learning_rate: float, weight_decay: float, adam_beta2: float
) -> list[dict[str, Any]]:
    """Groups for MuonWithAdamW: hidden matrices to Muon; embeddings, heads and norms to AdamW without decay."""
    tables_and_heads = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    ends = {p for module in tables_and_heads if module is not None for p in module.parameters()}
    inside = [p for p in model.parameters() if p not in ends]
    hidden, vectors = ([p for p in inside if (p.ndim == 2) == matrices] for matrices in (True, False))
    tables = [p for p in model.parameters() if p in ends]
    adamw = {"use_muon": False, "lr": learning_rate, "weight_decay": 0.0, "betas": (0.9, adam_beta2)}
    return [
        {"params": hidden, "use_muon": True, "lr": muon_learning_rate, "weight_decay": weight_decay},
        {"params": tables, **adamw},
        {"params": vectors, **adamw},
    ]


class MuonFactory:
    """What the Trainer takes as `optimizer_cls_and_kwargs`: called with the model, it builds the optimizer."""

    def __call__(self, model: Any, **kwargs: float) -> MuonWithAdamW:
        """Keyword arguments are those of parameter_groups."""
        return MuonWithAdamW(parameter_groups(getattr(model, "module", model), **kwargs))
