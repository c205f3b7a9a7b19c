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
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from rich.markup import escape

from pipeline.checkpoint import METRICS, PARTIAL, move_into, write_json
from pipeline.errors import NothingToDo, UserError
from pipeline.lock import hold, release
from pipeline.model.hardware import keep_freed_memory, use_bf16
from pipeline.runtime import signals
from pipeline.runtime.arguments import StageArguments
from pipeline.runtime.console import console, line_of, processes, progress_bar
from pipeline.runtime.inputs import RECORD, code_of, fingerprint, outputs_of
from pipeline.runtime.resume import Resume, check_place, identity_of
from pipeline.text.sources import GENERATORS
from pipeline.trackers import Trackers, check_installed

MIN_FREE_BYTES = 300_000_000
LIBRARIES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")


class Stage:
    """One run of one stage: checks, seeds, logs, and records.

    `inputs` names the files and folders that are read; `{"model": path}`. A path that looks local must exist; any other
    is taken as a hub name. Of several processes the main one looks and decides for all.

    resume_from  the checkpoint to go on from; None: from the beginning
    shown        names of the metrics to print, None for all; metrics.jsonl has all of them
    progress     `console.progress_bar`, on the main process
    show         how many rows are to be shown and nothing else done; 0: none. Nothing is written then
    dry_run      whether the stage is to say what it will take, and nothing else done; output_dir is then a folder that
                 is gone with the process, for libraries that make it

    Raises UserError, before any work, if an input is missing or not as it was left, if the output folder cannot be
    written, is an input, somebody else's or in use, or holds a run that cannot go on; NothingToDo if it holds this very
    run, finished.
    """

    def __init__(self, args: StageArguments, name: str, inputs: Mapping[str, str | None]) -> None:
        if Path(args.output_dir).name == "stage":
            raise UserError(f"{name}: its arguments need an output_dir of their own, such as '{{run_dir}}/{name}'")
        self.args, self.name, self.output_dir = args, name, Path(args.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.started, self.clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self.shown: tuple[str, ...] | None = None
        self.progress = partial(progress_bar, shown=self.is_main)
        self.show, self.dry_run = getattr(args, "show", 0), args.dry_run
        _check_dry_run(args)
        self.inputs: dict[str, dict[str, str]] = {}
        self._resume: Resume | None = None
        self.trackers = Trackers(args, self.output_dir, f"{Path(args.run_dir).name}/{name}", self.say)
        read = {key: path for key, path in inputs.items() if path and path not in GENERATORS}
        self.resume_from = _decide(self.is_main, lambda: self._look(read))
        self.seconds_before = self._resume.seconds if self._resume else 0.0
        if not torch.cuda.is_available():
            keep_freed_memory()
        set_seed(args.seed)

    def _look(self, read: dict[str, str]) -> Path | None:
        """The checkpoint to go on from, after all that can be checked has been; on the main process."""
        looks = self.show or self.dry_run  # nothing is written then, not even the folder
        if not looks:
            check_place(self.name, self.output_dir, read)
            check_installed(self.args.report_to)
        keys: dict[str, str] = {}  # by path, as a folder that is read for two things is hashed once
        for key, path in read.items():
            keys.setdefault(path, key)
        known = {path: fingerprint(self.name, key, path, self.args.run_dir) for path, key in keys.items()}
        self.inputs = {key: known[path] for key, path in read.items()}
        if looks:
            if self.dry_run:
                self._point_elsewhere()
            return None
        _check_writable(self.output_dir)
        hold(self.output_dir)
        config = dataclasses.asdict(self.args)
        self.inputs |= code_of(config)
        identity = identity_of(self.name, config, self.inputs, processes(), self._bf16)
        try:
            self._resume = Resume(self.output_dir, identity, self.args.fresh, self.say)
        except (UserError, NothingToDo):
            release(self.output_dir)
            raise
        if self._resume.checkpoint:
            self.say(f"going on from {self._resume.checkpoint}")
        return self._resume.checkpoint

    def _point_elsewhere(self) -> None:
        self._elsewhere = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.output_dir = Path(self._elsewhere.name)
        self.checkpoints = self.output_dir / "checkpoints"

    def begin(self) -> None:
        """Make the folder ready: what an earlier run left goes aside now, not before all checks have passed.

        To be called before a stage writes anything; further calls do nothing.
        """
        if self._resume:
            begun, self._resume = self._resume, None
            begun.begin()
            self.trackers.start(_next_step(begun.metrics_file))

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
        self.trackers.finish()
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
        with (self.output_dir / METRICS).open("a", encoding="utf-8") as stream:
            line = {**metrics, "time": round(self.seconds, 2)}
            stream.write(json.dumps(line) + "\n")
        self.trackers.log(line)
        self.say(line_of({k: v for k, v in metrics.items() if self.shown is None or k in self.shown}))

    def table(self, name: str, rows: list[dict[str, Any]], step: int = 0) -> None:
        """Show rows, such as answers, as a table in the trackers; main process only."""
        if self.is_main:
            self.begin()
            self.trackers.table(name, rows, step)

    def write_model(self, write: Callable[[Path], None]) -> None:
        """Let `write(folder)`, which all processes call and leave together, fill a folder beside, and move what is in
        it into the stage's own. A kill leaves nothing but that folder, which goes when the run goes on: safetensors
        writes files of other names first."""
        beside = self.output_dir / f"model{PARTIAL}"
        write(beside)
        if self.is_main:
            move_into(beside, self.output_dir)

    def finish(self, metrics: dict[str, Any], tokens: int | None = None) -> None:
        """Write stage.json, last of all: it marks the folder as complete."""
        if not self.is_main:
            return
        self.begin()
        self.trackers.finish(metrics)
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
            "bf16": self._bf16,
            "outputs": outputs_of(self.output_dir),
        }
        write_json(self.output_dir / RECORD, record)
        release(self.output_dir)
        self.say(f"done in {self.seconds:.0f} s  {line_of(metrics)}  → {self.output_dir}")


def _check_dry_run(args: Any) -> None:
    """Raise UserError for settings that do nothing, or more than one thing."""
    if not args.dry_run:
        for name in ("processes", "memory_gb"):
            if getattr(args, name, None) is not None:
                raise UserError(f"{name}: it says what a dry run speaks of; give --dry_run with it, or leave it out")
        return
    if getattr(args, "show", 0):
        raise UserError("dry_run and show each end the stage; give one of them")
    if processes() > 1:
        raise UserError("dry_run: start it without a launcher, as one process; --processes says how many it speaks of")


def _decide(is_main: bool, look: Callable[[], Path | None]) -> Path | None:
    """What `look` finds on the main process, on every process; what it raises is raised on all of them."""
    if processes() == 1:
        return look()
    PartialState(cpu=not torch.cuda.is_available())
    found: list[Any] = [None, None, None]
    if is_main:
        try:
            found[0] = look()
        except (UserError, NothingToDo) as error:
            found[1:] = type(error), str(error)
    checkpoint, kind, sentence = broadcast_object_list(found)
    if kind is not None:
        raise kind(sentence)
    return checkpoint


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


def _next_step(metrics: Path) -> int:
    """The step after that of the last line of metrics; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        return int(json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["step"]) + 1
    return 0


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
