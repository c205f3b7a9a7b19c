"""Where rows come from: a file, a folder of files, or the hub; which of them belong to a split.

Rows are read one after the other, so that a file may be larger than memory (but for a .json list, which is read whole).
Each comes with its place, as an editor shows it: "pairs.jsonl, line 1412". Nothing here knows what the columns mean.
Every failure is a UserError that names the file and the place.

Nothing outside a folder that is given is read: links that lead out of it are refused, and what a card (README.md) or an
index (state.json) of a data set says of other files is not followed.
"""

import bz2
import csv
import difflib
import gzip
import json
import logging
import lzma
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import load_dataset

from pipeline.errors import UserError
from pipeline.trackers import FOLDER as TRACKERS
from reward_data.formats import Row
from reward_data.generators import GENERATORS, Split

END_OF_TEXT = "<|endoftext|>"
DOWNLOADS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OTHER_KINDS = {  # of which data are often made, and what to do about them
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as .csv"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive; unpack it and name the folder"),
    **dict.fromkeys((".zst", ".lz4"), "compressed in a way that is not read here; unpack it"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz"), "a file of Python objects; save it as .jsonl"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "a database; export the table as .csv"),
    **dict.fromkeys((".feather", ".orc", ".avro"), "a table of another kind; save it as .parquet"),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".html", ".pdf", ".docx"), "a document; save its rows as .jsonl"),
}
NOT_DATA = {  # what stages, the library datasets and people leave beside data
    "stage.json",
    "metrics.jsonl",
    "identity.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "LICENSE.txt",
    "README.txt",
}
LONGEST_DOCUMENT = 2**26  # characters of a text file that is streamed within which the first document should end
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
    "preferences": ("preferences",),
    "ppo": ("ppo",),
}
SIDES = ("train", "validation", "test")
HUB_HINTS = {"preferences": "prefs", "instructions": "sft", "prompts": "gen"}  # UltraFeedback: train_prefs, train_sft
ROWS_AT_ONCE = 1000
BLANKS = re.compile(r"[ \t\n\r]*")

PlacedRow = tuple[str, Row]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A file, or a split of the hub. `name` may tell a split; messages call it `where`; `read` gives its rows, each
    with its place."""

    name: str
    where: str
    read: Callable[[], Iterable[PlacedRow]]


@dataclass
class Choice:
    """The sources of a split, whether their names said so (if not, it is still to be cut out of them), and sentences on
    what is not read."""

    named: bool
    sources: list[Source]
    notes: list[str] = field(default_factory=list)


@lru_cache
def say_once(sentence: str) -> None:
    log.warning(sentence)


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
        return [Source("", dataset, partial(_read, path, dataset, separated=streaming))]
    if path.is_dir():
        places = {file: str(PurePath(dataset) / file.relative_to(path)) for file in data_files(path)}
        return [
            Source(_bare(file.relative_to(path)), where, partial(_read, file, where)) for file, where in places.items()
        ]
    if not is_local(dataset) and _suffix(path) not in SUFFIXES:
        return _hub(dataset, streaming)
    near = [*GENERATORS, *map(str, path.parent.glob("*"))]
    closest = difflib.get_close_matches(str(path), near, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(closest)}?" if closest else ""
    if path.name in DOWNLOADS:
        hint = f"; save {DOWNLOADS[path.name]} there, or name a text of your own (`make … TEXT=my.txt`)"
    raise UserError(f"dataset: there is no file, folder or generator {dataset}{hint}")


def _hub(name: str, streaming: bool) -> list[Source]:
    """The splits of a data set on the hub."""
    repository, _, config = name.partition(":")
    try:
        splits = load_dataset(repository, config or None, streaming=streaming)
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean: it could not be had
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"dataset: {name} is no local file and cannot be had from the hub ({why})") from None
    if not streaming and not sum(splits.num_rows.values()):
        raise UserError(f"dataset: {name} is empty")
    # load_dataset calls the only split "train" where nothing names one: then it is not taken at its word.
    only = len(splits) == 1
    places = {split: name if only else f"{name}/{split}" for split in splits}
    return [
        Source("" if only else split, where, partial(_split_rows, splits, split, where))
        for split, where in places.items()
    ]


def _split_rows(splits: Any, split: str, where: str) -> Iterator[PlacedRow]:
    number = 0
    for batch in splits[split].iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{where}, row {number}", dict(zip(batch, values, strict=True))


def choose(dataset: str, split: Split, kind: str, streaming: bool = False) -> Choice:
    """The sources of `split`. Raises UserError as `find_sources` does, and where other splits are named but not this
    one."""
    sources = find_sources(dataset, streaming)
    by_split: dict[str | None, list[Source]] = defaultdict(list)
    for source in sources:
        by_split[split_of(source.name)].append(source)
    named, chosen = False, by_split["train"] or sources
    if by_split["validation"] or by_split["test"]:
        stand_in = {"validation": "test", "test": "validation"}.get(split, "train")
        named, chosen = True, by_split[split] or by_split[stand_in]
        chosen = [source for source in chosen if source.name.endswith(HUB_HINTS.get(kind, " "))] or chosen
    elif split in ("preferences", "ppo") and by_split[split]:
        named, chosen = True, by_split[split]
    if not chosen:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"dataset: no file or split is named for '{split}' beside {names}")
    left = [source.where for source in by_split[None] if source not in chosen]
    notes = [f"{_listed(left)} not read: the other names tell a split, these tell none"] if left else []
    return Choice(named, chosen, notes + _other_kinds_note(dataset))


def split_of(name: str) -> str | None:
    """The split that the name of a file, of its folders or of a hub split tells: 'train-00000-of-00002', 'test/part0',
    'test_prefs' -> train, test, test. Raises UserError where folder and file tell different ones."""
    words_of = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    told = []
    for part in reversed(name.split("/")):  # the file's own name first
        # train1, trainset, test_data2
        words = [re.sub(r"(set|data|split)?\d*$", "", word) for word in re.split(r"[-_.\s]", part.lower())]
        told += [split for split in [next((words_of[word] for word in words if word in words_of), None)] if split]
    if len(sides := {split for split in told if split in SIDES}) > 1:
        raise UserError(
            f"dataset: {name} is for {' and '.join(sorted(sides))} at once, by the names of its folder and file; "
            "rename one of them"
        )
    return told[0] if told else None


# ---- folders --------------------------------------------------------------------------------------------------------


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder and the folders below it, each once, sorted; hidden ones are no data.

    Raises UserError where there are none, for a link that leads out of the folder, and for one file that stands under
    the names of two splits.
    """
    by_place: dict[str, list[Path]] = defaultdict(list)
    for path in _visible_files(folder):
        if _suffix(path) in SUFFIXES and path.name not in NOT_DATA and _is_listed(path):
            by_place[os.path.realpath(path)].append(path)
    files = []
    for paths in by_place.values():
        splits = {split_of(_bare(path.relative_to(folder))): path for path in paths}
        if len(told := [path for split, path in splits.items() if split]) > 1:
            raise UserError(f"dataset: {told[0]} and {told[1]} are one file, under the names of two splits; remove one")
        files.append(told[0] if told else paths[0])
    if not files:
        others = [f"{path.name} is {what}" for path, what in _other_kinds(folder).items()]
        raise UserError(
            f"dataset: the folder {folder} holds no data files ({', '.join(SUFFIXES)}); "
            + (others[0] if others else "put one there, or name another folder")
        )
    return sorted(files)


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, by sorted names, those behind links included."""
    try:
        yield from _walk(folder, os.path.realpath(folder), linked=False)
    except OSError as error:
        raise UserError(f"dataset: the folder {folder} cannot be read: {error.strerror} ({error.filename})") from None


def _walk(folder: Path, root: str, linked: bool) -> Iterator[Path]:
    """A folder behind a link is entered, but not the links in it: so no circle is walked round for ever."""
    for path in sorted(folder.iterdir()):
        is_link = path.is_symlink()
        state_of_a_stage = path.name in ("checkpoints", TRACKERS) and (folder / "stage.json").exists()
        if path.name.startswith(".") or (is_link and linked) or state_of_a_stage:
            continue
        if is_link and (path.is_dir() or _suffix(path) in SUFFIXES):
            target = os.path.realpath(path)
            if not PurePath(target).is_relative_to(root):
                raise UserError(
                    f"dataset: {path} is a link out of the folder, to {target}; nothing outside the folder is read: "
                    "copy it there, or name that place"
                )
            if not os.path.exists(target):
                raise UserError(f"dataset: {path} is a link to nothing; mend or remove it")
        if path.is_dir():
            yield from _walk(path, root, linked or is_link)
        elif path.is_file():
            yield path


def _is_listed(path: Path) -> bool:
    """Whether a file is data of the folder that `Dataset.save_to_disk` wrote, which may hold caches too. Any file is
    that does not stand in such a folder."""
    return path.suffix != ".arrow" or (names := _saved_names(path.parent)) is None or path.name in names


def _saved_names(folder: Path) -> list[str] | None:
    """The names of the data files in a saved data set's index; None without an index."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"dataset: {folder}/state.json is damaged; save the data set again") from None
    if state.get("_indices_files"):
        raise UserError(f"dataset: {folder} is a saved selection of rows; call flatten_indices() and save it again")
    return names


def _bare(path: PurePath) -> str:
    """A file's path without its suffixes and the number of a shard: 'data/train_prefs-00000-of-00002.parquet' ->
    'data/train_prefs'."""
    name = path.name
    while PurePath(name).suffix.lower() in (*SUFFIXES, *OPENERS):
        name = PurePath(name).stem
    return path.with_name(re.sub(r"-\d{5}-of-\d{5}$", "", name)).as_posix()


def _other_kinds(folder: Path) -> dict[Path, str]:
    """The files of a folder that look like data of a kind that is not read, and what they are."""
    kinds = {suffix: what for suffix, what in OTHER_KINDS.items() if not what.startswith("a document")}
    return {path: kinds[_suffix(path)] for path in _visible_files(folder) if _suffix(path) in kinds}


def _other_kinds_note(dataset: str) -> list[str]:
    folder = Path(dataset).expanduser()
    others = _other_kinds(folder) if folder.is_dir() else {}
    return [f"{_listed(map(str, others))} not read: {next(iter(others.values()))}"] if others else []


def _listed(names: Iterable[str]) -> str:
    """Some names with their verb: 'a is', 'a and 3 others are'."""
    first, *rest = names
    others = "1 other" if len(rest) == 1 else f"{len(rest)} others"
    return f"{first} and {others} are" if rest else f"{first} is"


# ---- files ----------------------------------------------------------------------------------------------------------


def _suffix(path: PurePath) -> str:
    """The suffix that tells the kind of file, without that of a compression that is read."""
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def _read(path: Path, where: str, separated: bool = False) -> Iterator[PlacedRow]:
    """Rows of a data file with their places; a text file has one row a document, under `text`. Raises UserError with
    file and place."""
    readers: dict[str, Callable[[Path, str], Iterable[PlacedRow]]] = {
        ".txt": partial(_txt_rows, separated=separated),
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": partial(_csv_rows, delimiter="\t"),
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
    }
    suffix = _suffix(path)
    if suffix not in readers:
        what = OTHER_KINDS.get(suffix, f"known are {', '.join(SUFFIXES)}, or .gz")
        raise UserError(f"dataset: {where} is no known kind of data file: {what}")
    empty = True
    try:
        for row in readers[suffix](path, where):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"dataset: {where} cannot be read as {suffix[1:]}: {one_line(error)}") from None
    if empty:
        raise UserError(f"dataset: {where} is empty")


def _lines(path: Path, where: str) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends included. Only a newline ends a line: not U+2028 and its like."""
    number, start = 0, 0
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                start += len(raw)
    except UnicodeDecodeError as error:
        at = f"line {number}, byte {start + error.start}"
        raise UserError(f"dataset: {where} is not UTF-8 text ({at}); save it as UTF-8") from None


def _txt_rows(path: Path, where: str, separated: bool) -> Iterator[PlacedRow]:
    """Documents between marks, without the blanks around them; a file without a mark is one document, as it is, or an
    error if it should be `separated`: nothing of one document can be held out while it is streamed."""
    parts: list[str] = []
    marked, size = False, 0
    begin = 0  # the line on which the document begins, once it has
    for number, line in enumerate(_lines(path, where), start=1):
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            if document := "".join([*parts, end]).strip():
                yield f"{where}, line {begin or number}", {"text": document}
            parts, begin = [], 0
        if not begin and rest.strip():
            begin = number
        parts.append(rest)
        marked, size = marked or bool(ends), size + len(line)
        if separated and not marked and size > LONGEST_DOCUMENT:
            break
    document = "".join(parts)
    if not document.strip():
        return
    if separated and not marked:
        raise UserError(
            f"dataset: {where} has no {END_OF_TEXT} between documents, so it is one document and cannot be streamed; "
            "separate its documents, or set streaming: false"
        )
    yield f"{where}, line {begin}", {"text": document.strip() if marked else document}


def _jsonl_rows(path: Path, where: str) -> Iterator[PlacedRow]:
    for number, line in enumerate(_lines(path, where), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_fields)
        except json.JSONDecodeError as error:
            hint = "; a list of rows over several lines is called .json" if line.strip() in ("[", "{", "[{") else ""
            raise UserError(f"dataset: {place} is not valid JSON ({error.msg} at column {error.colno}){hint}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"dataset: {place} cannot be read: {one_line(error)}") from None
        if not isinstance(row, dict):
            raise UserError(f"dataset: {place} should be a JSON object with named fields, but is {type(row).__name__}")
        yield place, row


def _fields(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object. Raises ValueError where it has two fields of one name, of which json would drop the first."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return row


def _json_rows(path: Path, where: str) -> Iterator[PlacedRow]:
    """A list of objects; a file of one object a line that is merely named .json is read as well."""
    text = "".join(_lines(path, where))
    if text.lstrip().startswith("{") and "\n{" in text.strip():
        yield from _jsonl_rows(path, where)
        return
    number, line, counted = 0, 1, 0
    try:
        for start, row in _json_list(text):
            number, line, counted = number + 1, line + text.count("\n", counted, start), start
            if not isinstance(row, dict):
                raise UserError(f"dataset: {where} should hold a JSON list of objects, one a row (line {line})")
            yield f"{where}, row {number} (line {line})", row
    except json.JSONDecodeError as error:
        raise UserError(f"dataset: {where} is not valid JSON (line {error.lineno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"dataset: {where}, row {number + 1}: {one_line(error)}") from None


def _json_list(text: str) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list, and where in the text each begins; what is no list comes as one entry, None. Raises
    JSONDecodeError."""
    decoder = json.JSONDecoder(object_pairs_hook=_fields)
    start = _after_blanks(text, 0)
    if text[start:] and text[start] != "[":
        decoder.decode(text)
        yield start, None
    if not text[start:] or text[start] != "[":
        return
    start = _after_blanks(text, start + 1)
    closed = text[start : start + 1] == "]"
    while not closed:
        entry, end = decoder.raw_decode(text, start)
        yield start, entry
        end = _after_blanks(text, end)
        closed = text[end : end + 1] == "]"
        if not closed and text[end : end + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' between two rows", text, end)
        start = end if closed else _after_blanks(text, end + 1)
    if (end := _after_blanks(text, start + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, end)


def _after_blanks(text: str, start: int) -> int:
    found = BLANKS.match(text, start)
    return found.end() if found else start


def _csv_rows(path: Path, where: str, delimiter: str = ",") -> Iterator[PlacedRow]:
    """Rows under the names of the first one. `begin` is the line on which a row begins: a field in quotes may have
    several."""
    csv.field_size_limit(1 << 30)
    lines: list[str] = []  # of the row that is being read
    reader = csv.reader(_kept(_lines(path, where), lines), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    begin = 1
    try:
        for fields in reader:
            if header is None and fields:
                header = _checked_header([name.strip() for name in fields], where, begin, delimiter)
            elif header and fields:
                if len(fields) != len(header):
                    raise UserError(_wrong_count(where, begin, reader.line_num, len(fields), len(header)))
                if any('"' in text and not _in_quotes(text, lines) for text in fields):
                    raise csv.Error(
                        "a quote stands in a field that is not in quotes; put it in quotes, all quotes twice"
                    )
                yield f"{where}, line {begin}", dict(zip(header, fields, strict=True))
            begin = reader.line_num + 1
            lines.clear()
    except csv.Error as error:
        raise UserError(f"dataset: {where}, {_csv_fault(str(error), lines, begin)}") from None


def _in_quotes(text: str, lines: list[str]) -> bool:
    """Whether a field of the row in `lines` was quoted. One that has a quote must be: else a quote that was forgotten
    makes other rows part of a field, and the next stray quote closes it."""
    doubled = text.replace('"', '""')
    return f'"{doubled}"' in "".join(lines)


def _kept(lines: Iterable[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line


def _checked_header(header: list[str], where: str, line: int, delimiter: str) -> list[str]:
    """The names of the columns. Raises UserError for one that is missing or stands there twice."""
    twice = next((name for name in header if header.count(name) > 1), None)
    other = next((mark for mark in ("\t", ";", ",") if len(header) == 1 and mark in header[0]), None)
    kind = "tsv" if delimiter == "\t" else "csv"
    if other:
        problem = f"has one column, '{header[0]}'; if {other!r} stands between its columns, save it with {delimiter!r}"
    elif "" in header:
        problem = f"has no name for column {header.index('') + 1}; name it or take it out (pandas: index=False)"
    elif twice is not None:
        problem = f"names the column '{twice}' twice; rename one of them"
    else:
        return header
    raise UserError(f"dataset: {where}, line {line}: the header of the {kind} {problem}")


def _wrong_count(where: str, begin: int, end: int, found: int, expected: int) -> str:
    lines = f"line {begin}" if begin == end else f"lines {begin} to {end}"
    hint = "" if begin == end else "; if that is no single row, a quote opens there that is not closed"
    return f"dataset: {where}, {lines} has more or fewer fields than the header ({found}, not {expected}){hint}"


def _csv_fault(message: str, lines: list[str], begin: int) -> str:
    """Where and what, of an error of csv in the row that `lines` begin."""
    if message.startswith("unexpected end") or "expected after" in message:
        line = begin + _opening_line(lines)
        return (
            f"line {line}: a quote opens there that is not closed before the next one or the end; close it, and write "
            "a quote inside a field twice"
        )
    if message.startswith("new-line character"):
        return (
            f"line {begin}: a carriage return stands in the middle of the line; put the field in quotes, or save the "
            "file with plain newlines"
        )
    return f"line {begin}: {message}"


def _opening_line(lines: list[str]) -> int:
    """The index of the line on which the last field in quotes opens."""
    opened, inside, before = 0, False, ","
    for number, line in enumerate(lines):
        for char in line:
            if char == '"' and inside:
                inside = False
            elif char == '"' and before in ',\t\n"':  # after another quote, it is one written twice
                inside, opened = True, opened if before == '"' else number
            before = char
    return opened


def _parquet_rows(path: Path, where: str) -> Iterator[PlacedRow]:
    file = pyarrow.parquet.ParquetFile(path)
    yield from _table_rows(file.schema_arrow, file.iter_batches(ROWS_AT_ONCE), where)


def _arrow_rows(path: Path, where: str) -> Iterator[PlacedRow]:
    """Rows of an Arrow file: a stream, as `Dataset.save_to_disk` writes it, or with random access."""
    with pa.memory_map(str(path)) as mapped:
        try:
            table = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            table = pa.ipc.open_file(mapped)
            batches: Iterable[pa.RecordBatch] = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = table
        yield from _table_rows(table.schema, batches, where)


def _table_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch], where: str) -> Iterator[PlacedRow]:
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"dataset: {where} has the column '{twice}' twice; rename one of them")
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{where}, row {number}", row


def one_line(error: BaseException) -> str:
    """An exception's text, short and on one line."""
    return " ".join(str(error).split())[:300]
