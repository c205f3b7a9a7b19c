"""What makes two runs the same one, which checkpoint a run goes on from, and room for one that starts anew."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import latest_checkpoint, sha256_of, step_of, write_json
from pipeline.errors import UserError
from pipeline.runtime.arguments import StageArguments, replace_text
from pipeline.text.sources import find_sources, is_local

# What may change between two parts of a run: it is shown or kept otherwise, but computed the same.
COSMETIC_FIELDS = {"logging_steps", "save_steps", "run_dir", "output_dir", "preset", "show"}
LEFT_BY_PPO = ("best", "ema", "adapter", "critic", "value_head.safetensors")  # what not every run writes again
HASHED_WHOLE = 4 * 2**30  # bytes
# What a stage leaves beside the model: when and how it was made does not change what it is.
RECORDS = {"stage.json", "metrics.jsonl", "README.md", "training_args.bin"}


def identity_of(args: StageArguments, inputs: dict[str, dict[str, str]], processes: int) -> dict[str, Any]:
    """What must be the same for a run to go on, whatever its folder is now called: settings, inputs, processes."""
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in COSMETIC_FIELDS}
    config = {k: replace_text(v, args.run_dir, "{run_dir}") for k, v in settings.items()}
    return {"config": config, "inputs": {k: v["sha256"] for k, v in inputs.items()}, "processes": processes}


def fingerprint(stage: str, key: str, path: str, run_dir: str) -> dict[str, str]:
    """sha256 over the files of an input, of a data set those in its folders too; a hub name is its own fingerprint.

    `key` says what `stage` reads it for. Raises UserError where nothing is there, or no more than half of it.
    """
    of_this_run = path.startswith(run_dir)
    if not is_local(path) and not of_this_run:
        return {"path": path, "sha256": "hub"}
    place = Path(path).expanduser()
    if not place.exists():
        if key == "dataset" and not of_this_run:
            find_sources(path)  # raises with the nearest names
        hint = f"run `make {place.name}` first" if of_this_run else "check the path"
        raise UserError(f"{stage}: {key} {path} does not exist; {hint}")
    if place.is_file():
        return {"path": path, "sha256": _sha256_of(place)}
    if of_this_run and (place / "checkpoints").is_dir() and not (place / "stage.json").exists():
        raise UserError(f"{stage}: {key} {path} is not complete; run `make {place.name}` first")
    inside = place.rglob("*") if key == "dataset" else place.iterdir()
    files = sorted(p for p in inside if p.is_file() and p.name not in RECORDS)
    if not files:
        raise UserError(f"{stage}: {key} {path} is an empty folder")
    lines = "".join(f"{file.relative_to(place)} {_sha256_of(file)}\n" for file in files)
    return {"path": path, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


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


class Resume:
    """What an earlier run of the same stage left in `output_dir`.

    `checkpoint` is the one to go on from; None where there is none of this identity, or the run is finished. Looking
    changes nothing; `go_on` or `make_room` does. Raises UserError for a folder that holds somebody else's `checkpoints`
    or `metrics.jsonl`.
    """

    def __init__(self, stage: str, output_dir: Path, identity: dict[str, Any], say: Callable[[str], None]) -> None:
        self.output_dir, self.identity, self.say = output_dir, identity, say
        self.checkpoints, self.metrics_file = output_dir / "checkpoints", output_dir / "metrics.jsonl"
        self.identity_file = self.checkpoints / "identity.json"
        finished, begun = (output_dir / "stage.json").exists(), self.identity_file.exists()
        self.ours = finished or begun
        if not self.ours and (any(self.checkpoints.glob("*")) or self.metrics_file.exists()):
            raise UserError(
                f"{output_dir} has checkpoints or a metrics.jsonl that no stage wrote, and {stage} would remove them; "
                "choose another output_dir"
            )
        same = begun and json.loads(self.identity_file.read_text(encoding="utf-8")) == identity
        self.changed = begun and not finished and not same and any(self.checkpoints.glob("*-*"))
        self.checkpoint = latest_checkpoint(self.checkpoints, say) if same and not finished else None

    def go_on(self, checkpoint: Path) -> float:
        """Forget the lines of metrics that will be written again; seconds that were spent up to the checkpoint."""
        self.say(f"going on from {checkpoint}")
        kept, seconds = [], 0.0
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line may have been cut off by the kill
                row = json.loads(line)
                if row.get("step", 0) <= step_of(checkpoint):
                    kept.append(line + "\n")
                    seconds = row.get("time", 0.0)
        self.metrics_file.write_text("".join(kept), encoding="utf-8")
        return seconds

    def make_room(self) -> None:
        """Remove what an earlier run left. Killed at any place in here, the folder is still known as ours."""
        if self.changed:
            self.say("the settings or inputs changed since the last checkpoint: starting from the beginning")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not self.identity_file.exists():
            write_json(self.identity_file, {})
        (self.output_dir / "stage.json").unlink(missing_ok=True)
        old = [path for path in self.checkpoints.iterdir() if path != self.identity_file]
        for path in [*old, *(self.output_dir / name for name in (LEFT_BY_PPO if self.ours else ()))]:
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
        self.metrics_file.write_text("", encoding="utf-8")
        write_json(self.identity_file, self.identity)
