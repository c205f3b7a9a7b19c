"""Where a run begins: what makes two runs the same one, what is in the folder already, and what becomes of it.

No folder is deleted to make room. A run that cannot go on is refused; what has to make room is moved aside.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import (
    IDENTITY,
    METRICS,
    PARTIAL,
    by_step,
    half_written,
    is_sealed,
    latest_checkpoint,
    read_object,
    replacing,
    write_json,
)
from pipeline.errors import NothingToDo, UserError
from pipeline.identity import differences, fixed, is_within
from pipeline.lock import LOCK, hold
from pipeline.runtime.inputs import LOGS, RECORD, changed_output, is_of_a_stage
from pipeline.text.sources import is_local

ANEW = "`--fresh True` begins anew and moves what is there aside"
FRESH = "fresh"  # an empty file in checkpoints/: the run began with --fresh True


def identity_of(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]], processes: int, bf16: bool | None
) -> dict[str, Any]:
    """What must be the same for a run to go on, whatever its folder is now called; made of what stage.json records.

    `bf16` is the precision that `mixed_precision: auto` came to on this machine.
    """
    run_dir, read = str(config.get("run_dir")), {each.get("path") for each in inputs.values()}
    # A path that is read counts by what is in it, however it is spelled
    settings = {
        n: _renamed(v, run_dir) for n, v in fixed(config, stage).items() if not isinstance(v, str) or v not in read
    }
    sums = {key: read["sha256"] for key, read in inputs.items()}
    identity = {"stage": stage, "config": settings, "inputs": sums, "processes": processes, "bf16": bf16}
    return json.loads(json.dumps(identity))  # as it is read back


def _renamed(value: Any, run_dir: str) -> Any:
    """A setting with `{run_dir}` for the run's folder, at the beginning of a path or of each in a list."""
    if isinstance(value, list):
        return [_renamed(part, run_dir) for part in value]
    if not isinstance(value, str):
        return value
    paths = ("{run_dir}" + p[len(run_dir) :] if is_within(p, run_dir) else p for p in value.split(","))
    return ",".join(paths)


@dataclass
class Earlier:
    """What an earlier run of a stage says about itself in its folder; None where it cannot be read."""

    stage: str | None
    identity: dict[str, Any] | None
    finished: bool
    outputs: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Earlier | None":
        """The run in `folder`; None where no stage has written there."""
        if not is_of_a_stage(folder):
            return None
        begun = read_object(folder / "checkpoints" / IDENTITY) or {}
        if (folder / RECORD).exists():
            record = read_object(folder / RECORD) or {}
            outputs = record.get("outputs")
            outputs = outputs if isinstance(outputs, dict) else {}
            try:
                stage, config, inputs, processes = (record[k] for k in ("stage", "config", "inputs", "processes"))
                identity = identity_of(stage, config, inputs, processes, record.get("bf16"))
            except (KeyError, TypeError, AttributeError):
                identity = None
            return cls(record.get("stage") or begun.get("stage"), identity, True, outputs)
        if "config" not in begun:  # damaged; each checkpoint has it too
            newest = latest_checkpoint(folder / "checkpoints", lambda sentence: None)
            begun = (newest and read_object(newest / IDENTITY)) or {}
        return cls(begun.get("stage"), begun or None, False, {})


def check_place(stage: str, output_dir: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError for an output folder that `stage` must not write: an input, another stage's, somebody else's."""
    place = output_dir.resolve()
    for key, path in inputs.items():
        read = Path(path).expanduser().resolve()
        if is_local(path) and (read == place or read in place.parents or place in read.parents):
            how = "is" if read == place else "lies in" if read in place.parents else "holds"
            raise UserError(f"{stage}: output_dir {output_dir} {how} its own input ({key} {path}); choose another one")
    if (output_dir.exists() and not output_dir.is_dir()) or (output_dir / "checkpoints").is_file():
        in_the_way = output_dir / "checkpoints" if output_dir.is_dir() else output_dir
        raise UserError(f"{stage}: {in_the_way} is a file where a folder is needed; choose another output_dir")
    for name in (METRICS, RECORD):
        if (output_dir / name).is_dir():
            where = output_dir / name
            raise UserError(f"{stage}: {where} is a folder where a file is needed; choose another output_dir")
    earlier = Earlier.of(output_dir)
    if earlier and earlier.stage not in (None, stage):
        raise UserError(
            f"{output_dir} is the folder of the stage {earlier.stage}; choose another output_dir for {stage}"
        )
    if earlier is None and output_dir.is_dir() and (strange := _strange(output_dir)):
        raise UserError(
            f"{output_dir} has files that no stage wrote ({strange}), which {stage} would mix with its own; choose "
            "another output_dir"
        )


def _strange(folder: Path) -> str | None:
    """The first thing in a folder that a stage's files would be mixed with; logs and hidden files are in no way, nor is
    what is left of a stage that was killed while it wrote its first file."""
    for path in sorted(folder.iterdir()):
        harmless = path.name.startswith(".") or path.name == "README.md" or path.suffix in LOGS
        empty = path.is_dir() and all(inside.name.endswith(PARTIAL) for inside in path.iterdir())
        if not harmless and not empty:
            return path.name
    return None


class Resume:
    """How a run of `identity` begins in `output_dir`, which this process has for itself.

    checkpoint  the one to go on from; None: from the beginning
    seconds     spent up to the checkpoint

    Looking changes nothing; `begin` does. Where `fresh` is not set, raises UserError if an earlier run is in the way,
    and NothingToDo if it is this very run, and finished.
    """

    def __init__(self, output_dir: Path, identity: dict[str, Any], fresh: bool, say: Callable[[str], None]) -> None:
        self.output_dir, self.identity, self.fresh, self.say = output_dir, identity, fresh, say
        self.checkpoints, self.metrics_file = output_dir / "checkpoints", output_dir / METRICS
        self.checkpoint: Path | None = None
        self.aside, self.seconds = "", 0.0  # why the folder has to make room
        earlier = Earlier.of(output_dir)
        if earlier is None:
            return
        goes_on = not earlier.finished and (self.checkpoints / FRESH).exists() and earlier.identity == identity
        if fresh and not goes_on:  # the same command again, after a kill, goes on with what it began anew
            self.aside = "begins anew, as --fresh says"
        elif earlier.finished:
            self._look_at_finished(earlier)
        else:
            self._look_at_unfinished(earlier)

    def _look_at_finished(self, earlier: Earlier) -> None:
        if earlier.identity is None:
            raise UserError(f"{self.output_dir / RECORD} is damaged; {ANEW}, or choose another output_dir")
        if changed := differences(earlier.identity, self.identity):
            self.aside = f"was finished with other settings or inputs ({'; '.join(changed)})"
            return
        if name := changed_output(self.output_dir, earlier.outputs, earlier.outputs, {}):
            raise UserError(
                f"{self.output_dir} is finished, but {name} is gone or not as it was left; {ANEW}, or delete its line "
                f'under "outputs" in {self.output_dir / RECORD}'
            )
        with contextlib.suppress(OSError):
            (self.output_dir / RECORD).touch()  # so that make takes it for newer than what it was made of
        raise NothingToDo(f"{self.output_dir} is finished already with these settings and inputs; {ANEW}")

    def _look_at_unfinished(self, earlier: Earlier) -> None:
        if earlier.identity is None:
            raise UserError(
                f"{self.output_dir} was begun by a run that does not say with which settings; {ANEW}, or choose "
                "another output_dir"
            )
        if changed := differences(earlier.identity, self.identity):
            raise UserError(
                f"the run that was begun in {self.output_dir} cannot go on, as it began otherwise: "
                f"{'; '.join(changed)}. Give it what it had, or choose another output_dir; {ANEW}"
            )
        self.checkpoint = latest_checkpoint(self.checkpoints, self.say, self.identity)
        if self.checkpoint:
            self.seconds = _seconds_of(self.checkpoint / METRICS)
        elif any(is_sealed(path) for path in by_step(self.checkpoints)):
            self.aside = "has no checkpoint that can be used"

    def begin(self) -> None:
        """Make `output_dir` ready to be written. Killed at any place in here, the folder is known as the stage's."""
        if self.aside:
            moved = move_aside(self.output_dir)
            self.say(f"{self.output_dir} {self.aside}: it is kept as {moved}")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.checkpoints / IDENTITY, self.identity)
        if self.fresh:
            (self.checkpoints / FRESH).touch()
        for path in half_written(self.checkpoints):
            if path.name.startswith("partial-"):  # of the others, latest_checkpoint has told
                self.say(f"checkpoint {path} is removed: it was cut off while it was written")
            remove(path)
        for path in self.output_dir.glob(f"*{PARTIAL}"):
            remove(path)
        self._take_metrics()

    def _take_metrics(self) -> None:
        """Put metrics.jsonl back to what it was at the checkpoint: the lines that follow are written again."""
        kept = b""
        with contextlib.suppress(FileNotFoundError):
            kept = (self.checkpoint / METRICS).read_bytes() if self.checkpoint else b""
        if not self.metrics_file.exists() or self.metrics_file.read_bytes() != kept:
            with replacing(self.metrics_file) as stream:
                stream.write(kept.decode("utf-8"))


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free `<folder>.old-<n>` and make an empty one in its place, locked as before.

    Where `folder` is a link, what it leads to is moved, so that the link leads to the new one. Raises UserError where
    it cannot be moved.
    """
    place = folder.resolve()
    number = 1
    while (aside := place.with_name(f"{place.name}.old-{number}")).exists():
        number += 1
    try:
        place.rename(aside)
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be moved aside ({error.strerror}); move it, or choose another output_dir"
        ) from None
    hold(folder)
    (aside / LOCK).unlink(missing_ok=True)
    return aside if folder.is_absolute() or folder.is_symlink() else folder.with_name(aside.name)


def remove(path: Path) -> None:
    """Remove what was only half written. Raises UserError where that cannot be."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed ({error.strerror}); remove it, then start again") from None


def _seconds_of(metrics: Path) -> float:
    """The time in the last line of metrics; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        return float(json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["time"])
    return 0.0
