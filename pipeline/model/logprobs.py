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
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature)[targets], and the entropy of that distribution where asked for.

    `hidden` (N, D), `targets` (N,) long → (N,) float32 each, both with their gradients. About CHUNK_ELEMENTS
    logits exist at a time: of several chunks each one is computed again in the backward pass.
    """

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(h).float()
        if temperature != 1:  # a pass over all logits
            logits = logits / temperature
        logprobs = -F.cross_entropy(logits, y, reduction="none")
        if not entropy:
            return logprobs, None
        everything = logits.log_softmax(-1)
        return logprobs, -(everything.exp() * everything).sum(-1)

    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, h, y, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, y)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None
