"""Where rows come from: a file, a folder of files, or the hub; which of them belong to a split.

Nothing here knows what the columns mean. Every failure is a UserError that names the file and the row.
"""

import bz2
import csv
import difflib
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet
from datasets import load_dataset

from pipeline.errors import UserError

GENERATORS = {"stories": "reward_data.stories", "reviews": "reward_data.reviews"}
END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test", "preferences": "preferences", "ppo": "ppo",
}  # fmt: skip
HUB_HINTS = {"preferences": "prefs", "instructions": "sft", "prompts": "gen"}  # UltraFeedback: train_prefs, train_sft

Split = Literal["train", "validation", "test", "preferences", "ppo"]
Row = dict[str, Any]
# One source is a name that may tell a split, and a function that reads its rows when they are wanted.
Source = tuple[str, Callable[[], Iterable[Row]]]


def is_local(name: str) -> bool:
    """Whether `name` means a place on this machine: anything but `owner/name` of which no folder `owner` is here."""
    path = Path(name).expanduser()
    in_a_folder = bool(path.parts) and Path(path.parts[0]).exists()
    return path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) != 2 or in_a_folder


def find_sources(dataset: str) -> list[Source]:
    """The files or hub splits behind `dataset`. Raises UserError where there are none."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [("", lambda: _read(path))]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
        if not files:
            raise UserError(f"dataset: the folder {dataset} holds no data files ({', '.join(SUFFIXES)})")
        if all(_suffix(file) == ".parquet" for file in files):  # laid out as a hub repository
            return _hub(dataset)
        return [(file.name.split(".")[0], lambda file=file: _read(file)) for file in files]
    in_a_folder = Path(path.parts[0]).exists() if path.parts else False
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset) and _suffix(path) not in SUFFIXES and not in_a_folder:
        return _hub(dataset)
    near = [*GENERATORS, *(str(other) for other in path.parent.iterdir())] if path.parent.is_dir() else [*GENERATORS]
    closest = difflib.get_close_matches(str(path), near, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(closest)}?" if closest else ""
    raise UserError(f"dataset: there is no file, folder or generator {dataset}{hint}")


def _hub(name: str) -> list[Source]:
    """The splits of a hub data set, or of a local folder laid out as one."""
    repository, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        splits = load_dataset(repository, config or None)
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean: it could not be had
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"dataset: {name} is no local file and cannot be had from the hub ({why})") from None
    if not sum(splits.num_rows.values()):
        raise UserError(f"dataset: {name} is empty")
    # load_dataset calls the only split "train" where nothing names one: then it is not taken at its word.
    return [(only if len(splits) > 1 else "", lambda only=only: splits[only]) for only in splits]


def choose(sources: list[Source], split: Split, kind: str) -> tuple[bool, list[Source]]:
    """The sources of `split`, and whether their names said so (if not, it is still to be cut out of them)."""
    told = [(_split_of(name), (name, read)) for name, read in sources]
    if not any(label in ("validation", "test") for label, _ in told):
        training = [source for label, source in told if label == split] if split in ("preferences", "ppo") else []
        return bool(training), training or [s for label, s in told if label == "train"] or sources
    wanted = [split, {"validation": "test", "test": "validation"}.get(split, "train")]
    for label in wanted:
        found = [source for own, source in told if own == label]
        hinted = [source for source in found if source[0].endswith(HUB_HINTS.get(kind, " "))]
        if found:
            return True, hinted or found
    raise UserError(f"dataset: no file or split is named for '{split}' beside {', '.join(name for name, _ in sources)}")


def _split_of(name: str) -> str | None:
    """The split that a file's or a hub split's name tells: 'train-00000-of-00002', 'test_prefs' -> train, test."""
    return next((SPLIT_WORDS[word] for word in re.split(r"[-_.\s]", name.lower()) if word in SPLIT_WORDS), None)


# ---- files ----------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    """The suffix that tells the kind of file, without .gz or .bz2."""
    return (path.with_suffix("") if path.suffix in (".gz", ".bz2") else path).suffix.lower()


def _read(path: Path) -> list[Row]:
    """Rows of a data file; a text file has one row a document, under `text`. Raises UserError with file and row."""
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"dataset: {path} is no known kind of data file (known: {', '.join(SUFFIXES)}, or .gz)")
    if suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"dataset: {path} cannot be read as parquet: {one_line(error)}") from None
    else:
        text = _text(path)
        readers = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
        rows = list(readers[suffix](text, path)) if text.strip() else []
    if not rows:
        raise UserError(f"dataset: {path} is empty")
    return rows


def _text(path: Path) -> str:
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            raw = stream.read()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        where = f"line {line}, byte {error.start}"
        raise UserError(f"dataset: {path} is not UTF-8 text ({where}); save it as UTF-8") from None
    except (OSError, EOFError) as error:
        raise UserError(f"dataset: {path} cannot be read: {one_line(error)}") from None


def _txt_rows(text: str, path: Path) -> Iterator[Row]:
    if END_OF_TEXT not in text:
        yield {"text": text}
        return
    yield from ({"text": part.strip()} for part in text.split(END_OF_TEXT) if part.strip())


def _jsonl_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(line, f"{path}, line {number}")


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    """A list of objects; a file of one object a line that is merely named .json is read as well."""
    if text.lstrip().startswith("{") and "\n{" in text.strip():
        return _jsonl_rows(text, path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {path} is not valid JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"dataset: {path} should hold a JSON list of objects, one a row")
    return iter(rows)


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {where} is not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f"dataset: {where} should be a JSON object with named fields, but is {type(row).__name__}")
    return row


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1):
        if None in row or None in row.values():
            raise UserError(f"dataset: {path}, row {number} has more or fewer fields than the header")
        yield row


def one_line(error: Exception) -> str:
    """An exception's text, short and on one line."""
    return " ".join(str(error).split())[:300]
