"""What every stage stands on: device, precision, seed, progress, metrics and the record of what was done.

A stage opens with `stage = Stage(args, name, inputs)`, which checks all that can be checked before work starts, and
ends with `stage.finish(metrics)`, which writes stage.json; a folder with stage.json is complete.
"""

import atexit
import contextlib
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

# Said outright, or tokenizers warns and turns its threads off wherever a process is forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from pipeline.checkpoint import latest_checkpoint, sha256_of, step_of, write_json
from pipeline.errors import UserError
from pipeline.model.hardware import keep_freed_memory, use_bf16
from pipeline.runtime.arguments import StageArguments
from pipeline.runtime.command_line import ArgumentsT, parse
from pipeline.text.sources import GENERATORS, find_sources, is_local

console = Console(highlight=False)
# Fields that change what is shown or kept but not what is computed: a run goes on from its checkpoint all the same.
COSMETIC_FIELDS = {"logging_steps", "save_steps", "run_dir", "output_dir", "preset"}
LEFT_BY_PPO = ("best", "ema", "adapter", "critic", "value_head.safetensors")  # what not every run writes again
MIN_FREE_BYTES = 300_000_000
HASHED_WHOLE = 4 * 2**30  # bytes
UNITS = {"grad_norm": "grad {:.3g}", "tokens_per_s": "{:,.0f} tok/s", "mfu": "{:.0%} of peak", "memory_mb": "{:,} MB"}
UNSHOWN = {"learning_rate"}  # the file has it; it follows from the step


def run(main: Callable[[ArgumentsT], None], kind: type[ArgumentsT]) -> None:
    """Parse the arguments, call `main`, and turn a UserError or a full disk into one sentence and exit code 2."""
    _quiet_libraries()
    try:
        main(parse(kind))
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _exit(f"{error.strerror}: {error.filename or 'the output folder'}; nothing more was written")
    except SafetensorError as error:
        _exit(f"weights cannot be read or written ({error}); is a file cut off, or the disk full?")
    except KeyboardInterrupt:
        _exit("stopped; the same command goes on from the last checkpoint, if there is one", code=130)
    leave()


def leave() -> None:
    """End one of several processes, as a launcher started them; alone, do nothing.

    After the exit handlers, and without the C++ destructors that come then: gloo's threads may still run, and PyTorch
    aborts a process that has done all its work (one run in ten of a plain DistributedDataParallel script, torch 2.13).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _exit(sentence: str, code: int = 2) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    # The other processes of a distributed run wait in a collective: leave without waiting for them.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _quiet_libraries() -> None:
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


class Stage:
    """One run of one stage: checks, seeds, logs, and records.

    `inputs` names the files and folders that are read; `{"model": path}`. A path that looks local must exist; any other
    is taken as a hub name. Raises UserError before any work if an input is missing or the output cannot be written.
    """

    def __init__(self, args: StageArguments, name: str, inputs: dict[str, str | None]) -> None:
        self.args, self.name = args, name
        self.output_dir = Path(args.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.started, self.clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self.seconds_before = 0.0
        self.shown: tuple[str, ...] | None = None  # names of the metrics to print; none: all. The file has all of them.
        self._progress: Progress | None = None
        named = {key: path for key, path in inputs.items() if path and path not in GENERATORS}
        self.inputs = {key: _fingerprint(name, key, path, args) for key, path in named.items()}
        _check_writable(self.output_dir)
        self._new: tuple[dict[str, Any], bool, bool] | None = None  # of a run that starts anew, until it has begun
        self.resume_from = self._resume_point()
        if not torch.cuda.is_available():
            keep_freed_memory()
        self.seed()

    # --- where the stage runs -------------------------------------------------------------------------------------

    @cached_property
    def accelerator(self) -> Any:
        """The Accelerator of this process; the Trainer-based stages let the Trainer build its own."""
        from accelerate import Accelerator

        precision = "bf16" if use_bf16(getattr(self.args, "mixed_precision", "no")) else "no"
        return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)

    @property
    def device(self) -> torch.device:
        """cuda where there is one, else cpu."""
        return self.accelerator.device

    def dtype_autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in the precision chosen by `mixed_precision`."""
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(kind, torch.bfloat16, enabled=use_bf16(getattr(self.args, "mixed_precision", "no")))

    def seed(self) -> None:
        """Seed Python, NumPy and torch with the stage's seed (the same on every process)."""
        from transformers import set_seed

        set_seed(self.args.seed)

    # --- resume ---------------------------------------------------------------------------------------------------

    def _resume_point(self) -> Path | None:
        """The checkpoint to go on from; None where there is none of these settings and inputs, or the run is finished.

        What then has to go is removed by `begin`, when everything has been checked. Raises UserError for a folder
        that holds somebody else's `checkpoints` or `metrics.jsonl`.
        """
        config = {
            k: self._without_run_dir(v) for k, v in dataclasses.asdict(self.args).items() if k not in COSMETIC_FIELDS
        }
        world = int(os.environ.get("WORLD_SIZE", "1"))
        identity = {"config": config, "inputs": {k: v["sha256"] for k, v in self.inputs.items()}, "processes": world}
        identity_file = self.checkpoints / "identity.json"
        finished = (self.output_dir / "stage.json").exists()
        there = any(self.checkpoints.glob("*")) or self._metrics_file.exists()
        if there and not finished and not identity_file.exists():
            raise UserError(
                f"{self.output_dir} has checkpoints or a metrics.jsonl that no stage wrote, and {self.name} would "
                "remove them; choose another output_dir"
            )
        same = identity_file.exists() and json.loads(identity_file.read_text(encoding="utf-8")) == identity
        point = latest_checkpoint(self.checkpoints, self.say) if same and not finished else None
        if world > 1:  # every process has read the folder before the main one changes it
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
        if not self.is_main:
            return point
        if point is None:
            changed = identity_file.exists() and not finished and not same and any(self.checkpoints.glob("*-*"))
            self._new = identity, changed, finished or identity_file.exists()
        else:
            self.say(f"going on from {point}")
            self._drop_metrics_after(step_of(point))
        return point

    def begin(self) -> None:
        """Make room for a run that starts anew: what an earlier one left goes now, not before all checks have passed.

        To be called before a stage writes anything; further calls do nothing.
        """
        if self._new is None:
            return
        (identity, changed, ours), self._new = self._new, None
        if changed:
            self.say("the settings or inputs changed since the last checkpoint: starting from the beginning")
        # Killed at any place in here, the folder is still known as ours, and of other settings
        identity_file = self.checkpoints / "identity.json"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not identity_file.exists():
            write_json(identity_file, {})
        (self.output_dir / "stage.json").unlink(missing_ok=True)
        old = [path for path in self.checkpoints.iterdir() if path != identity_file]
        for path in [*old, *(self.output_dir / name for name in (LEFT_BY_PPO if ours else ()))]:
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
        self._metrics_file.write_text("", encoding="utf-8")
        write_json(identity_file, identity)

    def _without_run_dir(self, value: Any) -> Any:
        """A setting as it is after the run's folder has been renamed."""
        if isinstance(value, list):
            return [self._without_run_dir(part) for part in value]
        return value.replace(self.args.run_dir, "{run_dir}") if isinstance(value, str) else value

    @property
    def _metrics_file(self) -> Path:
        return self.output_dir / "metrics.jsonl"

    def _drop_metrics_after(self, step: int) -> None:
        """Forget lines that the resumed run will write again, and count the seconds that were spent before."""
        kept = []
        for line in self._metrics_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line may have been cut off by the kill
                row = json.loads(line)
                if row.get("step", 0) <= step:
                    kept.append(line)
                    self.seconds_before = row.get("time", 0.0)
        self._metrics_file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    # --- what a person sees -----------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds of work so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.clock

    def say(self, sentence: str) -> None:
        """Print one line on the main process, above the progress bar."""
        if self.is_main:
            shown = self._progress.console if self._progress else console
            shown.print(f"[bold]{self.name}[/bold]  {escape(sentence)}", soft_wrap=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and print it as a readable line; main process only."""
        if not self.is_main:
            return
        self.begin()
        row = {**metrics, "time": round(self.seconds, 2)}
        with self._metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        named = {k: v for k, v in metrics.items() if self.shown is None or k in self.shown}
        self.say("  ".join(_shown(k, v) for k, v in named.items() if isinstance(v, int | float) and k not in UNSHOWN))

    def logged(self, step: int, name: str) -> float | None:
        """A figure that was logged at `step`, before a resume or after; main process only."""
        if self.is_main:
            for line in self._metrics_file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row.get("step") == step and name in row:
                    return row[name]
        return None

    @contextlib.contextmanager
    def progress(self, total: int, description: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar with speed and time left; the context is a function `advance(n=1, text="")`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        shown = self.is_main and console.is_terminal
        with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
            task = bar.add_task(description, total=total, completed=done, text="")
            self._progress = bar if shown else None
            try:
                yield lambda n=1, text="": bar.update(task, advance=n, text=text)
            finally:
                self._progress = None

    def end_progress(self) -> None:
        """Take the bar off the terminal, if there still is one."""
        if self._progress:
            self._progress.stop()

    # --- the record -----------------------------------------------------------------------------------------------

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
            "versions": _versions(),
            "git_commit": _git_commit(),
            "inputs": self.inputs,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "tokens": tokens,
            "metrics": metrics,
            "device": _device_name(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        write_json(self.output_dir / "stage.json", record)
        shown = "  ".join(f"{k} {_short(v)}" for k, v in metrics.items() if isinstance(v, int | float))
        self.say(f"done in {record['seconds']:.0f} s  {shown}  → {self.output_dir}")


def _shown(name: str, value: float) -> str:
    """A figure as the line of a step shows it: short, so that the line fits a terminal."""
    if name == "seconds_left":
        return f"{datetime.timedelta(seconds=round(value))} left".removeprefix("0:")
    if name in UNITS:
        return UNITS[name].format(value)
    return f"{name} {_short(value)}"


def _short(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _fingerprint(stage: str, key: str, path: str, args: StageArguments) -> dict[str, str]:
    """sha256 over the files of an input, of a data set those in its folders too; a hub name is its own fingerprint."""
    if not is_local(path) and not path.startswith(args.run_dir):
        return {"path": path, "sha256": "hub"}
    place = Path(path).expanduser()
    if not place.exists():
        if key == "dataset" and not path.startswith(args.run_dir):
            find_sources(path)  # raises with the nearest names
        hint = f"run `make {place.name}` first" if path.startswith(args.run_dir) else "check the path"
        raise UserError(f"{stage}: {key} {path} does not exist; {hint}")
    if place.is_file():
        return {"path": path, "sha256": _sha256_of(place)}
    if path.startswith(args.run_dir) and (place / "checkpoints").is_dir() and not (place / "stage.json").exists():
        raise UserError(f"{stage}: {key} {path} is not complete; run `make {place.name}` first")
    record = {"stage.json", "metrics.jsonl", "README.md", "training_args.bin"}
    inside = place.rglob("*") if key == "dataset" else place.iterdir()
    files = sorted(p for p in inside if p.is_file() and p.name not in record)
    if not files:
        raise UserError(f"{stage}: {key} {path} is an empty folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(place)} {_sha256_of(file)}\n".encode())
    return {"path": path, "sha256": digest.hexdigest()}


def _sha256_of(file: Path) -> str:
    """sha256 of a file's bytes; of a very large one, which would take minutes, of its size, time, begin and end."""
    status = file.stat()
    if status.st_size <= HASHED_WHOLE:
        return sha256_of(file)
    with file.open("rb") as stream:
        ends = stream.read(2**20)
        stream.seek(-(2**20), os.SEEK_END)
        ends += stream.read()
    return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns} ".encode() + ends).hexdigest()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        why = error.strerror
        raise UserError(f"the folder {folder} cannot be written ({why}); choose another output_dir") from None
    free, need = shutil.disk_usage(folder).free // 1_000_000, MIN_FREE_BYTES // 1_000_000
    if free < need:
        raise UserError(f"the disk of {folder} has {free} MB free, at least {need} MB are needed; make room")


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _git_commit() -> str | None:
    here = Path(__file__).parent
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(words, cwd=here, capture_output=True, text=True)
    except OSError:  # a machine without git
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
