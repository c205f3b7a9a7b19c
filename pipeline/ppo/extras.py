"""What PPO can do beside its core: average the policy, mix in pretraining text, renew the reference."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.text.packing import document_end
from pipeline.text.tokenizer import encode


class Average:
    """An exponential moving average of a model's trained weights: avg ← d·avg + (1 − d)·weights.

    With LoRA the trained weights are the adapter's two factors, and each is averaged by itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter, 1 - self.decay)

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from the values of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextlib.contextmanager
    @torch.no_grad()
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average while this context lasts, and its own weights after it."""
        named = {name: p for name, p in model.named_parameters() if name in self.values}
        own = {name: p.detach().clone() for name, p in named.items()}
        try:
            for name, parameter in named.items():
                parameter.copy_(self.values[name])
            yield
        finally:
            for name, parameter in named.items():
                parameter.copy_(own[name])


class PretrainingText:
    """Texts as token ids, each after a document's end as in pretraining, cut at `max_length` tokens.

    `rows` are texts, or rows with a column `text`. Raises UserError for none, or another column.
    """

    def __init__(self, rows: Sequence[Any], tokenizer: Any, max_length: int) -> None:
        if rows is None or len(rows) == 0:
            raise UserError("ptx_coef is set but ptx_dataset is missing or has no rows; give it pretraining text")
        if not isinstance(rows[0], str) and "text" not in rows[0]:
            raise UserError(f"ptx_dataset has no column 'text' but {', '.join(map(repr, rows[0]))}; rename the column")
        texts = [row if isinstance(row, str) else row["text"] for row in rows]
        begin = document_end(tokenizer)
        self.ids = [[begin, *ids[:max_length]] for ids in encode(tokenizer, texts, add_special_tokens=False) if ids]
        if not self.ids:
            raise UserError("ptx_dataset has nothing but empty texts; give it pretraining text")

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """ids (count, t) long padded on the right, and predicting places (count, t) bool, of texts drawn at random."""
        rows = [self.ids[i] for i in torch.randint(len(self.ids), (count,), generator=generator).tolist()]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, torch.arange(width, device=device) < lengths[:, None] - 1


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`, a model of the same shape."""
    for theirs, ours in zip(target.parameters(), source.parameters(), strict=True):
        theirs.copy_(ours)
