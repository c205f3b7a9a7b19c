"""Every data set of the chain, from one field `dataset`, in TRL's formats; and the packing of text into blocks.

`dataset` is a generator's name ("stories", "reviews"), a file or folder (.txt, .jsonl, .json, .csv, each also .gz, or
.parquet), or a hub name ("owner/name" or "owner/name:config"). What the rows may look like: reward_data/README.md.

Splits. A generator has its own. In a folder or on the hub, files or splits named train, validation (or dev, eval),
test, preferences or ppo are taken at their word, and one of validation and test stands in for the other. Otherwise the
prompts with the smallest hashes become test (5 %) and validation (5 %), whatever the seed, so that no prompt is on both
sides in any run; train, preferences and ppo are then names for the same remainder. The seed orders the rows.
"""

import hashlib
import importlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.sources import END_OF_TEXT, GENERATORS, Row, Source, Split, choose, find_sources, one_line
from reward_data import formats

ENDLESS = {"stories"}  # generators that need a size
HELD_OUT = 0.05  # of the prompts or documents, for test and for validation each
HELD_OUT_TAIL = 0.1  # of one long text: the usual 90/10 split of tiny Shakespeare

T = TypeVar("T")
log = logging.getLogger(__name__)


# ---- the four kinds of data set -----------------------------------------------------------------------------------


def load_texts(
    dataset: str, *, split: Split, seed: int = 0, max_bytes: int | None = None, text_column: str = "text"
) -> list[str]:
    """Documents to pretrain on, without duplicates, in an order set by `seed`, up to `max_bytes` of UTF-8.

    A .txt file holds documents separated by `<|endoftext|>`; without that mark it is one document, kept whole. A single
    long text is split at 90 % of its characters into train and validation. Raises UserError.
    """
    if dataset in GENERATORS:
        documents = list(_generate(dataset, "corpus", seed=seed, max_bytes=max_bytes, split=split))
    else:
        named, found = choose(find_sources(dataset), split, "texts")
        documents = list(dict.fromkeys(_documents(dataset, found, text_column)))
        if not named and len(documents) == 1:
            cut = int(len(documents[0]) * (1 - HELD_OUT_TAIL))
            documents = [documents[0][:cut] if _training(split) else documents[0][cut:]]
        elif not named:
            documents = _part(documents, split, str)
        random.Random(seed).shuffle(documents)
    documents = list(_up_to(documents, max_bytes))
    if not documents:
        raise UserError(f"dataset: {dataset} has no text for the split '{split}'")
    return documents


def load_instructions(dataset: str, *, split: Split, seed: int = 0, size: int | None = None) -> Dataset:
    """Rows of prompt and completion, as messages or as text; at most `size`. Raises UserError."""
    return _load("instructions", dataset, split, seed, size)


def load_prompts(dataset: str, *, split: Split, seed: int = 0, size: int | None = None) -> Dataset:
    """Rows of prompt, as messages or as text, and any columns beside it, which reward functions are given; at most
    `size`, fewer where the data set has fewer. Raises UserError."""
    return _load("prompts", dataset, split, seed, size)


def load_preferences(dataset: str, *, split: Split, seed: int = 0, size: int | None = None) -> Dataset:
    """Rows of prompt, chosen and rejected, as messages or as text; at most `size`. Raises UserError."""
    return _load("preferences", dataset, split, seed, size)


def _load(kind: formats.Kind, dataset: str, split: Split, seed: int, size: int | None) -> Dataset:
    """The rows of one split in the shape of `kind`."""
    if dataset in GENERATORS:
        given = {} if kind == "preferences" else {"size": size}
        rows = list(_generate(dataset, kind, seed=seed, split=split, **given))
    else:
        named, found = choose(find_sources(dataset), split, kind)
        rows = _adapted(dataset, found, kind)
        if not named:
            rows = _part(rows, split, _prompt_key)
        random.Random(seed).shuffle(rows)
    if not rows:
        raise UserError(f"dataset: {dataset} has no {kind} for the split '{split}'")
    try:
        return Dataset.from_list(rows[:size])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"dataset: {dataset} mixes types within a column: {one_line(error)}") from None


def _generate(name: str, function: str, **arguments: Any) -> Iterable[Any]:
    """Call one of a generator's functions; its ValueErrors are sentences for the user."""
    if name in ENDLESS and None in arguments.values():
        raise UserError(f"dataset: {name} never ends; say how much of it is wanted (max_bytes or a size)")
    module = importlib.import_module(GENERATORS[name])
    if not hasattr(module, function):
        raise UserError(f"dataset: {name} has no {function} of its own; run the stage that makes them, name its folder")
    try:
        return getattr(module, function)(**arguments)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"dataset: {name}: {error}") from None


# ---- rows to split, order and size ----------------------------------------------------------------------------------


def _adapted(dataset: str, sources: list[Source], kind: formats.Kind) -> list[Row]:
    """All rows of the sources in the shape of `kind`; says how many were dropped and why."""
    rows: list[Row] = []
    for name, read in sources:
        where = f"{dataset}/{name}" if name else dataset
        try:
            adapted = formats.adapt(list(read()), kind)
        except ValueError as error:
            raise UserError(f"dataset: {where}: {error}") from None
        if adapted.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(adapted.dropped.items()))
            _say_once(f"{where} ({adapted.format}): {adapted.dropped.total()} rows dropped: {reasons}")
        rows += adapted.rows
    return rows


@lru_cache
def _say_once(sentence: str) -> None:
    log.warning(sentence)


def _documents(dataset: str, sources: list[Source], column: str) -> Iterator[str]:
    """The texts in `column` of all rows that are not blank."""
    for name, read in sources:
        where = f"{dataset}/{name}" if name else dataset
        for number, row in enumerate(read(), start=1):
            if column not in row:
                raise UserError(
                    f"dataset: {where} has no text column '{column}', only {', '.join(map(str, row))}; "
                    "name the right one in text_column"
                )
            if not isinstance(row[column], str):
                raise UserError(f"dataset: {where}, row {number}: field '{column}' should be text")
            if row[column].strip():
                yield row[column]


def _training(split: Split) -> bool:
    return split not in ("validation", "test")


def _prompt_key(row: Row) -> str:
    """What decides a row's split: its prompt, of a conversation the first thing the user said."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), formats.text_of(prompt))


def _part(rows: list[T], split: Split, key: Callable[[T], str]) -> list[T]:
    """The rows of `split`: by rank of the hash of their keys, at least one key in each split."""
    ranked = sorted({key(row) for row in rows}, key=lambda text: hashlib.blake2b(text.encode()).digest())
    if len(ranked) < 3:
        if _training(split):
            return rows
        raise UserError(f"dataset: {len(ranked)} prompts or documents are too few to hold any out for '{split}'")
    count = max(1, round(len(ranked) * HELD_OUT))
    held_out = {"test": set(ranked[:count]), "validation": set(ranked[count : 2 * count])}
    if split in held_out:
        return [row for row in rows if key(row) in held_out[split]]
    return [row for row in rows if key(row) not in held_out["test"] | held_out["validation"]]


def _up_to(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Documents until `max_bytes` of UTF-8 are reached; the last is cut at a character."""
    left = max_bytes
    for document in documents:
        if left is not None:
            raw = document.encode()
            if len(raw) >= left:
                document = raw[:left].decode(errors="ignore")
            left -= len(raw)
        if document:
            yield document
        if left is not None and left <= 0:
            return


# ---- packing --------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Text as blocks of tokens."""

    blocks: Dataset
    """Column input_ids: lists of exactly block_size int32 ids."""
    tokens: int
    """Tokens in the blocks, the ends of documents included."""
    bytes: int
    """UTF-8 bytes of text in the blocks; the end of a document counts none. Bits per byte of a mean loss in nats:
    loss / ln 2 * tokens / bytes."""
    leftover: int
    """Tokens at the end that filled no block."""
    largest_id: int


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Packed:
    """All documents, each ended by `<|endoftext|>`, laid end to end and cut into blocks of `block_size` tokens.

    Nothing is padded or lost but the `leftover` tokens after the last whole block. Special tokens that happen to be
    spelt out in a document are taken as ordinary characters. Raises UserError if not even one block is filled.
    """
    end = document_end(tokenizer)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        batch = list(texts[start : start + 1000])
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )
        parts += [np.asarray([*ids, end], dtype=np.int32) for ids in encoded["input_ids"]]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    count = len(ids) // block_size
    if count == 0:
        raise UserError(f"the text is too short: its {len(ids)} tokens do not fill one block of {block_size}")
    kept, rest = ids[: count * block_size], ids[count * block_size :]
    total = sum(len(text.encode()) for text in texts)
    column = pa.FixedSizeListArray.from_arrays(pa.array(kept), block_size).cast(pa.list_(pa.int32()))
    blocks = Dataset(pa.table({"input_ids": column}))
    return Packed(blocks, len(kept), total - _bytes_of(rest[rest != end], tokenizer), len(rest), int(kept.max()))


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: `<|endoftext|>` where the tokenizer knows it, else its end token."""
    end = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if end is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no token that ends a document")
    return end


def check_vocabulary(packed: Packed, vocab_size: int) -> None:
    """Raises UserError if the blocks hold an id that a model of `vocab_size` embeddings does not have."""
    if packed.largest_id >= vocab_size:
        raise UserError(
            f"the text has the token id {packed.largest_id}, but the model's vocabulary has {vocab_size} entries; "
            "use the tokenizer that the model was trained with"
        )


def _bytes_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes that tokens stand for. In a byte-level vocabulary every character of an entry is one byte, which is
    exact where a cut has split a character; other tokenizers decode."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ == "ByteLevel":
        return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist()))
    return len(tokenizer.decode(ids.tolist()).encode())
