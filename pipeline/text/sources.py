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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import load_dataset

from pipeline.errors import UserError
from reward_data.formats import Row
from reward_data.generators import GENERATORS, Split

END_OF_TEXT = "<|endoftext|>"
DOWNLOADS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
LONGEST_DOCUMENT = 2**26  # characters of a text file that is streamed within which the first document should end
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
    "preferences": ("preferences",),
    "ppo": ("ppo",),
}
HUB_HINTS = {"preferences": "prefs", "instructions": "sft", "prompts": "gen"}  # UltraFeedback: train_prefs, train_sft

# A name, and a function that reads the rows when they are wanted. The name may tell a split.
Source = tuple[str, Callable[[], Iterable[Row]]]


def is_local(name: str) -> bool:
    """Whether `name` means a place on this machine: anything but `owner/name` of which no folder `owner` is here."""
    path = Path(name).expanduser()
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not name.startswith(".")
    return not on_the_hub or path.exists() or Path(path.parts[0]).exists()


def find_sources(dataset: str, streaming: bool = False) -> list[Source]:
    """The files or hub splits behind `dataset`; with `streaming`, nothing is downloaded or held as a whole, and a text
    file has to hold more than one document. Raises UserError where there are none."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [("", partial(_read, path, separated=streaming))]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
        if not files:
            raise UserError(f"dataset: the folder {dataset} holds no data files ({', '.join(SUFFIXES)})")
        if all(_suffix(file) == ".parquet" for file in files):  # laid out as a hub repository
            return _hub(dataset, streaming)
        return [(file.name.split(".")[0], partial(_read, file)) for file in files]
    if not is_local(dataset) and _suffix(path) not in SUFFIXES:
        return _hub(dataset, streaming)
    near = [*GENERATORS, *map(str, path.parent.glob("*"))]
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
    return [(split if len(splits) > 1 else "", partial(splits.__getitem__, split)) for split in splits]


def choose(dataset: str, split: Split, kind: str, streaming: bool = False) -> tuple[bool, list[Source]]:
    """The sources of `split`, and whether their names said so (if not, it is still to be cut out of them).

    Their names are then those that a message to the user gives them. Raises UserError as `find_sources` does, and where
    other splits are named but not this one.
    """
    sources = find_sources(dataset, streaming)
    by_split: dict[str | None, list[Source]] = defaultdict(list)
    for source in sources:
        by_split[_split_of(source[0])].append(source)
    named, chosen = False, by_split["train"] or sources
    if by_split["validation"] or by_split["test"]:
        stand_in = {"validation": "test", "test": "validation"}.get(split, "train")
        named, chosen = True, by_split[split] or by_split[stand_in]
        chosen = [source for source in chosen if source[0].endswith(HUB_HINTS.get(kind, " "))] or chosen
    elif split in ("preferences", "ppo") and by_split[split]:
        named, chosen = True, by_split[split]
    if not chosen:
        names = ", ".join(name for name, _ in sources)
        raise UserError(f"dataset: no file or split is named for '{split}' beside {names}")
    return named, [(f"{dataset}/{name}" if name else dataset, read) for name, read in chosen]


def _split_of(name: str) -> str | None:
    """The split that a file's or a hub split's name tells: 'train-00000-of-00002', 'test_prefs' -> train, test."""
    split_of = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    return next((split_of[word] for word in re.split(r"[-_.\s]", name.lower()) if word in split_of), None)


# ---- files ----------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    """The suffix that tells the kind of file, without .gz or .bz2."""
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix.lower()


def _read(path: Path, separated: bool = False) -> Iterator[Row]:
    """Rows of a data file; a text file has one row a document, under `text`. Raises UserError with file and row."""
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".txt": partial(_txt_rows, separated=separated),
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if _suffix(path) not in readers:
        raise UserError(f"dataset: {path} is no known kind of data file (known: {', '.join(SUFFIXES)}, or .gz)")
    empty = True
    try:
        for row in readers[_suffix(path)](path):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"dataset: {path} cannot be read as {_suffix(path)[1:]}: {one_line(error)}") from None
    if empty:
        raise UserError(f"dataset: {path} is empty")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends included."""
    number, start = 0, 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                start += len(raw)
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {start + error.start}"
        raise UserError(f"dataset: {path} is not UTF-8 text ({where}); save it as UTF-8") from None


def _txt_rows(path: Path, separated: bool) -> Iterator[Row]:
    """Documents between marks, without the blanks around them; a file without a mark is one document, as it is, or an
    error if it should be `separated`: nothing of one document can be held out while it is streamed."""
    parts: list[str] = []
    marked, size = False, 0
    for line in _lines(path):
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            if document := "".join([*parts, end]).strip():
                yield {"text": document}
            parts = []
        parts.append(rest)
        marked, size = marked or bool(ends), size + len(line)
        if separated and not marked and size > LONGEST_DOCUMENT:
            break
    document = "".join(parts)
    if not document.strip():
        return
    if separated and not marked:
        raise UserError(
            f"dataset: {path} has no {END_OF_TEXT} between documents, so it is one document and cannot be streamed; "
            "separate its documents, or set streaming: false"
        )
    yield {"text": document.strip() if marked else document}


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"dataset: {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} should be a JSON object with named fields, but is {type(row).__name__}")
        yield row


def _json_rows(path: Path) -> Iterable[Row]:
    """A list of objects; a file of one object a line that is merely named .json is read as well."""
    text = "".join(_lines(path))
    if text.lstrip().startswith("{") and "\n{" in text.strip():
        return _jsonl_rows(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {path} is not valid JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"dataset: {path} should hold a JSON list of objects, one a row")
    return rows


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for number, row in enumerate(csv.DictReader(_lines(path)), start=1):
        if None in row or None in row.values():
            raise UserError(f"dataset: {path}, row {number} has more or fewer fields than the header")
        yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
        yield from batch.to_pylist()


def one_line(error: Exception) -> str:
    """An exception's text, short and on one line."""
    return " ".join(str(error).split())[:300]
