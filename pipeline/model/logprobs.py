"""Log-probabilities of given tokens from hidden states, without the logits of all places at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time, wherever a loss or log-probabilities are taken: 64 MB in fp32."""


def logprobs_from_hidden(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature)[targets], and the entropy of that distribution where asked for.

    `hidden` (N, D), `targets` (N,) long → (N,) float32 each, both with their gradients. About `chunk_elements`
    logits exist at a time: of several chunks each one is computed again in the backward pass.
    """

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs = F.log_softmax(head(h).float() / temperature, dim=-1)
        spread = -(logprobs.exp() * logprobs).sum(-1) if entropy else None
        return logprobs.gather(-1, y[:, None]).squeeze(-1), spread

    rows = max(1, chunk_elements // vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, h, y, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, y)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None
