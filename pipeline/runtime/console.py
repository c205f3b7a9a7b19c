"""What a person at the terminal sees: lines, a progress bar, and one sentence where a stage cannot go on."""

import atexit
import contextlib
import datetime
import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from pipeline.errors import NothingToDo, UserError
from pipeline.runtime import signals
from pipeline.runtime.command_line import ArgumentsT, parse

console = Console(highlight=False)
UNITS = {"grad_norm": "grad {:.3g}", "tokens_per_s": "{:,.0f} tok/s", "mfu": "{:.0%} of peak", "memory_mb": "{:,} MB"}
# What a disk that is full, read-only, damaged or of others has for an answer.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTEMPTY}
DISK |= {errno.ENAMETOOLONG, errno.ELOOP}  # paths that no disk can have
UNSHOWN = {"learning_rate"}  # metrics.jsonl has it; it follows from the step


def run(main: Callable[[ArgumentsT], None], kind: type[ArgumentsT], *, interactive: bool = False) -> None:
    """Parse the arguments, call `main`, and turn what stops it into one sentence and an exit code.

    2 for a UserError or a full disk; 130 for Ctrl-C and 143 for SIGTERM, after what runtime/signals.py says (an
    `interactive` program deals with Ctrl-C itself).
    """
    print_anything()
    _quiet_libraries()
    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.nullcontext() if interactive else signals.watching(launched=has_a_launcher()):
        try:
            main(parse(kind))
        except NothingToDo as said:
            if os.environ.get("RANK", "0") == "0":
                console.print(escape(str(said)), soft_wrap=True)
        except UserError as error:
            _exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            _stop(stop)
        except Exception as error:
            if signals.asked():  # another process left, or a library turned the interruption into an error of its own
                _stop(signals.Stopped(signals.asked()), f" (on the way: {type(error).__name__}: {error})")
            if sentence := fault_of_the_disk(error):
                _exit(f"error: {sentence}")
            raise
    leave()


def print_anything() -> None:
    """A character that the terminal or log file has no code for (→ in latin-1) is printed as ?, and stops nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def fault_of_the_disk(error: Exception) -> str | None:
    """One sentence for an error of the disk or its permissions, whichever library met it; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.strerror}: {error.filename or 'the output folder'}; nothing more was written"
    of_rust = re.search(r"os error (\d+)", text)  # safetensors, tokenizers
    if (of_rust and int(of_rust[1]) in DISK) or "PytorchStreamWriter" in text or "inline_container" in text:
        return (
            f"a file cannot be written, is the disk full? ({text[:200]}); make room, then give the same command again"
        )
    if isinstance(error, SafetensorError):
        return f"weights cannot be read or written ({text}); is a file cut off, or the disk full?"
    return None


def has_a_launcher() -> bool:
    """Whether torchrun, accelerate or the like started this process, and should not be outlived."""
    # The second is set by accelerate launch alone, also where it starts one process.
    marks = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_DYNAMIC")
    return processes() > 1 or any(mark in os.environ for mark in marks)


def processes() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """End one of several processes, as a launcher started them; alone, do nothing.

    After the exit handlers, and without the C++ destructors that come then: gloo's threads may still run, and PyTorch
    aborts a process that has done all its work (one run in ten of a plain DistributedDataParallel script, torch 2.13).
    """
    if processes() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _exit(sentence: str, code: int = 2) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    if processes() > 1:  # the others wait in a collective: leave without waiting for them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _stop(stop: KeyboardInterrupt, more: str = "") -> NoReturn:
    """Leave as a signal asked for; of several processes, the main one says it."""
    stopped = stop if isinstance(stop, signals.Stopped) else signals.Stopped(signal.SIGINT)
    if int(os.environ.get("RANK", "0")) != 0:
        os._exit(stopped.code)
    _exit(f"{stopped}{more}", stopped.code)


def _quiet_libraries() -> None:
    import datasets
    import transformers

    # Said outright, or tokenizers warns and turns its threads off wherever a process is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


@contextlib.contextmanager
def progress_bar(total: int, description: str, done: int = 0, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar with speed and time left, below the lines; the context is a function `advance(n=1, text="")`."""
    with Progress(
        *("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn()),
        "{task.fields[text]}",
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task(description, total=total, completed=done, text="")
        yield lambda n=1, text="": bar.update(task, advance=n, text=text)


def line_of(metrics: dict[str, Any]) -> str:
    """The numbers among `metrics` as the line of a step shows them: short, so that the line fits a terminal."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k not in UNSHOWN}
    return "  ".join(_shown(name, value) for name, value in numbers.items())


def _shown(name: str, value: float) -> str:
    if name == "seconds_left":
        return f"{datetime.timedelta(seconds=round(value))} left".removeprefix("0:")
    if name in UNITS:
        return UNITS[name].format(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{name} {value:,.0f}"
    return f"{name} {value:.4g}"
