"""Checkpoints that are either complete and verified, or not there.

A checkpoint is a folder `<name>-<step>` with a manifest of sha256 sums, written last. A folder without a manifest was
cut off while it was written; one whose sums do not fit was damaged. Both are passed over, and the one before is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON beside `path` and rename it into place, so that a reader never sees half of it."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Make `folder/step-<step>` with what `write(path)` puts into it, then remove all but the newest `keep`.

    Later steps that are there already are damaged ones, which the run did not go on from: they go first, or they would
    be taken for the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside, final = folder / f"partial-{step:08d}", folder / f"step-{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write(beside)
    seal(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    there = _by_step(folder)
    later = [checkpoint for checkpoint in there if step_of(checkpoint) > step]
    for old in [*later, *there[len(later) + keep :]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def seal(checkpoint: Path) -> None:
    """Write the manifest that marks `checkpoint` as complete."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    write_json(checkpoint / MANIFEST, {str(p.relative_to(checkpoint)): sha256_of(p) for p in files})


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with `checkpoint`, or None if it is complete and undamaged."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was cut off while it was written"
    except ValueError:
        return "its manifest is damaged"
    for name, sha256 in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != sha256:
            return f"{name} is damaged"
    return None


def latest_checkpoint(folder: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None; `warn` gets a sentence for each one passed over."""
    for checkpoint in _by_step(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"checkpoint {checkpoint} is not used: {fault}")
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _by_step(folder: Path) -> list[Path]:
    """`step-…` (ours) and `checkpoint-…` (transformers' Trainer), newest first."""
    found = [p for name in ("step-*", "checkpoint-*") for p in folder.glob(name) if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of, reverse=True)
