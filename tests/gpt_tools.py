"""Small GPTs beside their stock twins, for the tests of the GPT."""

import torch
from transformers import Qwen3Config

PAD, VOCABULARY = 0, 96
TOLERANCE = 1e-4  # largest difference over the largest value


def small_config(**changes) -> Qwen3Config:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # large enough that attention is far from uniform
        "num_labels": 1,
    }
    return Qwen3Config(**settings | changes)


def pair(ours_class: type, stock_class: type, **changes):
    """The two classes with the same random weights, norms included."""
    torch.manual_seed(0)
    ours = ours_class(small_config(**changes))
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    stock = stock_class(small_config(**changes))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def assert_close(ours: torch.Tensor, stock: torch.Tensor, what: str = "") -> None:
    difference = (ours - stock).abs().max() / stock.abs().max().clamp(min=1e-12)
    assert difference < TOLERANCE, f"{what}: {difference:.2e}"


def assert_same_gradients(ours, stock) -> None:
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], name)


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Token ids (B, T) and what a collator adds, with labels where there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (3, 20), generator=generator)
    if kind == "packed":
        lengths = [[7, 5, 8], [20], [1, 19]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 6, 13)):
        if kind == "right":
            mask[row, 20 - pads :] = 0
        elif kind == "left":
            mask[row, :pads] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    first = torch.cat((torch.ones(3, 1, dtype=torch.bool), mask[:, :-1] == 0), 1)  # nothing real to predict it from
    labels = ids.masked_fill((mask == 0) | first, -100)
    return {"input_ids": ids, "attention_mask": None if kind == "full" else mask, "labels": labels}
