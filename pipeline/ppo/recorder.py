"""Where a PPO run writes and what a person sees of it."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline.checkpoint import latest_checkpoint, step_of
from pipeline.errors import UserError
from pipeline.lock import hold
from pipeline.model.hardware import use_bf16
from pipeline.ppo.config import PPOConfig
from pipeline.trackers import Trackers, check_installed


class Recorder(Protocol):
    """What a trainer asks of its surroundings: a stage of the pipeline, or the Prints of a script."""

    @property
    def accelerator(self) -> Accelerator: ...

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        ...

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from."""
        ...

    def begin(self) -> None:
        """Called before anything is written; further calls do nothing."""

    def say(self, sentence: str) -> None:
        """A sentence for the person who watches, once, whatever the number of processes."""

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics, once."""

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows, such as the answers of an evaluation, as a table in the trackers, once."""

    @property
    def stopping(self) -> int:
        """Not 0 once a signal has asked this process to stop."""
        ...

    def stop(self, kept: Path) -> None:
        """End the run, whose state is now in `kept`; called by all processes where one is `stopping`."""

    def progress(
        self, total: int, description: str, done: int = 0
    ) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """A context with a function `advance(n, text)`."""
        ...


class Prints:
    """A Recorder for a script: it prints, reports to `args.report_to`, and keeps checkpoints in `args.output_dir`."""

    def __init__(self, args: PPOConfig) -> None:
        check_installed(args.report_to)
        self.accelerator = build_accelerator(args)
        self.checkpoints, self.keeps = Path(args.output_dir) / "checkpoints", args.save_steps > 0
        self.trackers = Trackers(args, Path(args.output_dir), Path(args.output_dir).name, self.say)

    @property
    def resume_from(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return latest_checkpoint(self.checkpoints, self.say)

    stopping = 0  # a script deals with signals itself

    def begin(self) -> None:
        """Keep other processes from writing checkpoints there too, where there will be any."""
        if self.keeps and self.accelerator.is_main_process:
            self.checkpoints.parent.mkdir(parents=True, exist_ok=True)
            hold(self.checkpoints.parent)
        if self.trackers.due and self.accelerator.is_main_process:
            point = self.resume_from
            self.trackers.start(step_of(point) + 1 if point else 0)

    def stop(self, kept: Path) -> None:
        """Never called."""

    def say(self, sentence: str) -> None:
        """Print on the main process."""
        if self.accelerator.is_main_process:
            known = sys.stdout.encoding or "utf-8"  # a character that the terminal has no code for becomes ?
            print(sentence.encode(known, errors="replace").decode(known), flush=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Print the numbers of a line on the main process."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        self.say("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        self.trackers.log(metrics)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """To the trackers alone."""
        self.trackers.table(name, rows, step)

    def progress(
        self, total: int, description: str, done: int = 0
    ) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """No bar: each update prints its line."""
        return contextlib.nullcontext(lambda n=1, text="": None)


def build_accelerator(args: PPOConfig) -> Accelerator:
    """An Accelerator for use without a stage; a process keeps the precision of its first one, which auto follows."""
    precision = "bf16" if use_bf16(args.mixed_precision) else "no"
    there = AcceleratorState._shared_state.get("_mixed_precision", precision)
    if there != precision:
        if args.mixed_precision != "auto":
            raise UserError(
                f"mixed_precision: a Trainer or Accelerator before it has set this process to {there!r}, which cannot "
                f"be {precision!r} too; set both alike, or run PPO in a process of its own"
            )
        precision = there
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
