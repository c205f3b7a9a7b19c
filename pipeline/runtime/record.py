"""One run of one stage: device, precision, seed, metrics, and the record of what was done.

A stage opens with `stage = Stage(args, name, inputs)`, which checks all that can be checked before work starts, and
ends with `stage.finish(metrics)`, which writes stage.json; a folder with stage.json is complete.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from rich.markup import escape

from pipeline.checkpoint import write_json
from pipeline.errors import UserError
from pipeline.model.hardware import keep_freed_memory, use_bf16
from pipeline.runtime import signals
from pipeline.runtime.arguments import StageArguments
from pipeline.runtime.console import console, line_of, processes, progress_bar
from pipeline.runtime.resume import Resume, fingerprint, identity_of
from pipeline.text.sources import GENERATORS

MIN_FREE_BYTES = 300_000_000
LIBRARIES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")


class Stage:
    """One run of one stage: checks, seeds, logs, and records.

    `inputs` names the files and folders that are read; `{"model": path}`. A path that looks local must exist; any other
    is taken as a hub name. Raises UserError before any work if an input is missing or the output cannot be written.

    resume_from  the checkpoint to go on from; None: from the beginning
    shown        names of the metrics to print, None for all; metrics.jsonl has all of them
    progress     `console.progress_bar`, on the main process
    """

    def __init__(self, args: StageArguments, name: str, inputs: Mapping[str, str | None]) -> None:
        if Path(args.output_dir).name == "stage":
            raise UserError(f"{name}: its arguments need an output_dir of their own, such as '{{run_dir}}/{name}'")
        self.args, self.name, self.output_dir = args, name, Path(args.output_dir)
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.started, self.clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self.shown: tuple[str, ...] | None = None
        self.progress = partial(progress_bar, shown=self.is_main)
        read = {key: path for key, path in inputs.items() if path and path not in GENERATORS}
        self.inputs = {key: fingerprint(name, key, path, args.run_dir) for key, path in read.items()}
        _check_writable(self.output_dir)
        self._resume = Resume(name, self.output_dir, identity_of(args, self.inputs, processes()), self.say)
        self.checkpoints, self.resume_from = self._resume.checkpoints, self._resume.checkpoint
        if processes() > 1:  # every process has read the folder before the main one changes it
            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
        self.seconds_before = self._resume.go_on(self.resume_from) if self.is_main and self.resume_from else 0.0
        self._has_begun = not self.is_main or self.resume_from is not None
        if not torch.cuda.is_available():
            keep_freed_memory()
        set_seed(args.seed)

    def begin(self) -> None:
        """Make room for a run that starts anew: what an earlier one left goes now, not before all checks have passed.

        To be called before a stage writes anything; further calls do nothing.
        """
        if not self._has_begun:
            self._has_begun = True
            self._resume.make_room()

    # --- where the stage runs -------------------------------------------------------------------------------------

    @cached_property
    def accelerator(self) -> Accelerator:
        """The Accelerator of this process; the Trainer-based stages let the Trainer build its own."""
        return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if self._bf16 else "no")

    @property
    def device(self) -> torch.device:
        """cuda where there is one, else cpu."""
        return self.accelerator.device

    def dtype_autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in the precision chosen by `mixed_precision`."""
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self._bf16)

    @property
    def _bf16(self) -> bool:
        return use_bf16(getattr(self.args, "mixed_precision", "no"))

    # --- the end before its time ----------------------------------------------------------------------------------

    @property
    def stopping(self) -> int:
        """Number of the signal that asked this process to stop; 0 if none did."""
        return signals.asked()

    def stop(self, kept: Path) -> NoReturn:
        """Raise Stopped: the run's state is in `kept`. A process without a signal of its own follows the others."""
        raise signals.Stopped(self.stopping or signal.SIGTERM, kept)

    # --- what is shown and kept -----------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds of work so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.clock

    def say(self, sentence: str) -> None:
        """Print one line on the main process, above the progress bar."""
        if self.is_main:
            console.print(f"[bold]{self.name}[/bold]  {escape(sentence)}", soft_wrap=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and print it as a readable line; main process only."""
        if not self.is_main:
            return
        self.begin()
        with self._resume.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**metrics, "time": round(self.seconds, 2)}) + "\n")
        self.say(line_of({k: v for k, v in metrics.items() if self.shown is None or k in self.shown}))

    def finish(self, metrics: dict[str, Any], tokens: int | None = None) -> None:
        """Write stage.json, last of all: it marks the folder as complete."""
        if not self.is_main:
            return
        self.begin()
        record = {
            "stage": self.name,
            "preset": self.args.preset,
            "seed": self.args.seed,
            "config": dataclasses.asdict(self.args),
            "command": " ".join(["python", "-m", f"stages.{self.name}", *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in LIBRARIES}},
            "git_commit": _git_commit(),
            "inputs": self.inputs,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "tokens": tokens,
            "metrics": metrics,
            "device": _device_name(),
            "processes": processes(),
        }
        write_json(self.output_dir / "stage.json", record)
        self.say(f"done in {self.seconds:.0f} s  {line_of(metrics)}  → {self.output_dir}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = error.strerror
        raise UserError(f"the folder {folder} cannot be written ({why}); choose another output_dir") from None
    free, need = shutil.disk_usage(folder).free // 1_000_000, MIN_FREE_BYTES // 1_000_000
    if free < need:
        raise UserError(f"the disk of {folder} has {free} MB free, at least {need} MB are needed; make room")


def _git_commit() -> str | None:
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # a machine without git
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
