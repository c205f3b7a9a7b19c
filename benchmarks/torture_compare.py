"""Whether two folders hold the same to the bit, times left out; for `make torture`."""

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint import MANIFEST, fault_of
from pipeline.trackers import FOLDER as TRACKERS

# What is measured with a clock, or tells how fast a machine was; in no file is anything else left out.
TIMES = {"time", "started", "seconds", "seconds_left", "tokens_per_s", "episodes_per_s", "mfu", "memory_mb"}
TIMES |= {f"time/{part}" for part in ("sample", "score", "logprobs", "reference", "critic", "update")}
TIMES |= {f"{what}_runtime" for what in ("eval", "train")}
TIMES |= {f"{what}_{unit}_per_second" for what in ("eval", "train") for unit in ("samples", "steps", "tokens")}
# A lock, empty or with a process's number; and the Trainer's pickle of its settings, which stage.json has. What
# trackers keep, in a folder of its own, is full of times and random names.
IGNORED = {".lock", "training_args.bin"}


def compare(expected: Path, found: Path) -> tuple[int, list[str]]:
    """How many files were compared, and a sentence for each that is missing, left over or different."""
    names, there = (
        {
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and p.name not in IGNORED and TRACKERS not in p.relative_to(folder).parts
        }
        for folder in (expected, found)
    )
    said = []
    for name in sorted(names & there, key=lambda name: (name.count("/"), name)):  # what tells most comes first
        if (expected / name).read_bytes() != (found / name).read_bytes():
            try:
                where = difference(content_of(expected / name), content_of(found / name))
            except (ValueError, RuntimeError) as error:
                where = f" cannot be read ({error})"
            said += [f"{name}{where}"] if where else []
    said += [f"{name} is missing" for name in sorted(names - there)]
    said += [f"{name} is left over" for name in sorted(there - names)]
    return len(names), said


def content_of(file: Path) -> Any:
    """What is in a file, so that times can be left out; of a manifest the names, and whether the sums fit."""
    if file.name == MANIFEST:
        return [sorted(json.loads(file.read_text())), fault_of(file.parent)]
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if file.suffix in (".pt", ".pth"):
        import torch  # after the threads are limited

        return torch.load(file, map_location="cpu", weights_only=True)
    if file.name == "README.md":  # TRL's card names tags in the order of a set, another in each interpreter
        return sorted(file.read_text().splitlines())
    return file.read_bytes()


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place at which two contents differ, times left out, with both values; None if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({key: value for key, value in each.items() if key not in TIMES} for each in (a, b))
        if list(a) != list(b):
            return f"{where}: other fields: {', '.join(map(str, a.keys() ^ b.keys())) or 'their order'}"
        parts: list[tuple[Any, Any, Any]] = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} entries became {len(b)}"
        parts = [(i + 1, *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    elif hasattr(a, "numpy") and hasattr(b, "numpy"):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return None if same else f"{where}: another tensor"
    elif isinstance(a, bytes):
        return None if a == b else ": other bytes"
    else:
        return None if repr(a) == repr(b) else f"{where}: {a!r:.60} became {b!r:.60}"
    return next((found for key, x, y in parts if (found := difference(x, y, f"{where} {key}"))), None)
