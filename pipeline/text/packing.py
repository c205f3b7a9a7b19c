"""Documents packed into rows of tokens for pretraining, in memory or while they are read.

All documents stand end to end, `<|endoftext|>` between them, and are cut into rows of `block_size` tokens. A row begins
with the token that the row before ends with, and the labels are shifted by one inside the model: so each token but the
very first of the text is predicted exactly once, and nothing is padded but the last row.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import decoders
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.text.sources import END_OF_TEXT
from pipeline.text.tokenizer import encode

IGNORED = -100  # a label that is not trained on, as everywhere in PyTorch
TEXTS_AT_ONCE = 1000  # that the tokenizer works on in parallel


class Packed(NamedTuple):
    """Text as rows of tokens."""

    rows: Dataset
    """Columns input_ids (lists of block_size int32 ids, the last one may be shorter) and row (its number)."""
    ids: np.ndarray
    """The same text as one line of int32 ids."""
    tokens: int
    """Tokens that are predicted: all but the first, the ends of documents included."""
    bytes: int
    """UTF-8 bytes of the text that is predicted; the end of a document counts none."""
    characters: int
    """Characters of the text that is predicted."""


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Packed:
    """Pack all of `texts`. Special tokens that happen to be spelt out in a document are taken as ordinary characters.

    Raises UserError if there are not two tokens, or block_size is below 2.
    """
    parts = [part for batch in _batches(texts, TEXTS_AT_ONCE) for part in _encode(batch, tokenizer)]
    ids = np.concatenate(parts)[:-1] if parts else np.zeros(0, dtype=np.int32)  # between documents, not after the last
    if block_size < 2:
        raise UserError(f"block_size: {block_size} is too small; a token is predicted from at least one before it")
    if len(ids) < 2:
        raise UserError(f"the text is too short: with {len(ids)} tokens there is nothing to predict; give more of it")
    step = block_size - 1
    blocks = [ids[start : start + block_size] for start in range(0, len(ids) - 1, step)]
    column = pa.array(blocks, pa.large_list(pa.int32()))
    rows = Dataset(pa.table({"input_ids": column, "row": np.arange(len(blocks))}))
    first = tokenizer.decode(ids[:1].tolist())
    return Packed(
        rows,
        ids,
        tokens=len(ids) - 1,
        bytes=sum(len(text.encode()) for text in texts) - _bytes_of(int(ids[0]), tokenizer),
        characters=sum(map(len, texts)) - len(first),
    )


class StreamedRows(IterableDataset):
    """The rows of an endless stream of texts, packed while they are read: {"input_ids": list of int, "row": int}.

    The same rows in each iteration, whatever is skipped: so a resumed run, which reads, tokenizes and drops what was
    trained on before, goes on with the same rows.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        self.texts, self.tokenizer, self.block_size = texts, tokenizer, block_size
        self.tokens = self.bytes = 0
        """What was read so far, as in Packed."""

    def __iter__(self) -> Iterator[dict]:
        self.tokens = self.bytes = 0
        waiting, row = np.zeros(0, dtype=np.int32), 0
        for texts in _batches(self.texts, TEXTS_AT_ONCE // 10):
            waiting = np.concatenate([waiting, *_encode(texts, self.tokenizer)])
            self.tokens += len(waiting)
            self.bytes += sum(len(text.encode()) for text in texts)
            start = 0
            while start + self.block_size <= len(waiting):
                yield {"input_ids": waiting[start : start + self.block_size].tolist(), "row": row}
                start += self.block_size - 1
                row += 1
            waiting = waiting[start:]
            self.tokens -= len(waiting)


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """input_ids, labels (B, T) long and row (B,); a short row is filled up, which the labels leave out."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORED),
        "row": torch.tensor([row["row"] for row in rows]),
    }


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: `<|endoftext|>` where the tokenizer knows it, else its end token."""
    end = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if end is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no token that ends a document")
    return end


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    return iter(lambda: list(islice(texts, size)), [])


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The ids of each document and its end."""
    end = document_end(tokenizer)
    options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
    encoded = encode(tokenizer, texts, (), **options, verbose=False)
    return [np.asarray([*ids, end], dtype=np.int32) for ids in encoded]


def _bytes_of(token: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes that a token stands for. In a byte-level vocabulary every character of an entry is one byte, which is
    exact where a cut has split a character; other tokenizers decode."""
    if isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), decoders.ByteLevel):
        return len(str(tokenizer.convert_ids_to_tokens(token)))
    return len(str(tokenizer.decode([token])).encode())
