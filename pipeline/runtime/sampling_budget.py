"""`--dry_run` of sampling: of the stages preferences and evaluate, and of what PPO samples."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.model.load import parameter_count
from pipeline.model.memory import Line, available, peak_of
from pipeline.model.sampler import generate
from pipeline.runtime.budget import (
    GAPS,
    HEADROOM,
    Machine,
    Memory,
    clock,
    config_of,
    fits_in,
    fixed_parts,
    forward_flops,
    peak_so_far,
    print_memory,
)
from pipeline.runtime.record import Stage

SEEN_TOKENS = 16
"""Tokens of an answer that sampling is watched for; the cache of the others is counted."""


def cache_bytes(model: Any, slots: int) -> float:
    """Keys and values of `slots` tokens in fp32 (model/decoder.py keeps them so on a CPU); 0 where a configuration
    names no shape."""
    config = config_of(model)
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 8.0 * config.num_hidden_layers * heads * size * slots
    except AttributeError:
        return 0.0


def sampling_lines(
    model: Any, prompts: list[list[int]], max_new_tokens: int, generate: Callable[..., Any]
) -> tuple[Line, Line]:
    """The cache of `generate`, and all that it takes beside the weights, by answers at a time.

    Seen with two and four of the first prompts (one alone is sampled in another way) and a few tokens; the cache of the
    tokens that follow is counted.
    """
    few = min(max_new_tokens, SEEN_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": few, "temperature": 1.0, "eos_token_id": [-1], "pad_token_id": 0}

    def taken_by(count: int) -> int:
        chosen = [prompts[i % len(prompts)] for i in range(count)]
        generator = torch.Generator().manual_seed(0)
        return peak_of(lambda: generate(chosen, generator=generator, **options), model.device)

    line = Line.through((2, taken_by(2)), (4, taken_by(4)))
    cache = cache_bytes(model, len(prompts[0]) + max_new_tokens)
    return Line(row=cache), Line(line.fixed, line.row + cache_bytes(model, max_new_tokens - few))


def of_sampling(
    stage: Stage, models: Sequence[nn.Module], prompts: list[list[int]], answers: int, ask: Callable[[int], int]
) -> None:
    """Print what it takes to sample `answers` answers of the first of `models` and have them judged by the others.

    prompts  token ids, in any order
    ask      samples and judges the answers to so many prompts at once, and returns their tokens
    """
    args: Any = stage.args
    machine = Machine.of(stage, stage.device)
    stage.say("dry run: nothing is kept and nothing is written")
    ids = sorted(prompts, key=len, reverse=True)
    fixed = fixed_parts(*models)
    with stage.dtype_autocast():
        cache, taken = sampling_lines(
            models[0], ids, args.max_new_tokens, partial(generate, cast(PreTrainedModel, models[0]))
        )
    memory = Memory(
        rows=min(args.batch_size, answers),
        fixed=fixed,
        kept=cache,
        passing=Line(max(cache.fixed, taken.fixed), max(cache.row, taken.row)),
        logits=(1, config_of(models[0]).vocab_size),
        gaps=0.0 if stage.device.type == "cuda" else GAPS,
        names=("cache", "what sampling takes besides"),
    )
    seconds, tokens, asked = asked_for_a_minute(ask, memory, available(stage.device))
    if asked == memory.rows:
        memory.seen = peak_so_far()
    row = float(np.mean([len(each) for each in ids])) + tokens
    flops = answers * row * forward_flops(models[0], round(row), head=True)
    stage.say(
        f"{', '.join(f'{parameter_count(model):,}' for model in models)} parameters in {len(models)} models; "
        f"{answers:,} answers, about {answers * row:,.0f} tokens with their prompts, {flops:.2g} FLOPs to sample them"
    )
    stage.say(
        f"about {clock(answers * seconds)} to sample and judge them: {asked} at a time took {asked * seconds:.2g} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )
    if machine.processes > 1:
        stage.say("one process does all the work, whatever their number")
    print_memory(
        memory, memory.rows, f"answers of up to {len(ids[0]) + args.max_new_tokens:,} tokens, prompts included,"
    )
    stage.say(largest_batch(memory, machine, answers))


def asked_for_a_minute(ask: Callable[[int], int], memory: Memory, limit: float) -> tuple[float, float, int]:
    """Seconds and tokens of an answer, and how many were asked for at once: a whole batch, or what a minute allows."""
    start = time.perf_counter()
    ask(2)  # sets up, and is an upper bound
    seconds = (time.perf_counter() - start) / 2
    fit = [n for n in range(1, memory.rows + 1) if memory.peak(n, False) <= limit and n * seconds <= 60]
    asked = max(fit, default=1)
    start = time.perf_counter()
    tokens = ask(asked)
    return (time.perf_counter() - start) / asked, tokens / asked, asked


def largest_batch(memory: Memory, machine: Machine, answers: int) -> str:
    """A sentence: whether the present batch_size fits, and the largest power of two that does."""
    sizes = [2**n for n in range(answers.bit_length())]
    fit = [size for size in sizes if memory.peak(size, False) <= HEADROOM * machine.limit]
    best = f"the largest power of two that leaves a tenth free is {max(fit)}" if fit else "not even one answer fits"
    peak = memory.peak(memory.rows, False)
    return f"batch_size {memory.rows} {fits_in(peak, machine.limit)} in {machine.told}; {best}"
