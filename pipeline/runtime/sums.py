"""Figures over held-out rows as sums over all processes, so that they do not depend on how rows fall into batches."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainingArguments


def shares(rows: Any, args: TrainingArguments) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """This process's batches of `rows`, and whether each counts.

    All processes get equally many, as sharded models need; where the rows have run out, it is a row that is computed
    and not counted.
    """
    size = args.per_device_eval_batch_size
    for start in range(0, len(rows), size * args.world_size):
        first = start + args.process_index * size
        mine = [rows[i] for i in range(first, min(first + size, len(rows)))]
        yield mine or [rows[0]], bool(mine)


def total(accelerator: Accelerator, sums: torch.Tensor) -> list[float]:
    """Sums (N,) of this process, added up over all of them."""
    return accelerator.reduce(sums).tolist()
