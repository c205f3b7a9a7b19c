"""Checkpoints that are either complete and verified, or not there; and files that are never half written.

A checkpoint is a folder `<name>-<step>` with a manifest of sha256 sums, written last. A folder without a manifest was
cut off while it was written; one that is not exactly what its manifest says was damaged. Both are passed over, and the
one before is used. In a stage's folder each checkpoint also holds the identity and the metrics of its run up to then,
so that nothing else is needed to go on from it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.identity import differences

MANIFEST, IDENTITY, METRICS = "manifest.json", "identity.json", "metrics.jsonl"
PARTIAL = ".partial"
# What must be in a file for transformers' Trainer to go on from it; without some of it, it starts anew in silence.
NEEDED = {
    "trainer_state.json": {"global_step", "log_history"},
    "optimizer.pt": {"state", "param_groups"},
    "scheduler.pt": {"last_epoch"},
    "rng_state.pth": {"python", "numpy", "cpu"},
}


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file to write beside `path`, which is renamed into its place at the end: a reader never sees half of it.

    Where the writing fails, `path` stays as it was and nothing is left beside it.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # for the sentence that is made of it
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON object a line, all of them or none."""
    with replacing(path) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def move_into(beside: Path, folder: Path) -> None:
    """Move all that is in the folder `beside` into `folder`, over what has the same name there."""
    for path in sorted(beside.iterdir()):
        place = folder / path.name
        if place.is_dir():
            shutil.rmtree(place)
        path.replace(place)
    beside.rmdir()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Make `folder/step-<step>` with what `write(path)` puts into it, then remove all but the newest `keep`.

    Later steps that are there already are damaged ones, which the run did not go on from: they are set aside first, or
    they would be taken for the newest. Where the writing fails, what there was of it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside, final = folder / f"partial-{step:08d}", folder / f"step-{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(exist_ok=True)
    try:
        write(beside)
        seal(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    for unused in (checkpoint for checkpoint in by_step(folder) if step_of(checkpoint) > step):
        set_aside(unused)
    prune(folder, step, keep)
    return final


def prune(folder: Path, step: int, keep: int = 2) -> None:
    """Remove all checkpoints up to `step` but the newest `keep`: after one was written, and before a run goes on from
    one, as a kill may have come in between."""
    for old in [checkpoint for checkpoint in by_step(folder) if step_of(checkpoint) <= step][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that was passed over to `unused-<n>-<name>`: what is in it may be of use to its owner."""
    number = 1
    while (aside := checkpoint.with_name(f"unused-{number}-{checkpoint.name}")).exists():
        number += 1
    checkpoint.rename(aside)


def seal(checkpoint: Path) -> None:
    """Write the manifest that marks `checkpoint` as complete, after the identity and the metrics of its stage."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    if (checkpoint.parent / IDENTITY).is_file():
        for record in (checkpoint.parent / IDENTITY, checkpoint.parent.parent / METRICS):
            if record.is_file():
                shutil.copyfile(record, checkpoint / record.name)
    write_json(checkpoint / MANIFEST, {str(p.relative_to(checkpoint)): sha256_of(p) for p in _files_of(checkpoint)})


def is_sealed(checkpoint: Path) -> bool:
    """Whether `checkpoint` was written to its end; it may be damaged all the same."""
    return (checkpoint / MANIFEST).is_file()


def half_written(folder: Path) -> list[Path]:
    """What a kill left of checkpoints that were being written to `folder`."""
    return [*folder.glob("partial-*"), *(path for path in by_step(folder) if not is_sealed(path))]


def _files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint but its manifest and those that a system leaves of its own."""
    files = (p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith((".DS_Store", ".nfs")))
    return sorted(p for p in files if p != checkpoint / MANIFEST)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with `checkpoint`, or None if it is complete, undamaged, and what it holds can be opened."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was cut off while it was written"
    except (OSError, ValueError):
        return "its manifest is damaged"
    if not isinstance(sums, dict) or not sums:
        return "its manifest is damaged"
    try:
        there = {str(path.relative_to(checkpoint)): path for path in _files_of(checkpoint)}
        for name in dict.fromkeys([*sums, *there]):
            if name not in there:
                return f"{name} is missing"
            if name not in sums:
                return f"{name} is not in its manifest"
            if sha256_of(there[name]) != sums[name]:
                return f"{name} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    # The sums of a checkpoint of rubbish fit, too.
    faults = (_content_fault(path) for path in there.values() if path.parent == checkpoint)
    return next(filter(None, faults), None) or _trainer_fault(list(there))


def _content_fault(file: Path) -> str | None:
    """What is wrong with what is in a file; of tensors only the names are read."""
    # Here, as who reads no more than manifests needs neither of them
    import torch
    from safetensors import safe_open
    from transformers.trainer_pt_utils import safe_globals

    content: Any = None
    try:
        if file.suffix in (".pt", ".pth"):
            with safe_globals():  # as the Trainer opens its own
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except Exception:  # whatever a file of rubbish raises; what torch says advises to open it unsafely
        return f"{file.name} cannot be read"
    needed = NEEDED.get("rng_state.pth" if file.name.startswith("rng_state") else file.name)
    if needed and not (isinstance(content, dict) and needed <= content.keys()):
        return f"{file.name} lacks {', '.join(sorted(needed))}"
    return None


def _trainer_fault(names: list[str]) -> str | None:
    """What a checkpoint of transformers' Trainer lacks, which would train on without it; of any other, nothing."""
    if "trainer_state.json" not in names:
        return None
    # global_step…: DeepSpeed's own folder
    parts = {"optimizer": ("global_step",), "scheduler": ("global_step",), "rng_state": ()}
    for part, others in parts.items():
        if not any(name.startswith((part, *others)) for name in names):
            return f"its {part} is missing"
    return None


def latest_checkpoint(
    folder: Path, warn: Callable[[str], None] = print, identity: dict[str, Any] | None = None
) -> Path | None:
    """The newest checkpoint in `folder` that verifies and is of `identity`, or None; `warn` gets a sentence for each
    one passed over. Without an identity, of any."""
    for checkpoint in by_step(folder):
        fault = fault_of(checkpoint) or (identity and _foreign(checkpoint, identity))
        if fault is None:
            return checkpoint
        warn(f"checkpoint {checkpoint} is not used: {fault}")
    return None


def _foreign(checkpoint: Path, identity: dict[str, Any]) -> str | None:
    then = read_object(checkpoint / IDENTITY)
    if then is None:
        return "it does not say with which settings it was written"
    changed = differences(then, identity)
    return f"it was written with other settings ({'; '.join(changed)})" if changed else None


def read_object(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none to be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def by_step(folder: Path) -> list[Path]:
    """`step-…` (ours) and `checkpoint-…` (transformers' Trainer), newest first."""
    found = [path for name in ("step-*", "checkpoint-*") for path in folder.glob(name) if path.is_dir()]
    # Not checkpoint-old-3, which is somebody's copy
    return sorted((path for path in found if path.name.split("-", 1)[1].isdecimal()), key=step_of, reverse=True)
