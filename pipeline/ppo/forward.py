"""The forward passes of PPO, as modules that DistributedDataParallel can wrap.

All read right-padded rows, and look only at the places that predict a response token, laid end to end, so nothing of
shape batch × length × vocabulary ever exists, but for a model that does more than its head says.
"""

import contextlib
import inspect
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import UserError
from pipeline.model.load import states_at, trunk_of
from pipeline.model.logprobs import logprobs_from_hidden
from pipeline.model.lora import without_wrapper

AGREES = 1e-3
"""Nats a token by which head(hidden states) may differ from the model's own logits: fp32 makes 1e-5."""
AGREES_HALF = 0.05
"""The same for weights in 16 bits."""


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that two forward passes with equal weights agree in any mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()


class Recomputed:
    """The blocks of a model whose activations are computed again in the backward pass, if `on`, instead of kept.

    transformers does so only in training mode, in which some architectures have dropout that cannot be taken out; so
    just the blocks are put into it, for just the forward pass, and what is inside them stays in eval mode.
    """

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
        if on and not self.blocks:
            raise UserError(f"gradient_checkpointing: {type(model).__name__} has no blocks that can be computed again")
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def __enter__(self) -> None:
        self._set(torch.is_grad_enabled())

    def __exit__(self, *error: object) -> None:
        self._set(False)

    def _set(self, training: bool) -> None:
        for block in self.blocks:
            block.training = training


class TokenLogprobs(nn.Module):
    """log π(response token | what came before) of a causal language model, at the sampling temperature.

    π is the model's own: `follow` compares the plain way, its head on the last hidden states, with what its own forward
    pass gives. Some architectures take a step after their head (Gemma 2, Cohere, Granite, Falcon-H1, …); `own_logits`
    then takes the logits from the model itself, for all places from the first predicting one on at once.
    """

    def __init__(self, model: nn.Module, temperature: float, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        disable_dropout(model)
        self.model, self.temperature = model, temperature
        self.recomputed = Recomputed(model, gradient_checkpointing)
        self.own_logits = False

    def forward(
        self, ids: Tensor, predicts: Tensor, entropy: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`ids` (b, t) long, `predicts` (b, t) bool as `response_positions` gives it → (N,) float32, row by row."""
        return self.logprobs(self.states(ids, predicts)[1], ids, predicts, entropy, temperature)

    def without_adapter(self) -> contextlib.AbstractContextManager:
        """What a reference's forward passes run in: nothing to switch off here."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def follow(self, ids: Tensor, predicts: Tensor) -> float:
        """Take the model's own logits from now on if the plain way gives others on this batch.

        Returns by how many nats a token the two differ, on average.
        """
        found = []
        with self.without_adapter(), torch.autocast(ids.device.type, enabled=False):
            for self.own_logits in (False, True):
                if head_of(self.model) is None and not self.own_logits:
                    found.append(torch.full((), float("inf"), device=ids.device))
                else:
                    found.append(self(ids, predicts)[0])
        gap = (found[0] - found[1]).abs().mean().item()
        dtype = next(without_wrapper(self.model).parameters()).dtype
        self.own_logits = not gap <= (AGREES if dtype == torch.float32 else AGREES_HALF)
        return gap

    def states(self, ids: Tensor, predicts: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states (N, D) at the predicting places, and what logits are made of: the same, or with
        `own_logits` the model's logits (N, V)."""
        with self.recomputed:
            if self.own_logits:
                return states_and_logits(self.model, ids, predicts)
            hidden = states_at(self.model, ids, predicts)
            return hidden, hidden

    def logprobs(
        self, given: Tensor, ids: Tensor, predicts: Tensor, entropy: bool, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` returns, from the second part of `states`."""
        temperature = self.temperature if temperature is None else temperature
        targets = ids[:, 1:][predicts[:, :-1]]
        if self.own_logits:
            return logprobs_from_hidden(given, targets, lambda logits: logits, given.shape[1], temperature, entropy)
        head = head_of(self.model)
        return logprobs_from_hidden(given, targets, head, head.weight.shape[0], temperature, entropy)


def head_of(model: nn.Module) -> Any:
    """The head that makes logits of hidden states; None where the model names none with a matrix."""
    head = without_wrapper(model).get_output_embeddings()
    return head if hasattr(head, "weight") else None


def states_and_logits(model: nn.Module, ids: Tensor, predicts: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states (N, D) and logits (N, V) of a model's own forward pass at `predicts` (b, t) bool."""
    whole: Any = without_wrapper(model)
    kept: dict[str, Tensor] = {}
    options: dict[str, Any] = {"use_cache": False}
    first = int(predicts.any(0).nonzero()[0]) if predicts.any() else 0
    if "logits_to_keep" in inspect.signature(whole.forward).parameters:
        options["logits_to_keep"] = ids.shape[1] - first
    else:
        first = 0
    hook = trunk_of(model).register_forward_hook(lambda _, inputs, out: kept.update(hidden=out.last_hidden_state))
    try:
        logits = whole(input_ids=ids, **options).logits
    finally:
        hook.remove()
    return kept["hidden"][predicts], logits[predicts[:, first:]]


class AdapterOff:
    """A LoRA model as it is without its adapter; everything but `generate` is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.with_adapter = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.with_adapter, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        adapted: Any = self.with_adapter
        with adapted.disable_adapter():
            return adapted.generate(*args, **kwargs)


class ReferenceLogprobs(TokenLogprobs):
    """TokenLogprobs of a LoRA policy with its adapter switched off: a reference that takes no memory of its own."""

    def __init__(self, policy: nn.Module, temperature: float) -> None:
        super().__init__(cast(nn.Module, AdapterOff(policy)), temperature)

    def without_adapter(self) -> contextlib.AbstractContextManager:
        """The policy as it was; once around all forward passes, since threads share the switch."""
        adapted: Any = self.model
        return adapted.disable_adapter()


class TokenValues(nn.Module):
    """V(s_t) for every response token: the scalar head `score` of a sequence classifier, before the token is read."""

    def __init__(self, model: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        head = getattr(without_wrapper(model), "score", None)
        head = getattr(head, "original_module", head)  # peft keeps the trained head beside the one it was
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError("the critic must be a sequence classifier with one label and a linear head named `score`")
        disable_dropout(model)
        self.model = model
        self.recomputed = Recomputed(model, gradient_checkpointing)

    def forward(self, ids: Tensor, predicts: Tensor) -> Tensor:
        """`ids` (b, t) long, `predicts` (b, t) bool → (N,) float32 in the order of TokenLogprobs."""
        with self.recomputed:
            hidden = states_at(self.model, ids, predicts)
        return read_values(hidden, cast(nn.Module, without_wrapper(self.model).score))


def read_values(hidden: Tensor, head: nn.Module) -> Tensor:
    """V (N,) of hidden states (N, D) in fp32: the head is one row, and bf16 would round returns near 1 to 0.008."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float()).squeeze(-1)


def value_head(policy: nn.Module) -> nn.Linear:
    """A head for `TokenLogprobsAndValues`, N(0, 1/(D+1)) without bias (arXiv 2403.17031)."""
    embedding = without_wrapper(policy).get_input_embeddings().weight
    known = head_of(policy)
    width = without_wrapper(policy).config.get_text_config().hidden_size if known is None else known.weight.shape[1]
    head = nn.Linear(width, 1, bias=False, device=embedding.device)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    return head


class TokenLogprobsAndValues(TokenLogprobs):
    """Policy and critic on one trunk: log-probabilities as TokenLogprobs, and V(s_t) by a head on the same states."""

    def __init__(self, model: nn.Module, head: nn.Linear, temperature: float, gradient_checkpointing: bool) -> None:
        super().__init__(model, temperature, gradient_checkpointing)
        self.head = head

    def forward(  # type: ignore[override]  # a third output is what this class is for
        self,
        ids: Tensor,
        predicts: Tensor,
        entropy: bool = False,
        temperature: float | None = None,
        trunk_learns: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As TokenLogprobs, and the values (N,); without `trunk_learns` the values' gradient ends at the head."""
        hidden, given = self.states(ids, predicts)
        values = read_values(hidden if trunk_learns else hidden.detach(), self.head)
        return *self.logprobs(given, ids, predicts, entropy, temperature), values
