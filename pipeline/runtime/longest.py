"""The longest rows first, so that a run without enough memory ends in its first minute, and says what to lower.

Before training begins, one micro-batch of the longest rows there are goes through forward and backward pass, beside
AdamW's moments and memory of the size of what else the optimizer will take. The moments stay, all zero;
nothing else does: no gradient, no random number, no figure.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import Trainer

from pipeline.errors import UserError
from pipeline.model.memory import is_out_of_memory, make_moments, stand_ins
from pipeline.runtime.arguments import TrainingFields
from pipeline.runtime.console import processes
from pipeline.runtime.record import Stage

Through = Callable[[Callable[[], torch.Tensor]], Any]
"""What makes a backward pass of a forward pass that gives a loss."""


def backward(forward: Callable[[], torch.Tensor]) -> None:
    """Forward and backward pass."""
    forward().backward()


def lengths_of(rows: Any) -> np.ndarray | None:
    """Tokens (N,) of each row: of its longest column of ids. None for a stream, whose rows nobody has seen yet."""
    names = [name for name in getattr(rows, "column_names", None) or [] if name.endswith("ids")]
    if not names:
        return None
    table = rows.with_format("arrow")[:]
    return np.max([pc.list_value_length(table[name]).to_numpy() for name in names], axis=0)


def longest_rows(rows: Any, count: int) -> list[dict[str, Any]]:
    """The `count` rows with the most tokens; of a stream, or of fewer rows, those there are, again and again."""
    lengths = lengths_of(rows)
    if lengths is None:
        return [next(iter(rows))] * count
    order = np.argsort(-lengths, kind="stable")
    return [rows[int(order[i % len(order)])] for i in range(count)]


def rehearse(trainer: Trainer, sums: Sequence[str]) -> None:
    """One micro-batch of the longest training rows, forward and backward, unless most rows are as long: then the first
    step is no smaller.

    `sums` are attributes in which the trainer adds figures up. Not under FSDP or DeepSpeed, whose models are sharded
    only when training begins.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    optimizer = trainer.create_optimizer()
    make_moments(optimizer)
    lengths = lengths_of(trainer.train_dataset)
    if lengths is None or np.median(lengths) == lengths.max():
        return
    # DistributedDataParallel sums gradients in buckets, which are another copy of them
    reserved = stand_ins(optimizer, copies=int(processes() > 1))
    pass_over(trainer, longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size), sums)
    del reserved


def pass_over(trainer: Any, rows: list[dict[str, Any]], sums: Sequence[str], through: Through = backward) -> Any:
    """Forward and backward pass of a micro-batch, without a trace; returns what `through`, which makes them, does."""
    model, args = trainer.model, trainer.args
    if args.gradient_checkpointing:  # as the Trainer does, but later
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    with _no_trace(trainer, sums):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        inputs.pop("row", None)  # the model knows no such argument

        def forward() -> torch.Tensor:
            with trainer.accelerator.autocast():
                return trainer.compute_loss(model, dict(inputs))

        return through(forward)


@contextlib.contextmanager
def _no_trace(trainer: Any, sums: Sequence[str]) -> Iterator[None]:
    model, training = trainer.model, trainer.model.training
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in sums if hasattr(trainer, name)}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        for name, value in before.items():
            setattr(trainer, name, value)


# ---- when memory is full --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_told(stage: Stage, trainer: Any) -> Iterator[None]:
    """Turn an error that says that memory is full into a UserError which says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        begun = trainer.state.global_step if trainer.state else 0
        raise UserError(_sentence(stage, begun)) from error


def _sentence(stage: Stage, steps: int) -> str:
    args: Any = stage.args
    recompute = "" if args.gradient_checkpointing else "set gradient_checkpointing to True"
    if steps or stage.resume_from:  # then the batch of a step may not change any more
        return (
            f"{stage.name}: out of memory after step {steps}; {recompute or 'make room in memory'} and give the same "
            "command again: it goes on from its last checkpoint"
        )
    found = [way for way in (smaller(args), f"lower {longest_setting(args)}", recompute) if way]
    return (
        f"{stage.name}: out of memory before the first step, with micro-batches of {args.per_device_train_batch_size} "
        f"rows: {', or '.join(found)}; nothing was trained or lost, and `--dry_run` says what fits"
    )


def smaller(args: TrainingFields) -> str:
    """How to halve a micro-batch, or nearly, without changing the batch of a step; empty where it is one row."""
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows == 1:
        return ""
    less = max(d for d in range(1, rows // 2 + 1) if rows % d == 0)
    return (
        f"lower per_device_train_batch_size from {rows} to {less} with gradient_accumulation_steps "
        f"{times * rows // less}, which makes the same steps"
    )


def longest_setting(args: Any) -> str:
    """The setting that limits the length of rows, with its value."""
    name = next(name for name in ("max_length", "block_size") if hasattr(args, name))
    return f"{name} ({getattr(args, name)})"
