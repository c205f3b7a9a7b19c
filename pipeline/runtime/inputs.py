"""What a stage reads: its fingerprint, and whether it is what the stage before it left there."""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.chain import make_words
from pipeline.checkpoint import IDENTITY, MANIFEST, METRICS, PARTIAL, fault_of, read_object, sha256_of
from pipeline.errors import UserError
from pipeline.identity import is_within
from pipeline.text.sources import find_sources, is_local
from pipeline.text.tokenizer import ADAPTER, base_of_adapter
from pipeline.trackers import FOLDER as TRACKERS

HASHED_WHOLE = 4 * 2**30  # bytes
RECORD = "stage.json"
# What a stage leaves beside the model: when and how it was made does not change what it is.
RECORDS = {RECORD, METRICS, "README.md", "training_args.bin"}
LOGS = {".log", ".out", ".err"}  # of a shell or a cluster, which may write on


def is_content(file: Path) -> bool:
    """Whether a file, named from the folder that is looked at, is part of what is in it: no record, no log, nothing
    hidden or half written."""
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in RECORDS and file.suffix not in LOGS | {PARTIAL}


def content_of(folder: Path, deep: bool = True) -> list[Path]:
    """The files of a folder that count, without `deep` those directly in it; a stage's checkpoints and trackers
    do not count."""
    found = (p for p in (folder.rglob("*") if deep else folder.iterdir()) if p.is_file())
    files = sorted(p for p in found if is_content(p.relative_to(folder)))
    beside = {folder / "checkpoints", folder / TRACKERS}
    return [p for p in files if beside.isdisjoint(p.parents) or not is_of_a_stage(folder)]


def is_of_a_stage(folder: Path) -> bool:
    """Whether a stage has begun to write `folder`."""
    checkpoints = folder / "checkpoints"
    begun = (checkpoints / IDENTITY).exists() or any(checkpoints.glob(f"*-*/{IDENTITY}"))
    return (folder / RECORD).exists() or begun


def outputs_of(folder: Path) -> dict[str, str | None]:
    """sha256 of each file that a stage leaves, for its record; None for one that is too large to read each time."""
    files = content_of(folder)
    small = {file: file.stat().st_size <= HASHED_WHOLE for file in files}
    return {file.relative_to(folder).as_posix(): sha256_of(file) if small[file] else None for file in files}


def fingerprint(stage: str, key: str, path: str, run_dir: str) -> dict[str, str]:
    """sha256 over the files of an input, of a data set those in its folders too; a hub name is its own fingerprint.

    `key` says what `stage` reads it for. Raises UserError where nothing is there, or no more than half of it, or
    something else than the stage that made it left there.
    """
    of_this_run = is_within(path, run_dir)
    if not is_local(path) and not of_this_run:
        return {"path": path, "sha256": "hub"}
    place = Path(path).expanduser()
    if not place.exists():
        if key == "dataset" and not of_this_run:
            find_sources(path)  # raises with the nearest names
        hint = f"run `{make_words(place.name, run_dir)}` first" if of_this_run else "check the path"
        raise UserError(f"{stage}: {key} {path} does not exist; {hint}")
    begun = is_of_a_stage(place) or (of_this_run and (place / "checkpoints").is_dir())
    if begun and not (place / RECORD).exists():
        hint = (
            f"run `{make_words(place.name, run_dir)}` first"
            if of_this_run
            else "let the stage that writes it end first"
        )
        raise UserError(f"{stage}: {key} {path} is not complete; {hint}")
    try:
        files = [place] if place.is_file() else content_of(place, deep=key == "dataset")
        sums = {file: _sha256_of(file) for file in files}
        if not files:
            if key == "dataset":
                find_sources(path)  # raises with what is there instead
            raise UserError(f"{stage}: {key} {path} is an empty folder")
        check_as_left(f"{stage}: {key} {path}", place, sums)
    except OSError as error:
        raise UserError(f"{stage}: {key} {path}: {error.filename} cannot be read ({error.strerror})") from None
    if place.is_file():
        return {"path": path, "sha256": sums[place]}
    lines = "".join(f"{file.relative_to(place)} {sha256}\n" for file, sha256 in sums.items())
    if (place / ADAPTER).is_file():  # it works on the model that it belongs to
        lines += fingerprint(stage, f"the model of the adapter {path}:", base_of_adapter(path), run_dir)["sha256"]
    return {"path": path, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def code_of(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Fingerprints of the Python files behind settings of the form `module:function` (rewards, judges, labellers).

    A package counts with all that is in it. A module that is not found is left to who wants to call it.
    """
    listed = (value if isinstance(value, list) else [value] for value in settings.values())
    names = {name for values in listed for value in values if isinstance(value, str) for name in value.split(",")}
    found = {}
    for name in sorted(name for name in names if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)):
        with contextlib.suppress(Exception, SystemExit):  # of a package of the user's: load_function tells of it
            spec = importlib.util.find_spec(name.partition(":")[0])
            if spec and spec.origin and Path(spec.origin).suffix == ".py":
                file = Path(spec.origin)
                files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
                sums = "".join(f"{each.relative_to(file.parent)} {sha256_of(each)}\n" for each in files)
                found[name] = {"path": name, "sha256": hashlib.sha256(sums.encode()).hexdigest()}
    return found


def check_as_left(what: str, place: Path, sums: dict[Path, str]) -> None:
    """Raise UserError, which begins with `what`, where a file at `place` is not as the stage that made it left it.

    `sums` are sha256 of the files read. The record is that of `place` or of a folder above (`ppo/best`); what has none,
    as a model from elsewhere, is taken as it is. Of a checkpoint its manifest is the record.
    """
    if place.parent.name == "checkpoints" and (place / MANIFEST).exists() and (fault := fault_of(place)):
        raise UserError(f"{what} is a damaged checkpoint: {fault}; give another one")
    folder = next((above for above in (place, *place.parents[:2]) if (above / RECORD).is_file()), None)
    record = read_object(folder / RECORD) if folder else {}
    if record is None:
        raise UserError(f"{what}: {folder}/{RECORD} is damaged; make the folder anew (`--fresh True`)")
    if folder and "stage" not in record:
        raise UserError(f"{what}: {folder}/{RECORD} is no record of a stage; make the folder anew (`--fresh True`)")
    outputs = record.get("outputs")
    if folder is None or not isinstance(outputs, dict):
        return
    if place.name == RECORD:  # the report, which reads what stands beside it
        beside = (folder / name for name in outputs if "/" not in name and name.endswith((".json", ".jsonl")))
        sums = {file: sha256_of(file) for file in beside if file.is_file()}
    names = [name for name in outputs if (folder / name) in sums or (folder / name).parent == place]
    if name := changed_output(folder, outputs, names, sums):
        maker = record.get("stage")
        raise UserError(
            f"{what}: {folder / name} is not as stages.{maker} left it; make it anew (`--fresh True`), or, if it was "
            f'changed on purpose, delete its line under "outputs" in {folder / RECORD}'
        )


def changed_output(folder: Path, outputs: Any, names: Iterable[str], sums: dict[Path, str]) -> str | None:
    """The first of `names` among a record's `outputs` that is gone or has another sha256 now; None if none has."""
    for name in names:
        file = folder / name
        if not file.is_file() or outputs[name] not in (None, sums.get(file) or sha256_of(file)):
            return name
    return None


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
