"""`--dry_run`: what a stage will take, said before it is spent; nothing is written.

Weights, gradients and moments are counted from the parameters, activations and logits in forward passes of the longest
rows (model/memory.py). Then the stage does what it would do, three steps long, where that fits this machine: the time
comes from these steps, and the peak is the one that was seen.
"""

import contextlib
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.model.flops import flops_per_token
from pipeline.model.load import parameter_count
from pipeline.model.lora import without_wrapper
from pipeline.model.memory import Line, available, logit_bytes, resident, trained_count, weight_bytes
from pipeline.runtime.console import console
from pipeline.runtime.hf_trainer import peak_memory_mb
from pipeline.runtime.inputs import content_of
from pipeline.runtime.record import Stage

STEPS = 3
"""Optimizer steps that are measured, after one that is not: it makes the moments, and compiles."""
HEADROOM = 0.9
"""Share of the memory that a proposal may fill: an estimate may be a little low, and a machine has other work."""
MB = 10**6


GAPS = 0.5
"""Memory that a CPU's allocator keeps in pieces too small to use, and libraries' buffers, as a share of what comes and
goes, where no run has shown it: SFT of 9 million parameters had 0.5 with 32 rows and 0.6 with 8."""


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
    buckets: float = 0.0
    """In which DistributedDataParallel sums gradients: another copy of them, with more than one process."""
    names: tuple[str, str] = ("activations", "what the backward pass takes besides")
    """Of what is kept, and of the rest that comes and goes."""
    seen: float | None = None
    """The peak that a run with `rows` had; None where it was not run."""

    def parts(self, rows: int) -> dict[str, float]:
        """What can be counted, of micro-batches of `rows` rows."""
        tokens, vocab_size = self.logits
        kept, most = self.kept(rows), self.passing(rows)
        logits = max(0.0, min(logit_bytes(rows * tokens, vocab_size), most - kept)) if tokens else 0.0
        rest = max(0.0, most - kept - logits)
        named = {self.names[0]: kept, "logits": logits, self.names[1]: rest}
        named["cache of sampling, and what it takes besides"] = max(0.0, self.sampling - most)
        named["gradient buckets of DistributedDataParallel"] = self.buckets
        return self.fixed | {name: size for name, size in named.items() if size}

    def peak(self, rows: int, accumulates: bool) -> float:
        """The peak of micro-batches of `rows` rows: what was seen, and what is counted for more or fewer rows."""
        counted = sum(self.parts(rows).values())
        if self.seen is None:
            return counted + self.gaps * self.passing(rows)
        rest = self.seen - sum(self.parts(self.rows).values()) + self.buckets  # they were not there
        # Below 0 where gradients came while activations went; not so where they stay
        return counted + (0.0 if rest < 0 and accumulates and not self.accumulates else rest)

    def lines(self, rows: int, accumulates: bool) -> list[str]:
        """A table, in MB, whose parts add up to the peak."""
        parts, peak = self.parts(rows), self.peak(rows, accumulates)
        rest = peak - sum(parts.values())
        if rest:
            parts["gaps, libraries' buffers, loading" if rest > 0 else "less, as not all is there at once"] = rest
        how = "counted, not run" if self.seen is None else "seen" if rows == self.rows else "scaled from what was seen"
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


# ---- what is counted ----------------------------------------------------------------------------------------------


def config_of(model: Any) -> Any:
    """The configuration of the language model in a model."""
    return without_wrapper(model).config.get_text_config()


def forward_flops(model: Any, tokens_in_row: int, head: bool) -> float:
    """FLOPs of a forward pass a token (model/flops.py); 2 a parameter where a configuration names no shape.

    `head`: a position costs the product with the vocabulary.
    """
    config = config_of(model)
    try:
        flops = flops_per_token(config, tokens_in_row) - (0 if head else 6 * config.vocab_size * config.hidden_size)
        return flops / 3
    except (AttributeError, TypeError):
        return 2.0 * parameter_count(model)


def training_flops(model: Any, tokens_in_row: int, head: bool) -> float:
    """FLOPs of forward and backward pass a token: the gradient of the inputs costs another forward pass, and that of
    the weights as much as their trained share of one."""
    return forward_flops(model, tokens_in_row, head) * (2 + trained_count(model) / parameter_count(model))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=max(1, round(seconds))))


def fixed_parts(*models: nn.Module | None) -> dict[str, float]:
    """Memory before anything is computed: of the process, and of the weights of models."""
    weights = weight_bytes(*models)
    if any(p.device.type == "cuda" for model in models if model is not None for p in model.parameters()):
        return {"weights": float(weights)}
    for model in models:  # weights in a file that is mapped are in memory once they have been read
        for parameter in model.parameters() if model is not None else ():
            parameter.detach().sum()
    return {"Python, libraries and data": float(max(0, resident() - weights)), "weights": float(weights)}


# ---- what is said ---------------------------------------------------------------------------------------------------


def peak_so_far() -> float:
    """The most bytes that this process has had: of the GPU's memory what tensors took.

    Linux hands the highest figure of getrusage down from the process that started this one; its VmHWM is our own.
    """
    if not torch.cuda.is_available():
        with contextlib.suppress(OSError, IndexError, ValueError):
            return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return peak_memory_mb() * 2.0**20


def shared(processes: int) -> str:
    """What a time for several processes assumes."""
    return (
        f"{processes} processes share the rows of each step and each evaluation, so the time is divided by their "
        "number; that holds where each has cores or a GPU of its own, and leaves out what they send each other"
    )


def print_memory(memory: Memory, share: int, of: str) -> None:
    """The table, of the micro-batch that there is, or of a process's `share` of a step where that is smaller."""
    rows = min(memory.rows, share)
    console.print(f"memory of a process in MB, with {rows} {of} at a time", markup=False, style="bold", soft_wrap=True)
    for line in memory.lines(rows, rows < share):
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
    at_present = f"{rows} {what} take {peak / MB:,.0f} MB, which {fits_in(peak, machine.limit)} in {machine.told}"
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


def fits_in(peak: float, limit: float) -> str:
    return "fits" if peak <= HEADROOM * limit else "fits barely" if peak <= limit else "does not fit"


# ---- the stages without a model -------------------------------------------------------------------------------------


def of_reading(stage: Stage, said: str) -> None:
    """Print what a stage reads, and `said`, for a stage that trains and samples nothing."""
    stage.say("dry run: nothing is written")
    places = [Path(read["path"]).expanduser() for read in stage.inputs.values()]
    files = [file for place in places for file in ([place] if place.is_file() else content_of(place))]
    size = sum(file.stat().st_size for file in files if file.exists())
    stage.say(
        f"{len(files):,} files are read, {size / MB:,.1f} MB; {said}; {peak_so_far() / MB:,.0f} MB of memory so far"
    )
