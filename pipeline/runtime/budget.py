"""`--dry_run`: what a stage will take, said before it is spent; nothing is written.

Weights, gradients and moments are counted from the parameters, activations and logits in forward passes of the longest
rows (model/memory.py). Then the stage does what it would do, three steps long, where that fits this machine: the time
comes from these steps, and the peak is the one that was seen.
"""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from pipeline.errors import UserError
from pipeline.model.flops import flops_per_token
from pipeline.model.load import parameter_count
from pipeline.model.lora import without_wrapper
from pipeline.model.memory import (
    Line,
    Passed,
    available,
    gradient_bytes,
    is_out_of_memory,
    logit_bytes,
    measured,
    moment_bytes,
    peak_of,
    resident,
    trained_count,
    weight_bytes,
)
from pipeline.runtime.console import console
from pipeline.runtime.hf_trainer import SUMS, peak_memory_mb
from pipeline.runtime.longest import lengths_of, longest_rows, pass_over
from pipeline.runtime.record import Stage

STEPS = 3
"""Optimizer steps that are measured, after one that is not: it makes the moments, and compiles."""
SEEN_TOKENS = 16
"""Tokens of an answer that sampling is watched for; the cache of the others is counted."""
HEADROOM = 0.9
"""Share of the memory that a proposal may fill: an estimate may be a little low, and a machine has other work."""
MB = 10**6


GAPS = 0.3
"""Memory that an allocator of the CPU keeps in pieces too small to use, as a share of what comes and goes, where no run
has shown it: runs of 9 and 135 million parameters had 0.3 to 0.8 (docs/budget.md)."""


@dataclass
class Memory:
    """Bytes of a process with micro-batches of `rows` rows, by part."""

    rows: int
    fixed: dict[str, float]
    """What does not depend on the rows, and stays."""
    kept: Line
    """Activations: what autograd keeps for the backward pass, by rows."""
    passing: Line
    """The most that comes and goes in forward and backward pass: activations, logits, gradients of activations."""
    logits: tuple[int, int] = (0, 0)
    """Tokens of a row, and entries of the vocabulary; zeros where no logits of a vocabulary are made."""
    accumulates: bool = False
    """Whether gradients stay while the next micro-batch goes forward."""
    gaps: float = GAPS
    sampling: float = 0.0
    """What sampling answers takes beyond the gradients, which do not exist meanwhile."""
    seen: float | None = None
    """The peak that a run with `rows` had; None where it was not run."""

    def parts(self, rows: int) -> dict[str, float]:
        """What can be counted, of micro-batches of `rows` rows."""
        tokens, vocab_size = self.logits
        kept, most = self.kept(rows), self.passing(rows)
        logits = max(0.0, min(logit_bytes(rows * tokens, vocab_size), most - kept)) if tokens else 0.0
        rest = max(0.0, most - kept - logits)
        named = {"activations": kept, "logits": logits, "what the backward pass takes besides": rest}
        named["cache of sampling, and what it takes besides"] = max(0.0, self.sampling - most)
        return self.fixed | {name: size for name, size in named.items() if size}

    def peak(self, rows: int, accumulates: bool) -> float:
        """The peak of micro-batches of `rows` rows: what was seen, and what is counted for more or fewer rows."""
        counted = sum(self.parts(rows).values())
        if self.seen is None:
            return counted + self.gaps * self.passing(rows)
        rest = self.seen - sum(self.parts(self.rows).values())
        if rest > 0 and self.passing(self.rows):
            return counted + rest * self.passing(rows) / self.passing(self.rows)
        # Below 0 where gradients came while activations went; not so where they stay
        return counted + (0.0 if accumulates and not self.accumulates else rest)

    def lines(self) -> list[str]:
        """A table, in MB, whose parts add up to the peak."""
        parts, peak = self.parts(self.rows), self.peak(self.rows, self.accumulates)
        rest = peak - sum(parts.values())
        if rest:
            parts["gaps, libraries' buffers, loading" if rest > 0 else "less, as not all is there at once"] = rest
        how = "seen while the steps were taken" if self.seen is not None else "counted, not run"
        parts[f"peak, {how}"] = peak
        return [f"  {name:<46}{size / MB:>10,.0f}" for name, size in parts.items()]


@dataclass(frozen=True)
class Machine:
    """Whom a dry run speaks of: `processes` that share each step, `limit` bytes for each."""

    processes: int
    limit: float
    told: str

    @classmethod
    def of(cls, stage: Stage, device: torch.device) -> "Machine":
        """What --processes and --memory_gb say; without them one process and what this machine has left for it."""
        args: Any = stage.args
        if args.memory_gb is not None:
            return cls(args.processes or 1, args.memory_gb * 1e9, f"the {args.memory_gb:g} GB of --memory_gb")
        left = available(device)
        return cls(args.processes or 1, left, f"the {left / MB:,.0f} MB that this machine has left for a process")


# ---- the stages that train with transformers' Trainer ---------------------------------------------------------------


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
    tokens = per_row * rows_of_step * args.max_steps
    flops = tokens * training_flops(model, longest, head)
    said = [
        f"{parameter_count(model):,} parameters, {trained_count(model):,} of them trained; "
        f"{args.max_steps:,} steps of {rows_of_step} rows, {tokens:,.0f} tokens, {flops:.2g} FLOPs",
        *timed.sentences(args.max_steps, evaluations_of(trainer), machine.processes),
    ]
    if machine.processes > 1:
        memory.fixed["gradient buckets of DistributedDataParallel"] = gradient_bytes(model)
        said.append(shared(machine.processes))
    for sentence in said:
        stage.say(sentence)
    rows = memory.rows
    print_memory(memory, f"micro-batches of {rows} rows of up to {longest:,} tokens")
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


def passed(trainer: Any, rows: int) -> Passed:
    """What forward and backward pass of the longest rows take."""
    through = lambda forward: measured(forward, trainer.model)  # noqa: E731
    return pass_over(trainer, longest_rows(trainer.train_dataset, rows), SUMS, through)


def fixed_parts(*models: nn.Module | None) -> dict[str, float]:
    """Memory before anything is computed: of the process, and of the weights of models."""
    weights = weight_bytes(*models)
    if any(p.device.type == "cuda" for model in models if model is not None for p in model.parameters()):
        return {"weights": float(weights)}
    for model in models:  # weights in a file that is mapped are in memory once they have been read
        for parameter in model.parameters() if model is not None else ():
            parameter.detach().sum()
    return {"Python, libraries and data": float(max(0, resident() - weights)), "weights": float(weights)}


def row_lengths(trainer: Trainer) -> tuple[float, int]:
    """Tokens of a row, padding apart: the mean, both sides of a pair together, and the longest."""
    rows: Any = trainer.train_dataset
    lengths = lengths_of(rows)
    if lengths is None:
        count = len(next(iter(rows))["input_ids"])
        return count, count
    names = [name for name in rows.column_names if name.endswith("ids")]
    return float(sum(np.mean([len(ids) for ids in rows[name]]) for name in names)), int(lengths.max())


def training_flops(model: Any, tokens_in_row: int, head: bool) -> float:
    """FLOPs of forward and backward pass a token (model/flops.py); 6 a parameter where a configuration names no shape.

    Of 6, 2 are the forward pass, 2 the gradient of the inputs, and 2 that of the weights, of those that are trained.
    """
    config = config_of(model)
    try:
        flops = float(flops_per_token(config, tokens_in_row))
        flops -= 0 if head else 6 * config.vocab_size * config.hidden_size
    except (AttributeError, TypeError):
        flops = 6.0 * parameter_count(model)
    return flops * (4 + 2 * trained_count(model) / parameter_count(model)) / 6


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


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=max(1, round(seconds))))


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
    memory.seen = float(peak_memory_mb() * 2**20)
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


# ---- what is said ---------------------------------------------------------------------------------------------------


def shared(processes: int) -> str:
    """What a time for several processes assumes."""
    return (
        f"{processes} processes share the rows of each step and each evaluation, so the time is divided by their "
        "number; that holds where each has cores or a GPU of its own, and leaves out what they send each other"
    )


def print_memory(memory: Memory, of: str) -> None:
    """The table."""
    console.print(f"memory of a process in MB, {of}", markup=False, style="bold", soft_wrap=True)
    for line in memory.lines():
        console.print(line, markup=False, soft_wrap=True)


def fitting(memory: Memory, limit: float, rows_of_step: int) -> int | None:
    """The largest micro-batch that divides the rows of a step and fills at most HEADROOM of `limit`."""
    sizes = [d for d in range(1, rows_of_step + 1) if rows_of_step % d == 0]
    fit = [d for d in sizes if memory.peak(d, d < rows_of_step) <= HEADROOM * limit]
    return max(fit, default=None)


def proposal(memory: Memory, machine: Machine, rows_of_step: int, what: str = "rows", accumulation: bool = True) -> str:
    """A sentence: whether the present micro-batch fits, and the largest that does, with the same steps.

    `accumulation`: a step's rows are set by gradient_accumulation_steps.
    """
    share = rows_of_step // machine.processes
    rows = min(memory.rows, share)
    peak = memory.peak(rows, rows < share)
    fits = "fits" if peak <= HEADROOM * machine.limit else "fits barely" if peak <= machine.limit else "does not fit"
    at_present = f"{rows} {what} take {peak / MB:,.0f} MB, which {fits} in {machine.told}"
    best = fitting(memory, machine.limit, share)
    if best is None:
        return (
            f"{at_present}. Not even one row leaves a tenth of it free: set gradient_checkpointing, shorten the rows, "
            "or take a smaller model"
        )
    times = f" with gradient_accumulation_steps {share // best}" if accumulation else ""
    return (
        f"{at_present}. The largest that leaves a tenth free: per_device_train_batch_size {best}{times} "
        f"({memory.peak(best, best < share) / MB:,.0f} MB); a step has the same {rows_of_step} {what}"
    )


# ---- sampling -------------------------------------------------------------------------------------------------------


def config_of(model: Any) -> Any:
    """The configuration of the language model in a model."""
    return without_wrapper(model).config.get_text_config()


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


def sampling_bytes(
    model: Any, prompts: list[list[int]], rows: int, max_new_tokens: int, generate: Callable[..., Any]
) -> float:
    """What `generate` takes for `rows` answers at a time beside the weights: seen with one and two of the first
    prompts and a few tokens, and the cache of all tokens counted."""
    few = min(max_new_tokens, SEEN_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": few, "temperature": 1.0, "eos_token_id": [-1], "pad_token_id": 0}

    def taken_by(count: int) -> int:
        chosen = [prompts[i % len(prompts)] for i in range(count)]
        generator = torch.Generator().manual_seed(0)
        return peak_of(lambda: generate(chosen, generator=generator, **options), model.device)

    line = Line.through((1, taken_by(1)), (2, taken_by(2)))
    return line(rows) + rows * cache_bytes(model, max_new_tokens - few)
