"""The bigram model against values computed by hand."""

import math

import torch

from pipeline.model.bigram import BigramLanguageModel, bits_per_byte


def test_uniform_before_any_count() -> None:
    assert math.isclose(BigramLanguageModel(8).loss(torch.randint(8, (4, 9))), math.log(8), rel_tol=1e-6)


def test_counts_are_the_maximum_of_the_likelihood() -> None:
    rows = torch.tensor([[0, 1, 0, 1, 0, 2]])  # after 0: 1, 1, 2; after 1: 0, 0
    model = BigramLanguageModel(3)
    model.fit(rows, alpha=0.0)
    by_hand = -(2 * math.log(2 / 3) + math.log(1 / 3) + 2 * math.log(1)) / 5
    assert math.isclose(model.loss(rows), by_hand, rel_tol=1e-6)


def test_gradient_descent_finds_the_same_table() -> None:
    rows = torch.tensor([[0, 1, 0, 1, 0, 2, 2, 1, 0, 0]])
    counted, learned = BigramLanguageModel(3), BigramLanguageModel(3)
    counted.fit(rows, alpha=1e-6)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.3)
    for _ in range(500):
        loss = torch.nn.functional.cross_entropy(learned(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(loss.item() - counted.loss(rows)) < 1e-3


def test_bits_per_byte() -> None:
    # one token a byte, uniform over 256: eight bits
    assert math.isclose(bits_per_byte(math.log(256), tokens=100, text_bytes=100), 8.0)
    assert math.isclose(bits_per_byte(math.log(256), tokens=50, text_bytes=100), 4.0)
