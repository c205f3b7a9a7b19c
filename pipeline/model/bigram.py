"""The bigram model: the next token depends on the last one alone. The course starts here, and pretraining must beat it.

It is the smallest language model that can be trained: a V×V table of logits. Its best table needs no gradient descent:
the maximum of the likelihood are the counts (with add-α smoothing, so that an unseen pair is not impossible).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BigramLanguageModel(nn.Module):
    """p(next | last) = softmax(table[last])."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)  # before any count: uniform, log V nats a token

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) → logits of the next token (B, T, V)."""
        return self.table(input_ids)

    @torch.no_grad()
    def fit(self, input_ids: Tensor, alpha: float = 0.05) -> None:
        """Set the table to log(count + α) over all neighbours in the rows of `input_ids` (N, T)."""
        vocab_size = self.table.num_embeddings
        pairs = input_ids[:, :-1] * vocab_size + input_ids[:, 1:]
        counts = torch.bincount(pairs.flatten(), minlength=vocab_size**2).view(vocab_size, vocab_size)
        self.table.weight.copy_((counts + alpha).log())

    @torch.no_grad()
    def loss(self, input_ids: Tensor, batch_size: int = 64) -> float:
        """Mean nats a predicted token over the rows of `input_ids` (N, T)."""
        total = 0.0
        for rows in input_ids.split(batch_size):
            logits = self(rows[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        return total / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Loss in bits per byte of the text, which compares models whatever their tokenizers."""
    return nats_per_token / math.log(2) * tokens / text_bytes
