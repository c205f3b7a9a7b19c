"""`--dry_run` of the stages that train with transformers' Trainer."""

import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from pipeline.errors import UserError
from pipeline.model.load import parameter_count
from pipeline.model.memory import (
    Line,
    Passed,
    available,
    gradient_bytes,
    is_out_of_memory,
    make_moments,
    measured,
    moment_bytes,
    trained_count,
)
from pipeline.runtime.budget import (
    GAPS,
    HEADROOM,
    STEPS,
    Machine,
    Memory,
    clock,
    config_of,
    fitting,
    fixed_parts,
    peak_so_far,
    print_memory,
    proposal,
    shared,
    training_flops,
)
from pipeline.runtime.hf_trainer import SUMS
from pipeline.runtime.longest import lengths_of, longest_rows, pass_over
from pipeline.runtime.record import Stage


def of_trainer(stage: Stage, trainer: Trainer, head: bool = True) -> None:
    """Print what training with `trainer` takes. `head`: a position costs the product with the vocabulary."""
    args, machine, model = trainer.args, Machine.of(stage, trainer.args.device), cast(nn.Module, trainer.model)
    rows_of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rows_of_step % machine.processes:
        raise UserError(
            f"processes: the {rows_of_step} rows of a step cannot be shared evenly among {machine.processes}; choose a "
            "number that divides them"
        )
    stage.say("dry run: nothing is kept and nothing is written")
    memory = counted(trainer, head)
    per_row, longest = row_lengths(trainer)
    timed = run_steps(trainer, memory, available(args.device))
    count_what_is_proposed(trainer, memory, machine, rows_of_step // machine.processes)
    tokens = per_row * rows_of_step * args.max_steps
    flops = tokens * training_flops(model, longest, head)
    said = [
        f"{parameter_count(model):,} parameters, {trained_count(model):,} of them trained; "
        f"{args.max_steps:,} steps of {rows_of_step} rows, {tokens:,.0f} tokens, {flops:.2g} FLOPs",
        *timed.sentences(args.max_steps, evaluations_of(trainer), machine.processes),
    ]
    if machine.processes > 1:
        memory.buckets = float(gradient_bytes(model))
        said.append(shared(machine.processes))
    for sentence in said:
        stage.say(sentence)
    print_memory(memory, rows_of_step // machine.processes, f"rows of up to {longest:,} tokens")
    stage.say(proposal(memory, machine, rows_of_step))


def counted(trainer: Any, head: bool) -> Memory:
    """Memory by part, from the parameters and from passes over the longest row and the two longest."""
    model, args = trainer.model, trainer.args
    optimizer, fixed = trainer.create_optimizer(), fixed_parts(model)
    fixed |= {"gradients": float(gradient_bytes(model)), "optimizer": float(moment_bytes(optimizer))}
    first, second = (passed(trainer, rows) for rows in (1, 2))
    tokens, vocab_size = row_lengths(trainer)[1], config_of(model).vocab_size
    return Memory(
        rows=args.per_device_train_batch_size,
        fixed=fixed,
        kept=Line.through((1, first.kept), (2, second.kept)),
        passing=Line.through((1, first.peak), (2, second.peak)),
        logits=(tokens, vocab_size) if head else (0, 0),
        accumulates=args.gradient_accumulation_steps > 1,
        gaps=0.0 if args.device.type == "cuda" else GAPS,
    )


def count_what_is_proposed(trainer: Any, memory: Memory, machine: Machine, share: int) -> None:
    """Count a larger micro-batch that `memory` would propose in a pass of its own, where this machine has room for it.

    The longest rows of many are not all as long as those of few, and in SFT they have fewer places that are scored.
    """
    tried = {memory.rows}
    while memory.seen is not None and (best := fitting(memory, machine.limit, share) or 0) > memory.rows:
        if best in tried or memory.peak(best, best < share) > HEADROOM * available(trainer.args.device):
            return
        found = passed(trainer, best)
        memory.kept = Line.through((memory.rows, memory.kept(memory.rows)), (best, found.kept))
        memory.passing = Line.through((memory.rows, memory.passing(memory.rows)), (best, found.peak))
        tried.add(best)


def passed(trainer: Any, rows: int) -> Passed:
    """What forward and backward pass of the longest rows take."""
    through = lambda forward: measured(forward, trainer.model)  # noqa: E731
    return pass_over(trainer, longest_rows(trainer.train_dataset, rows), SUMS, through)


def row_lengths(trainer: Trainer) -> tuple[float, int]:
    """Tokens of a row, padding apart: the mean, both sides of a pair together, and the longest."""
    rows: Any = trainer.train_dataset
    lengths = lengths_of(rows)
    if lengths is None:
        count = len(next(iter(rows))["input_ids"])
        return count, count
    names = [name for name in rows.column_names if name.endswith("ids")]
    return float(sum(np.mean([len(ids) for ids in rows[name]]) for name in names)), int(lengths.max())


def evaluations_of(trainer: Trainer) -> int:
    """Passes over the held-out rows in a run, the one after training included."""
    args = trainer.args
    return int(args.eval_on_start) + int(args.max_steps // (args.eval_steps or args.max_steps)) + 1


@dataclass
class Timed:
    """Seconds: of the steps that were taken, or of one row where they do not fit; of an evaluation."""

    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    step_from_a_row: float = 0.0
    evaluation: float = 0.0
    why: str = ""

    def sentences(self, count: int, evaluations: int, processes: int) -> list[str]:
        """The whole time, and what it is made of."""
        step = (float(np.mean(self.steps)) if self.steps else self.step_from_a_row) / processes
        evaluation = self.evaluation / processes
        seconds = count * step + evaluations * evaluation + max(0.0, self.first - step)
        how = f"the mean of {len(self.steps)} that were taken" if self.steps else self.why
        more = f", {evaluations} evaluations of {evaluation:.2g} s" if self.evaluation else ""
        return [f"about {clock(seconds)}: {count:,} steps of {step:.2g} s ({how}){more}; checkpoints come on top"]


def run_steps(trainer: Any, memory: Memory, limit: float) -> Timed:
    """Steps and a share of an evaluation, where they fit `limit`; notes the peak in `memory`."""
    if memory.peak(memory.rows, True) <= limit:
        try:
            return taken(trainer, memory)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    rows = longest_rows(trainer.train_dataset, 1)
    start = time.perf_counter()
    pass_over(trainer, rows, SUMS)
    seconds = time.perf_counter() - start
    times = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return Timed(step_from_a_row=seconds * times, why="a step does not fit this machine: from one row, times the rows")


def taken(trainer: Any, memory: Memory) -> Timed:
    """As a run begins: the longest rows, then steps, then a share of an evaluation."""
    args, steps = trainer.args, StepClock()
    make_moments(trainer.create_optimizer())
    if memory.rows > 2:
        longest = passed(trainer, memory.rows)
        memory.kept = Line.through((1, memory.kept(1)), (memory.rows, longest.kept))
        memory.passing = Line.through((1, memory.passing(1)), (memory.rows, longest.peak))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    kept = args.eval_on_start, args.eval_strategy
    args.eval_on_start, args.eval_strategy, args.save_strategy, args.logging_strategy = False, "no", "no", "no"
    trainer.train()
    args.eval_on_start, args.eval_strategy = kept
    first, *others = steps.seconds
    held_out = trainer.eval_dataset
    share = min(len(held_out), 2 * args.per_device_eval_batch_size)
    trainer.eval_dataset = held_out.select(range(share))
    start = time.perf_counter()
    trainer.evaluate()
    evaluation = (time.perf_counter() - start) * len(held_out) / share
    trainer.eval_dataset = held_out
    memory.seen = peak_so_far()
    return Timed(first, others, evaluation=evaluation)


class StepClock(TrainerCallback):
    """Times STEPS + 1 steps, then ends the training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        control.should_training_stop = control.should_training_stop or len(self.seconds) > STEPS
