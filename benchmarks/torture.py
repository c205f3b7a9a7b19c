"""Kill every stage with SIGKILL, start the same command again until it ends, and compare what it leaves with the folder
of a run that nobody killed: `make torture`, or `python -m benchmarks.torture --kills 40 --stages ppo`.

A case is a stage under one configuration: a preset, or the preset `stories` with other settings. All are made small;
what they do stays. A run is killed up to four times before it may end. A kill comes

moment   after a share of the uninterrupted run's time, drawn evenly;
growth   when a file in the stage's folder has just changed, as seen from outside every millisecond: a checkpoint or
         model that is half written;
call     right before a file is opened for writing, renamed or removed, or right after it was emptied.

`--seed` draws them; how far a process is at a moment depends on the machine. Every file must be equal to the bit, but
for the TIMES of torture_compare.py, and none may be missing or left over. The libraries are imported once: each start
is a fork of this process, which then runs `stages.<stage>` as `python -m` would; `--spawn` starts new interpreters
instead, and so does the configuration two-processes, whose launcher is killed with its workers.

The table is printed as Markdown; exit code 1 if a row differs. A folder that differs is kept.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.torture_cases import ALL, CONFIGURATIONS, NEEDS, Case
from benchmarks.torture_compare import compare

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")
TOGETHER = 4  # kills of one run, at most
WIDTHS = (16, 11, 5, 4, 8, 5, 0)  # of the table's columns

# ---- one start of the command, killed or not -------------------------------------------------------------------------


class Stop(NamedTuple):
    """When a start is killed: at the second, the change in the folder, or the file operation number `at`."""

    kind: str
    at: float


class Ended(NamedTuple):
    """What became of one start."""

    code: int | None
    """As Python has it: −9 for SIGKILL. 124 where the command was stopped as it took too long."""
    seconds: float
    growth: int
    """Changes in the folder that were seen."""
    calls: int
    """File operations of Python's."""


def run(case: Case, stop: Stop | None = None, limit: float = 900) -> Ended:
    """Start the command, kill it at `stop`, and wait for its end; one that takes longer than `limit` seconds too."""
    calls, seen, growth = FORK.Value("i", 0, lock=False), sizes(case.output), 0
    child = FORK.Process(target=become, args=(case, stop, calls), daemon=True)
    begin = time.monotonic()
    child.start()
    assert child.pid is not None
    while child.is_alive():
        if (stop is None or stop.kind == "growth") and (now := sizes(case.output)) != seen:
            seen, growth = now, growth + 1
        reached = {"moment": time.monotonic() - begin, "growth": growth}
        if time.monotonic() - begin > limit or (stop and reached.get(stop.kind, -1) >= stop.at):
            kill(child.pid)
            child.join()
        time.sleep(0.001)
    seconds = time.monotonic() - begin
    return Ended(124 if seconds > limit else child.exitcode, seconds, growth, calls.value)


def become(case: Case, stop: Stop | None, calls: Any) -> None:
    """In the child: write to the case's log and be the stage's command."""
    log = os.open(log_of(case), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    launcher = CONFIGURATIONS[case.name].launcher
    if launcher or case.spawn:
        words = [sys.executable, *(launcher or []), "-m", f"stages.{case.stage}", *case.words]
        os.execv(sys.executable, words)
    sys.addaudithook(file_operations(case.output, stop, calls))
    sys.argv = [f"stages/{case.stage}.py", *case.words]
    sys.modules.pop(f"stages.{case.stage}", None)
    runpy.run_module(f"stages.{case.stage}", run_name="__main__", alter_sys=True)


def file_operations(folder: Path, stop: Stop | None, calls: Any) -> Callable[[str, tuple], None]:
    """An audit hook that counts what Python changes in `folder`, and kills its process before number `stop.at`.

    Opening a file anew counts twice: before it, and when the file is empty and nothing is written yet.
    """

    def hook(event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        flags = args[2] if event == "open" else os.O_WRONLY
        if not flags & (os.O_WRONLY | os.O_RDWR) or not str(args[0]).startswith(str(folder)):
            return
        for step in range(2 if flags & os.O_TRUNC else 1):
            calls.value += 1
            if stop and stop.kind == "call" and calls.value == stop.at:
                if step:
                    os.close(os.open(args[0], flags, 0o644))  # counted again, but too late to matter
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def kill(pid: int) -> None:
    """SIGKILL to a process and all that it has started; workers of a launcher are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.suspend()  # at once: it takes milliseconds to find the others
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def sizes(folder: Path) -> dict[str, int]:
    """Size of every file and folder below `folder`, as far as they stay while it is read."""
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            found[entry.path] = entry.stat().st_size
            if entry.is_dir():
                found |= sizes(Path(entry.path))
    return found


def log_of(case: Case) -> Path:
    """What the last start printed."""
    return case.run_dir / f"{case.output.name}.log"


# ---- a case ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One row of the table."""

    kills: int = 0
    runs: int = 0
    restarts: int = 0
    files: int = 0
    faults: list[str] = field(default_factory=list)


def reference(case: Case) -> Ended:
    """Make the stages that the case needs, where they are not there yet, and then its own folder, uninterrupted."""
    preset = CONFIGURATIONS[case.name].preset
    for stage in NEEDS[case.stage]:
        if not (case.run_dir / stage / "stage.json").exists():
            reference(Case(preset, stage, case.run_dir, case.spawn))
    shutil.rmtree(case.output, ignore_errors=True)  # made for a stage after it: a finished run would not run again
    return run(case)


def torture(case: Case, kills: int, seed: int) -> Outcome:
    """Kill a case `kills` times, in as many runs as that takes, and compare the folder of each with the reference."""
    draw, outcome, whole = random.Random(f"{seed} {case.name} {case.stage}"), Outcome(), reference(case)
    if whole.code:
        return Outcome(faults=[f"not killed: {last_words(case, whole)}"])
    expected = case.run_dir / "expected"
    shutil.rmtree(expected, ignore_errors=True)  # of a run that was broken off
    case.output.rename(expected)
    while outcome.runs == 0 or (outcome.kills < kills and outcome.runs < 10 + 2 * kills):
        outcome.runs += 1
        together = min(draw.randint(1, TOGETHER), kills - outcome.kills)
        stops = [draw_stop(draw, whole, again=i > 0) for i in range(together)]
        faults = one_run(case, stops, outcome, limit=60 + 20 * whole.seconds)
        if not faults:
            outcome.files, faults = compare(expected, case.output)
        if faults:
            more = f" and {len(faults) - 1} more" if faults[1:] else ""
            outcome.faults.append(f"{', '.join(map(describe, stops)) or 'not killed'}: {faults[0]}{more}")
            keep(case, outcome.runs)
        shutil.rmtree(case.output, ignore_errors=True)
    if outcome.kills < kills:
        outcome.faults.append(f"ended before the kill too often: {outcome.kills} of {kills} kills")
    expected.rename(case.output)
    return outcome


def one_run(case: Case, stops: list[Stop], outcome: Outcome, limit: float) -> list[str]:
    """Start the command until it ends, killed at each of `stops`; a sentence if it ended with an error."""
    for number, stop in enumerate([*stops, None]):
        ended = run(case, stop, limit)
        outcome.restarts += number > 0
        if ended.code != -signal.SIGKILL:
            break
        outcome.kills += 1
    return [last_words(case, ended)] if ended.code else []


def last_words(case: Case, ended: Ended) -> str:
    """How a command that failed ended: its last line that names an error, but for the launcher's own."""
    lines = log_of(case).read_text().strip().splitlines() or [""]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: *)?(error|\w+Error): ", line)]
    return f"exit code {ended.code}: {(errors or lines)[-1]}"


def draw_stop(draw: random.Random, whole: Ended, again: bool) -> Stop:
    """A kill within an uninterrupted run's seconds, changes or file operations; a restart has about half of them."""
    kinds = {"moment": whole.seconds, "growth": whole.growth, "call": whole.calls}
    kind = draw.choice([kind for kind, most in kinds.items() if most])
    most = kinds[kind] / (2 if again else 1)
    return Stop(kind, round(draw.uniform(0, most), 3) if kind == "moment" else draw.randint(1, max(1, int(most))))


def describe(stop: Stop) -> str:
    """A kill in words."""
    return f"{stop.kind} {stop.at:g}{' s' if stop.kind == 'moment' else ''}"


def keep(case: Case, number: int) -> None:
    """Put a folder that differs aside, with the log of its last start."""
    aside = case.run_dir.parent / "different" / f"{case.name}-{case.stage}-{number}"
    case.output.mkdir(exist_ok=True)  # gone, if that is the fault
    shutil.copytree(case.output, aside, dirs_exist_ok=True)
    shutil.copy(log_of(case), aside / "torture.log")


# ---- the table -------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace, work: Path) -> Iterator[Case]:
    """The chosen cases, a preset's stages in the chain's order."""
    for name, (changes, preset, _) in CONFIGURATIONS.items():
        for stage in changes:
            if name in options.configurations and stage in options.stages:
                yield Case(name, stage, work / preset, options.spawn)


def row(cells: tuple[Any, ...]) -> str:
    """A line of the Markdown table."""
    padded = (str(cell).replace("|", "\\|").ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return f"| {' | '.join(padded)} |"


def warm_up(spawn: bool) -> None:
    """Import all that the stages need. A fork has none of its parent's threads, so there must be none."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator has a thread otherwise
    os.chdir(ROOT)
    if spawn:
        return
    for stage in NEEDS:
        importlib.import_module(f"stages.{stage}")
    importlib.import_module("torch").set_num_threads(1)
    if psutil.Process().num_threads() > 1:
        sys.exit("error: a library has started threads while it was imported; use --spawn")


def prepare(work: Path) -> None:
    """A folder a preset, and a text for the one that reads a file."""
    from reward_data import stories

    for _, preset, _ in CONFIGURATIONS.values():
        (work / preset).mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(stories.corpus(seed=0, max_bytes=80_000))
    (work / "shakespeare" / "text.txt").write_text(text, encoding="utf-8")


def torture_all(chosen: list[Case], kills: int, seed: int) -> list[tuple[Case, Outcome]]:
    """Each case in turn, a line when it is done."""
    done: list[tuple[Case, Outcome]] = []
    begin = time.monotonic()
    for case in chosen:
        start = time.monotonic()
        done.append((case, torture(case, kills, seed)))
        now, outcome = time.monotonic(), done[-1][1]
        left = (now - begin) / len(done) * (len(chosen) - len(done))
        said = f"DIFFERS: {outcome.faults[0]}" if outcome.faults else f"{outcome.files} files equal"
        print(
            f"{case.name} {case.stage}: {outcome.kills} kills in {outcome.runs} runs, {said}; "
            f"{now - start:.0f} s, about {left / 60:.0f} min left",
            flush=True,
        )
    return done


def main(argv: list[str] | None = None) -> int:
    """Run the chosen cases, print the table, return 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills a case; 0 compares two uninterrupted runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stages", nargs="+", choices=ALL, default=ALL, metavar="STAGE", help="; ".join(ALL))
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder for the runs; none: a temporary one")
    parser.add_argument("--spawn", action="store_true", help="a new interpreter at each start instead of a fork")
    parser.add_argument("--list", action="store_true", help="print the cases with their settings and end")
    options = parser.parse_args(argv)
    if options.list:
        for case in cases(options, Path("runs")):
            print(f"{case.name} {case.stage}: {' '.join(case.words)}")
        return 0
    work = (options.work or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    chosen = list(cases(options, work))
    warm_up(options.spawn)
    prepare(work)
    done = torture_all(chosen, options.kills, options.seed)
    print("\n" + row(("configuration", "stage", "kills", "runs", "restarts", "files", "what differs")))
    print(row(("---",) * 7))
    for case, outcome in done:
        said = f"{len(outcome.faults)} of {outcome.runs} runs: {outcome.faults[0]}" if outcome.faults else "nothing"
        print(row((case.name, case.stage, outcome.kills, outcome.runs, outcome.restarts, outcome.files, said)))
    failed = sum(bool(outcome.faults) for _, outcome in done)
    print(f"\n{sum(outcome.kills for _, outcome in done)} kills, {failed} of {len(done)} cases differ")
    if failed:
        print(f"what differs is in {work / 'different'}")
    elif not options.work:
        shutil.rmtree(work)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
