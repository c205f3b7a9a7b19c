"""Every data set of the chain, from one field `dataset`, in TRL's formats.

`dataset` is a generator's name ("stories", "reviews"), a file or folder (.txt, .jsonl, .json, .csv, .tsv, each also
.gz, .parquet, or what `Dataset.save_to_disk` wrote), or a hub name ("owner/name" or "owner/name:config"). What the rows
may look like: reward_data/README.md.

Splits. A generator has its own. In a folder or on the hub, files, folders or splits named train, validation (or dev,
eval), test, preferences or ppo are taken at their word, and one of validation and test stands in for the other.
Otherwise the prompts or documents with the smallest hashes become test (5 %) and validation (5 %), whatever the seed,
so that none is on both sides in any run; train, preferences and ppo are then names for the same remainder. In memory
the hashes are ranked, so that the shares are exact; a stream, of which nobody knows the end, holds out the lowest 5 and
10 % of the range of the hashes: the same documents, but for the few at the limits. The seed orders the rows.
"""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset

from pipeline.errors import UserError
from pipeline.text.counts import agreeing, counted
from pipeline.text.sources import Source, choose, say_once
from reward_data import formats
from reward_data.formats import Row
from reward_data.generators import GENERATORS, Split, load_generator

HELD_OUT = 0.05  # of the prompts or documents, for test and for validation each
HELD_OUT_TAIL = 0.1  # of one long text: the usual 90/10 split of tiny Shakespeare

T = TypeVar("T")


# ---- text to pretrain on --------------------------------------------------------------------------------------------


def load_texts(
    dataset: str,
    *,
    split: Split,
    seed: int = 0,
    max_bytes: int | None = None,
    text_column: str = "text",
    without: Container[bytes] = (),
    streaming: bool = False,
) -> list[str]:
    """Documents to pretrain on, without duplicates, in an order set by `seed`, up to `max_bytes` of UTF-8.

    A .txt file holds documents separated by `<|endoftext|>`; without that mark it is one document, kept whole. A single
    long text is split at 90 % of its characters into train and validation. Documents that differ in case and spacing
    alone are duplicates; those whose `document_key` is in `without` are left out. With `streaming`, documents are those
    of TextStream, in the corpus's order, and no more is read than `max_bytes` needs. Raises UserError.
    """
    if streaming:
        stream = TextStream(
            dataset, split=split, seed=seed, max_bytes=max_bytes, text_column=text_column, without=without
        )
        documents = list(stream.one_pass())
    else:
        named, read = _corpus(dataset, split, text_column, seed=seed, max_bytes=max_bytes, streaming=False)
        by_key = _without_duplicates(read(), dataset)
        if not named and len(by_key) == 1:
            [text] = by_key.values()
            cut = int(len(text) * (1 - HELD_OUT_TAIL))
            documents = [text[:cut] if _side(split) == "train" else text[cut:]]
        else:
            keys = list(by_key) if named else _part(list(by_key), list(by_key), split)
            documents = [by_key[key] for key in keys if key not in without]
            if held_out := len(keys) - len(documents):
                verbs = agreeing(held_out, "is held out too and was", "are held out too and were")
                say_once(f"{dataset}: {held_out:,} of {len(keys):,} documents {verbs} left out")
        if dataset not in GENERATORS:
            random.Random(seed).shuffle(documents)
        documents = list(_up_to(documents, max_bytes))
    if not documents:
        raise _no_rows(dataset, "text", split)
    return documents


@dataclass
class TextStream:
    """The documents that load_texts would give, read anew in each pass, for a corpus that is too large for memory.

    Iterating goes over the corpus pass after pass, without end. In memory are `buffer_size` documents, of which the
    next one is drawn at random (set by `seed` and the pass), and 8 bytes for each document of the pass, to know
    duplicates by. Raises UserError.
    """

    dataset: str
    _: KW_ONLY
    split: Split
    seed: int = 0
    max_bytes: int | None = None
    text_column: str = "text"
    without: Container[bytes] = ()
    buffer_size: int = 10_000

    def __post_init__(self) -> None:
        self.documents = self.duplicates = self.held_out = 0
        """Read, and of these dropped, as duplicates and for `without`, since the iteration began."""
        limit = sys.maxsize if self.max_bytes is None else self.max_bytes  # a generator that never ends streams as well
        self._named, self._read = _corpus(
            self.dataset, self.split, self.text_column, seed=self.seed, max_bytes=limit, streaming=True
        )

    def __iter__(self) -> Iterator[str]:
        self.documents = self.duplicates = self.held_out = 0
        for number in count():
            empty = True
            for text in _shuffled(self.one_pass(), random.Random(f"{self.seed} {number}"), self.buffer_size):
                empty = False
                yield text
            if empty:
                raise _no_rows(self.dataset, "text", self.split)

    def one_pass(self) -> Iterator[str]:
        """The documents of the split once, in the order of the corpus, up to `max_bytes`."""
        return _up_to(self._unique(), self.max_bytes)

    def _unique(self) -> Iterator[str]:
        seen = SeenKeys()
        for text in self._read():
            key = document_key(text)
            if not self._named and _side_of_key(key) != _side(self.split):
                continue
            self.documents += 1
            if not seen.add(key):
                self.duplicates += 1
            elif key in self.without:
                self.held_out += 1
            else:
                yield text


def _corpus(
    dataset: str, split: Split, text_column: str, *, seed: int, max_bytes: int | None, streaming: bool
) -> tuple[bool, Callable[[], Iterator[str]]]:
    """Whether the documents are those of `split` alone, and the function that reads them."""
    if dataset in GENERATORS:
        return True, partial(_generate, dataset, "corpus", seed=seed, max_bytes=max_bytes, split=split)
    choice = choose(dataset, split, "texts", streaming)
    for note in choice.notes:
        say_once(note)
    return choice.named, partial(_documents, choice.sources, text_column)


def _documents(sources: list[Source], column: str) -> Iterator[str]:
    """The texts in `column` of all rows; those that are empty or missing are left out, which is said."""
    for source in sources:
        read = empty = 0
        for place, row in source.read():
            if column not in row and read == empty:  # no text was found yet
                raise UserError(
                    f"dataset: {source.where} has no text column '{column}', only {formats.shown(row)}; "
                    "name the right one in text_column"
                )
            try:
                text = formats.text_field(row, column)
            except ValueError as error:
                raise UserError(f"dataset: {place}: {error}") from None
            read += 1
            if text.strip():
                yield text
            else:
                empty += 1
        if empty:
            verbs = agreeing(empty, "is empty and was", "are empty and were")
            say_once(f"{source.where}: {empty:,} of {counted(read, 'documents')} {verbs} left out")


def _without_duplicates(texts: Iterable[str], dataset: str) -> dict[bytes, str]:
    """The first text of each key; says how many others there were."""
    by_key: dict[bytes, str] = {}
    read = 0
    for text in texts:
        by_key.setdefault(document_key(text), text)
        read += 1
    if again := read - len(by_key):
        verbs = agreeing(again, "is a duplicate and was", "are duplicates and were")
        say_once(f"{dataset}: {again:,} of {read:,} documents {verbs} dropped")
    return by_key


def document_key(text: str) -> bytes:
    """A hash of 8 bytes that tells documents apart, though not by case and spacing."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()


class SeenKeys:
    """A set of keys of 8 bytes that takes 8 bytes a key: a sorted array, and the latest ones in a set beside it."""

    def __init__(self, merge_at: int = 100_000) -> None:
        self.merge_at = merge_at
        self.sorted = np.zeros(0, dtype=np.uint64)
        self.latest: set[int] = set()

    def add(self, key: bytes) -> bool:
        """Whether the key is new; it is not any more."""
        number = int.from_bytes(key, "big")
        place = int(np.searchsorted(self.sorted, np.uint64(number)))
        if number in self.latest or (place < len(self.sorted) and int(self.sorted[place]) == number):
            return False
        self.latest.add(number)
        if len(self.latest) >= self.merge_at + len(self.sorted) // 16:
            self.sorted = np.sort(np.concatenate([self.sorted, np.fromiter(self.latest, np.uint64)]))
            self.latest = set()
        return True


def _shuffled(documents: Iterable[str], rng: random.Random, buffer_size: int) -> Iterator[str]:
    """Draw each next one at random among `buffer_size`, which the following ones fill up."""
    buffer: list[str] = []
    for document in documents:
        if len(buffer) < buffer_size:
            buffer.append(document)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = document
    rng.shuffle(buffer)
    yield from buffer


def _up_to(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Whole documents, as many as fit `max_bytes` of UTF-8; if not even the first one does, its beginning. Raises
    UserError for a limit that holds nothing."""
    left = sys.maxsize if max_bytes is None else max_bytes
    for number, document in enumerate(documents):
        raw = document.encode()
        if len(raw) > left:
            if number == 0 and not (begin := raw[:left].decode(errors="ignore")):
                raise UserError(
                    f"a limit of {max_bytes} bytes (max_bytes, validation_bytes or ptx_max_bytes) does not hold the "
                    "first character of the text; raise it"
                )
            if number == 0:
                yield begin
            return
        left -= len(raw)
        yield document


# ---- instructions, prompts and preferences --------------------------------------------------------------------------


class Rows(list[Row]):
    """Rows as Python objects, with what stages use of a Dataset.

    A Dataset would make one type of a column's values, which rewards are to be given as they are, and fails where they
    have no common type.
    """

    @property
    def num_rows(self) -> int:
        return len(self)

    @property
    def column_names(self) -> list[str]:
        return list(self[0]) if self else []

    def __getitem__(self, which: Any) -> Any:
        """The row of a number, rows of a slice, or the column of a name."""
        return [row[which] for row in self] if isinstance(which, str) else super().__getitem__(which)

    def select(self, indices: Iterable[int]) -> "Rows":
        return Rows(self[index] for index in indices)

    def to_list(self) -> list[Row]:
        return list(self)

    def to_dict(self) -> dict[str, list]:
        return {name: self[name] for name in self.column_names}


@dataclass
class Loaded:
    """The rows of one split, and what is to be said of them."""

    rows: Any
    """In TRL's shape: a Dataset; of prompts, Rows, which have other columns beside them."""
    places: Sequence[str]
    """Where each row stands, as an editor counts it: "pairs.jsonl, line 1412"; what an error about the row names."""
    notes: list[str] = field(default_factory=list)
    """Sentences: the format, rows read and dropped and why, columns that are not used."""


def load_instructions(dataset: str, *, split: Split, seed: int = 0, size: int | None = None) -> Loaded:
    """Rows of prompt and completion, as messages or as text; at most `size`. Raises UserError."""
    return _load("instructions", dataset, split, seed, size)


def load_prompts(
    dataset: str, *, split: Split, seed: int = 0, size: int | None = None, suffix: str | None = None
) -> Loaded:
    """Rows of prompt, as messages or as text, and any columns beside it, which reward functions are given (None where a
    row has none); at most `size`, fewer where the data set has fewer. `suffix` is put after each prompt's text, of a
    conversation after its last message. Raises UserError."""
    loaded = _load("prompts", dataset, split, seed, size)
    if suffix:
        loaded.rows = Rows(row | {"prompt": _with_suffix(row["prompt"], suffix)} for row in loaded.rows)
        loaded.notes.append(f"each prompt ends with {suffix!r}")
    return loaded


def _with_suffix(prompt: formats.Answer, suffix: str) -> formats.Answer:
    if isinstance(prompt, str):
        return prompt + suffix
    last = prompt[-1]
    return [*prompt[:-1], last | {"content": last["content"] + suffix}]


def load_preferences(dataset: str, *, split: Split, seed: int = 0, size: int | None = None) -> Loaded:
    """Rows of prompt, chosen and rejected, as messages or as text; at most `size`. Raises UserError."""
    return _load("preferences", dataset, split, seed, size)


def _load(kind: formats.Kind, dataset: str, split: Split, seed: int, size: int | None) -> Loaded:
    """The rows of one split in the shape of `kind`."""
    if size is not None and size < 1:
        raise UserError(f"dataset: {size} rows of {dataset} are asked for; ask for at least one")
    if dataset in GENERATORS:
        limit = {} if kind == "preferences" else {"size": size}
        made = list(_generate(dataset, kind, seed=seed, split=split, **limit))
        rows, notes = [(f"{dataset}, row {i}", row) for i, row in enumerate(_completed(made, kind), start=1)], []
    else:
        choice = choose(dataset, split, kind)
        found = _found(choice.sources, kind)
        rows, notes = found.completed(kind), choice.notes + found.notes(dataset, kind)
        if rows and not choice.named:
            key = _prompt_key
            if (
                len({key(row["prompt"]) for _, row in rows}) < 3
            ):  # all begin with the same words: the rest tells them apart
                key = _whole_key
            rows = _part(rows, [key(row["prompt"]) for _, row in rows], split, map(key, found.other_prompts))
        random.Random(seed).shuffle(rows)
        if len(rows) < len(found.rows):
            notes.append(f"{len(rows):,} of {len(found.rows):,} rows {agreeing(len(rows))} for '{split}'")
    if not rows:
        raise _no_rows(dataset, kind, split)
    places, kept = zip(*rows[:size], strict=True)
    return Loaded(Rows(kept) if kind == "prompts" else Dataset.from_list(list(kept)), places, notes)


def repeated_prompts(splits: Mapping[str, Loaded], what: str) -> list[str]:
    """A sentence for each split but the first that has prompts of the first, which happens where files are named for
    splits; `what` the rows are: "pairs". On these rows, figures say less of new prompts."""
    (first, seen), *others = splits.items()
    known, notes = set(map(_whole_key, seen.rows["prompt"])), []
    for name, loaded in others:
        if again := sum(_whole_key(prompt) in known for prompt in loaded.rows["prompt"]):
            repeat = agreeing(again, "repeats a prompt", "repeat prompts")
            notes.append(f"{again:,} of {counted(len(loaded.rows), f'{name} {what}')} {repeat} of the {first} split")
    return notes


@dataclass
class Found:
    """What came of the sources of a split: rows with their places, in the shape of a kind, and counts."""

    rows: list[tuple[str, Row]] = field(default_factory=list)
    read: int = 0
    forms: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    repeated: int = 0
    contradicted: int = 0
    unused: dict[str, None] = field(default_factory=dict)
    other_prompts: list[formats.Answer] = field(default_factory=list)

    def add(self, places: list[str], adapted: formats.Adapted) -> None:
        """Take over the rows of one source."""
        self.rows += [(places[index], row) for index, row in zip(adapted.kept, adapted.rows, strict=True)]
        self.read += len(places)
        self.forms += adapted.formats
        self.dropped += adapted.dropped
        self.repeated += adapted.repeated
        self.contradicted += adapted.contradicted
        self.unused |= dict.fromkeys(adapted.unused)
        self.other_prompts += adapted.other_prompts

    def completed(self, kind: formats.Kind) -> list[tuple[str, Row]]:
        """The rows with their places, all with the columns that any of them has."""
        rows = _completed([row for _, row in self.rows], kind)
        return list(zip([place for place, _ in self.rows], rows, strict=True))

    def notes(self, dataset: str, kind: formats.Kind) -> list[str]:
        """Sentences for the user. Raises UserError if every row was dropped."""
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.dropped.items()))
        if not self.rows:
            rows = agreeing(self.read, "its only row is", f"all of its {self.read:,} rows are")
            raise UserError(f"dataset: {dataset}: {rows} dropped for {kind}: {reasons}")
        form = " and ".join(name for name, _ in self.forms.most_common())
        said = f"{dataset} ({form}): {counted(self.read, 'rows')} read"
        dropped = f"{counted(self.dropped.total(), 'rows')} dropped: {reasons}"
        notes = [f"{said}, {dropped}" if self.dropped else said]
        if self.repeated:
            where = counted(self.repeated, "rows")
            notes.append(f"{dataset}: answers began with their own prompt in {where}; it was taken off")
        if self.contradicted:
            where = counted(self.contradicted, "rows")
            notes.append(
                f"{dataset}: the field 'prompt' is not in the conversation beside it in {where}; the conversation was "
                "used"
            )
        if self.unused:
            notes.append(f"{dataset}: not used: {formats.shown(self.unused)}")
        return notes


def _found(sources: list[Source], kind: formats.Kind) -> Found:
    """The rows of all sources in the shape of `kind`. Raises UserError with the place of a row that is wrong."""
    found = Found()
    for source in sources:
        placed = list(source.read())
        places = [place for place, _ in placed]
        try:
            found.add(places, formats.adapt([row for _, row in placed], kind))
        except formats.BadRow as error:
            raise UserError(f"dataset: {places[error.index]}: {error.reason}") from None
        except ValueError as error:
            raise UserError(f"dataset: {source.where}: {error}") from None
    for place, row in found.rows:
        if type(row["prompt"]) is not type(found.rows[0][1]["prompt"]):
            raise UserError(f"dataset: {place}: field 'prompt' is text in one file and messages in another")
    return found


def _completed(rows: list[Row], kind: formats.Kind) -> list[Row]:
    """The rows with all columns that any of them has: None where one lacks a column; a pair without mark is not
    flipped."""
    columns = dict.fromkeys(name for row in rows for name in row)
    missing = {name: False if name == "flipped" and kind == "preferences" else None for name in columns}
    return [missing | row for row in rows]


def _whole_key(prompt: formats.Answer) -> bytes:
    """A hash of all that is asked."""
    return hashlib.blake2b(formats.text_of(prompt).encode()).digest()


def _prompt_key(prompt: formats.Answer) -> bytes:
    """A hash of what decides a row's split: its prompt, of a conversation the first thing the user said."""
    asked = prompt if isinstance(prompt, str) else formats.text_of(prompt)
    if not isinstance(prompt, str):
        asked = next((message["content"] for message in prompt if message["role"] == "user"), asked)
    return hashlib.blake2b(asked.encode()).digest()


# ---- generators, splits, messages -----------------------------------------------------------------------------------


def _generate(name: str, kind: str, **arguments: Any) -> Iterator[Any]:
    """The documents or rows of a generator; its errors are sentences for the user."""
    generator = load_generator(name)
    if generator.ENDLESS and None in arguments.values():
        raise UserError(f"dataset: {name} never ends; say how much of it is wanted (max_bytes or a size)")
    try:
        yield from getattr(generator, kind)(**arguments)
    except NotImplementedError as error:
        raise UserError(f"dataset: {name} has no {kind} of its own; {error}") from None
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"dataset: {name}: {error}") from None


def _side(split: Split) -> Split:
    """The side of the held-out split that `split` is on."""
    return split if split in ("validation", "test") else "train"


def _side_of_key(key: bytes) -> Split:
    """The side of a document of a stream, by the value of its key."""
    share = int.from_bytes(key, "big") / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def _part(rows: list[T], keys: list[bytes], split: Split, others: Iterable[bytes] = ()) -> list[T]:
    """The rows of `split`: by rank of their keys, which are hashes, at least one key in each split.

    `others` are keys of rows that serve for another kind alone; they have their ranks too, so that every kind holds out
    the same prompts.
    """
    ranked = sorted({*keys, *others})
    if len(ranked) < 3:
        if _side(split) == "train":
            return rows
        raise UserError(
            f"dataset: {len(ranked)} different prompts or documents are too few to hold any out for '{split}'; give "
            f"more of them, or a file for it in one folder with the others (train.jsonl, {split}.jsonl)"
        )
    share = max(1, round(len(ranked) * HELD_OUT))
    held_out = dict.fromkeys(ranked[:share], "test") | dict.fromkeys(ranked[share : 2 * share], "validation")
    return [row for row, key in zip(rows, keys, strict=True) if held_out.get(key, "train") == _side(split)]


def _no_rows(dataset: str, what: str, split: Split) -> UserError:
    return UserError(f"dataset: {dataset} has no {what} for the split '{split}'")
