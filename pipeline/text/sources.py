"""Where rows come from: a file, a folder of files, or the hub; which of them belong to a split.

Rows are read one after the other, so that a file may be larger than memory (but for a .json list, which is read whole).
Nothing here knows what the columns mean. Every failure is a UserError that names the file and the row.
"""

import bz2
import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet
from datasets import load_dataset

from pipeline.errors import UserError

GENERATORS = {"stories": "reward_data.stories", "reviews": "reward_data.reviews"}
END_OF_TEXT = "<|endoftext|>"
DOWNLOADS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
LONGEST_DOCUMENT = 2**26  # bytes of a text file that is streamed within which a document should end
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "preferences": "preferences",
    "ppo": "ppo",
}
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


def find_sources(dataset: str, streaming: bool = False) -> list[Source]:
    """The files or hub splits behind `dataset`; with `streaming`, nothing is downloaded or held as a whole.

    Raises UserError where there are none, or where a text file is one long document that cannot be streamed.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        if streaming:
            _check_separated(path)
        return [("", lambda: _read(path))]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
        if not files:
            raise UserError(f"dataset: the folder {dataset} holds no data files ({', '.join(SUFFIXES)})")
        if all(_suffix(file) == ".parquet" for file in files):  # laid out as a hub repository
            return _hub(dataset, streaming)
        return [(file.name.split(".")[0], lambda file=file: _read(file)) for file in files]
    in_a_folder = Path(path.parts[0]).exists() if path.parts else False
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset) and _suffix(path) not in SUFFIXES and not in_a_folder:
        return _hub(dataset, streaming)
    near = [*GENERATORS, *(str(other) for other in path.parent.iterdir())] if path.parent.is_dir() else [*GENERATORS]
    closest = difflib.get_close_matches(str(path), near, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(closest)}?" if closest else ""
    if path.name in DOWNLOADS:
        hint = f"; save {DOWNLOADS[path.name]} there, or name a text of your own (`make … TEXT=my.txt`)"
    raise UserError(f"dataset: there is no file, folder or generator {dataset}{hint}")


def _hub(name: str, streaming: bool) -> list[Source]:
    """The splits of a hub data set, or of a local folder laid out as one."""
    repository, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        splits = load_dataset(repository, config or None, streaming=streaming)
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean: it could not be had
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"dataset: {name} is no local file and cannot be had from the hub ({why})") from None
    if not streaming and not sum(splits.num_rows.values()):
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


def _read(path: Path) -> Iterator[Row]:
    """Rows of a data file; a text file has one row a document, under `text`. Raises UserError with file and row."""
    readers = {
        ".txt": _txt_rows,
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if _suffix(path) not in readers:
        raise UserError(f"dataset: {path} is no known kind of data file (known: {', '.join(SUFFIXES)}, or .gz)")
    empty = True
    for row in readers[_suffix(path)](path):
        empty = False
        yield row
    if empty:
        raise UserError(f"dataset: {path} is empty")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends included."""
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    number, start = 0, 0
    try:
        with opener(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                start += len(raw)
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {start + error.start}"
        raise UserError(f"dataset: {path} is not UTF-8 text ({where}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"dataset: {path} cannot be read: {one_line(error)}") from None


def _txt_rows(path: Path) -> Iterator[Row]:
    """Documents between marks, without the blanks around them; a file without a mark is one document, as it is."""
    parts: list[str] = []
    marked = False
    for line in _lines(path):
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            marked = True
            if document := "".join([*parts, end]).strip():
                yield {"text": document}
            parts = []
        parts.append(rest)
    document = "".join(parts)
    if document.strip():
        yield {"text": document.strip() if marked else document}


def _check_separated(path: Path) -> None:
    """Raises UserError for a text file of one document: nothing of it could be held out while it is streamed."""
    if _suffix(path) == ".txt":
        size = 0
        for line in _lines(path):
            size += len(line)
            if END_OF_TEXT in line:
                return
            if size > LONGEST_DOCUMENT:
                break
        raise UserError(
            f"dataset: {path} has no {END_OF_TEXT} between documents, so it is one document and cannot be streamed; "
            "separate its documents, or set streaming: false"
        )


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _object(line, f"{path}, line {number}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"dataset: {path} cannot be read as parquet: {one_line(error)}") from None


def _json_rows(path: Path) -> Iterable[Row]:
    """A list of objects; a file of one object a line that is merely named .json is read as well."""
    text = "".join(_lines(path))
    if text.lstrip().startswith("{") and "\n{" in text.strip():
        return _jsonl_rows(path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {path} is not valid JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"dataset: {path} should hold a JSON list of objects, one a row")
    return rows


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {where} is not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f"dataset: {where} should be a JSON object with named fields, but is {type(row).__name__}")
    return row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for number, row in enumerate(csv.DictReader(_lines(path)), start=1):
        if None in row or None in row.values():
            raise UserError(f"dataset: {path}, row {number} has more or fewer fields than the header")
        yield row


def one_line(error: Exception) -> str:
    """An exception's text, short and on one line."""
    return " ".join(str(error).split())[:300]
