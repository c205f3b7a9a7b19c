"""Packing loses no token: every one but the first is predicted once, whatever the block size."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pipeline.errors import UserError
from pipeline.text import packing
from pipeline.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog ran to the park " * 20, "ü 漢字 🙂"], 300)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "naïve", "漢字", "🙂", "\n\n", "<|user|>", "<|endoftext|>", "x"]
    return [" ".join(rng.choice(words, size=rng.integers(1, 40))) for _ in range(1203)]


def line_of(texts: list[str], tokenizer) -> list[int]:
    """The reference: each document alone, ends between them; special tokens spelt out are ordinary characters."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [t for text in texts for t in [*tokenizer(text, split_special_tokens=True)["input_ids"], end]]
    return ids[:-1]


@pytest.mark.parametrize("block_size", [2, 7, 64])
def test_pack_predicts_every_token_but_the_first_once(tokenizer, texts: list[str], block_size: int) -> None:
    packed = packing.pack(texts, tokenizer, block_size)
    rows, line = packed.rows["input_ids"][:], line_of(texts, tokenizer)
    assert all(len(row) == block_size for row in rows[:-1]) and 2 <= len(rows[-1]) <= block_size
    assert [t for row in rows for t in row[1:]] == line[1:], "what the rows predict is the text"
    assert [row[0] for row in rows] == [line[0]] + [row[-1] for row in rows[:-1]]
    assert packed.rows["row"][:] == list(range(len(rows))) and packed.ids.tolist() == line
    assert packed.ids.dtype == np.int32
    assert packed.rows.data.schema.field("input_ids").type == pa.large_list(pa.int32()), "more than 2³¹ tokens, too"
    assert packed.tokens == len(line) - 1
    first = data_bytes(tokenizer, line[0])
    assert packed.bytes == sum(len(text.encode()) for text in texts) - len(first)
    assert packed.characters == sum(len(text) for text in texts) - len(first.decode())
    documents, current = [], []
    for token in [*line, 1]:
        if token == 1:
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert documents == texts


def data_bytes(tokenizer, token: int) -> bytes:
    """A byte-level entry as bytes, by GPT-2's table written out the long way."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(table[char] for char in tokenizer.convert_ids_to_tokens(token))


def test_pack_ends_documents_by_endoftext_even_where_eos_differs(tokenizer) -> None:
    tokenizer.eos_token = "<|end|>"
    try:
        ids = packing.pack(["cat", "dog", "mat"], tokenizer, 2).ids.tolist()
        assert ids.count(1) == 2 and 5 not in ids
    finally:
        tokenizer.eos_token = "<|endoftext|>"


def test_pack_refuses_what_cannot_be_predicted(tokenizer) -> None:
    for texts in ([], ["x"]):
        with pytest.raises(UserError, match=f"too short: with {len(texts)} tokens"):
            packing.pack(texts, tokenizer, 8)
    with pytest.raises(UserError, match="block_size: 1 is too small"):
        packing.pack(["the cat sat"], tokenizer, 1)


def test_no_token_is_added_and_nothing_is_said_of_lengths(caplog: pytest.LogCaptureFixture) -> None:
    """Llama's tokenizer begins every text with a token of its own, and warns of texts beyond its model's context."""
    begins = train_tokenizer(["the cat"], 262)
    plain = packing.pack(["the cat", "the"], begins, 4).ids.tolist()
    begin = processors.TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 2)])
    begins.backend_tokenizer.post_processor = begin
    assert begins("the")["input_ids"][0] == 2
    begins.model_max_length = 2
    logging.enable_propagation()  # to where the test sees it
    with caplog.at_level("WARNING", logger="transformers"):
        assert packing.pack(["the cat", "the"], begins, 4).ids.tolist() == plain
    logging.disable_propagation()
    assert not caplog.records


def test_a_tokenizer_without_an_end_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    endless = PreTrainedTokenizerFast(tokenizer_object=words)
    endless.name_or_path = "some/model"
    with pytest.raises(UserError) as caught:
        packing.pack(["a b"], endless, 4)
    assert str(caught.value) == "the tokenizer some/model has no token that ends a document"
    endless.eos_token = "b"
    assert packing.document_end(endless) == 1


def test_collate_fills_up_and_leaves_it_out_of_the_labels() -> None:
    ids = np.array([7, 8, 9], dtype=np.int32), np.array([9, 6], dtype=np.int32)
    batch = packing.collate([{"input_ids": ids[0], "row": 4}, {"input_ids": ids[1], "row": 5}])
    assert {part.dtype for part in batch.values()} == {torch.int64}
    assert batch["input_ids"].tolist() == [[7, 8, 9], [9, 6, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [9, 6, -100]] and batch["row"].tolist() == [4, 5]


def test_streamed_rows_are_the_packed_rows(tokenizer, texts: list[str]) -> None:
    whole = packing.pack(texts, tokenizer, 16)
    stream = packing.StreamedRows(texts, tokenizer, 16)
    for _ in range(2):  # the same again
        streamed = list(stream)
        assert streamed == whole.rows.to_list()[: len(streamed)] and len(whole.rows) - len(streamed) <= 1
        assert stream.tokens == 15 * len(streamed)
        assert stream.bytes == sum(len(text.encode()) for text in texts)


def test_a_stream_is_read_no_further_than_its_rows_need(tokenizer) -> None:
    read = []

    def endless():
        for number in itertools.count():
            assert number < 1000, "it is read on and on"
            read.append(number)
            yield "the cat sat"

    stream = packing.StreamedRows(endless(), tokenizer, 8)
    assert (stream.tokens, stream.bytes) == (0, 0), "nothing is read before the first row is wanted"
    first = next(iter(stream))
    assert len(read) <= 100
    assert all(type(token) is int for token in first["input_ids"]), "as json and torch want them"
