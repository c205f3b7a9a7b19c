"""The formula against PyTorch's own counter on the stock model, and a peak that a product does reach."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.model.flops import flops_per_token, matmul_peak


def test_formula_counts_what_torch_counts() -> None:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=160,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model, ids = Qwen3ForCausalLM(config), torch.randint(0, 300, (4, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == flops_per_token(config, 32) * ids.numel()


def test_peak_is_reached_and_draws_no_global_random_numbers() -> None:
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = matmul_peak("cpu", torch.float32)
    assert time.perf_counter() - started < 5  # a quarter of a second on a machine that is free
    assert torch.equal(state, torch.get_rng_state())
    a = torch.randn(256, 256)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    assert peak > 0.2 * 2 * 256**3 / min(seconds)
