"""Near-equal documents are dropped, and a corpus that is streamed is the corpus that is read whole."""

import gzip
import json
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.errors import UserError
from pipeline.text import data


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_near_equal_documents_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"The  Story {i % 50}\n"} for i in range(100)] + [{"text": f"the story {i}"} for i in range(60)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    parts = [data.load_texts(file, split=split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 60 and f"{file}: 100 of 160 documents are duplicates and were dropped" in caplog.text
    assert "The  Story 0\n" in [text for part in parts for text in part], "the first of the equal ones is kept"
    keys = {data.document_key(text) for text in parts[0][:7]}
    rest = data.load_texts(file, split="train", without=keys)
    assert sorted(rest) == sorted(text for text in parts[0] if data.document_key(text) not in keys)
    assert f"{file}: 7 of 54 documents are held out too and were left out" in caplog.text
    data.load_texts(file, split="train", without=set(sorted(keys)[:1]))
    assert f"{file}: 1 of 54 documents is held out too and was left out" in caplog.text
    assert caplog.text.count("held out too") == 2


@pytest.mark.slow
def test_many_short_documents_take_linear_time(tmp_path: Path) -> None:
    """The quadratic way took 10 s of CPU for these and 110 s for 200,000."""
    file = write_rows(tmp_path / "many.jsonl", [{"text": f"document {i}", "prompt": f"p{i}"} for i in range(60_000)])
    started = time.process_time()
    assert len(data.load_texts(file, split="train")) == len(data.load_prompts(file, split="train").rows) == 54_000
    assert time.process_time() - started < 8


def test_seen_keys_are_a_set() -> None:
    rng = np.random.default_rng(0)
    keys = [int(k).to_bytes(8, "big") for k in rng.integers(0, 3000, size=10_000)]
    seen, reference = data.SeenKeys(merge_at=64), set()
    for key in [b"\xff" * 8, *keys, b"\xff" * 8]:
        assert seen.add(key) == (key not in reference)
        reference.add(key)
    assert len(seen.sorted) > 2000 and (np.diff(seen.sorted) > 0).all()


def pass_of(stream: data.TextStream, count: int) -> list[str]:
    return list(islice(stream, count))


def test_a_stream_holds_out_what_memory_does(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 1600} ü"} for i in range(2000)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    memory = {split: set(data.load_texts(file, split=split)) for split in ("train", "validation", "test")}
    stream = {split: data.load_texts(file, split=split, streaming=True) for split in memory}
    assert sum(map(len, stream.values())) == 1600 and set.union(*map(set, stream.values())) == set.union(
        *memory.values()
    )
    agree = sum(text in memory[split] for split in stream for text in stream[split])
    assert agree >= 0.97 * 1600, "only documents at the limits change sides"
    assert 0.03 < len(stream["validation"]) / 1600 < 0.07 and 0.03 < len(stream["test"]) / 1600 < 0.07
    # Another seed, another pass: the sides stay, the order changes.
    train = data.TextStream(file, split="train", seed=1, buffer_size=100)
    count = len(stream["train"])
    both = pass_of(train, 2 * count)
    assert set(both[:count]) == set(both[count:]) == set(stream["train"]) and both[:count] != both[count:]
    assert both[:count] != stream["train"] and train.duplicates > 0
    assert pass_of(train, 2 * count) == both, "the same stream again"
    assert both[:count] != pass_of(data.TextStream(file, split="train", seed=2, buffer_size=100), count)
    without = {data.document_key(text) for text in both[:9]}
    rest = data.TextStream(file, split="train", without=without, max_bytes=300)
    assert not set(both[:9]) & set(pass_of(rest, 50))
    assert 270 < sum(len(t.encode()) for t in rest.one_pass()) <= 300


def test_a_stream_shuffles_within_its_buffer() -> None:
    numbers = [str(i) for i in range(1000)]
    mixed = list(data._shuffled(iter(numbers), random.Random(0), 50))
    assert sorted(mixed) == sorted(numbers) and mixed != numbers
    assert all(int(text) <= place + 50 for place, text in enumerate(mixed)), "nothing comes before it was read"


def test_a_buffer_of_one_keeps_the_order(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": f"document {i}"} for i in range(40)])
    stream = data.TextStream(file, split="train", buffer_size=1)
    whole = list(stream.one_pass())
    assert pass_of(stream, len(whole)) == whole and len(whole) > 25


def test_a_stream_counts_documents_and_duplicates_of_this_iteration(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": f"document {i % 10}"} for i in range(15)])
    write_rows(tmp_path / "test.jsonl", [{"text": "another"}])
    stream = data.TextStream(str(tmp_path), split="train", seed=1)
    assert (stream.documents, stream.duplicates) == (0, 0)
    for _ in range(2):
        assert len(set(pass_of(stream, 10))) == 10
        assert (stream.documents, stream.duplicates) == (15, 5), "those of the iteration before do not count"
        assert stream.held_out == 0
    stream.without = {data.document_key(f"document {i}") for i in (3, 4)}
    rest = {f"document {i}" for i in range(10)} - {"document 3", "document 4"}
    for _ in range(2):
        assert set(pass_of(stream, 8)) == rest
        assert (stream.documents, stream.duplicates, stream.held_out) == (15, 5, 2)
    assert set(data.load_texts(str(tmp_path), split="train", streaming=True, without=stream.without)) == rest


def test_the_key_of_a_document_never_changes() -> None:
    """By it documents are held out: another one would move them to the other side."""
    keys = {data.document_key(text).hex() for text in ("The  Cat\n", "the cat")}
    assert keys == {"d8cb1deb7a9c392a"}  # printf 'the cat' | b2sum -l 64
    assert data.document_key("thecat") != data.document_key("the cat")
    assert data.document_key("ẞ straße") != data.document_key("ss strasse")
    hashes = {0.0: "test", 0.0499: "test", 0.0501: "validation", 0.0999: "validation", 0.1001: "train", 0.9: "train"}
    for share, side in hashes.items():
        assert data._side_of_key(int(share * 2**64).to_bytes(8, "big")) == side, share


def test_no_duplicates_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data.load_texts(write_rows(tmp_path / "t.jsonl", [{"text": f"document {i}"} for i in range(40)]), split="train")
    assert "duplicates" not in caplog.text and "held out" not in caplog.text
    file = write_rows(tmp_path / "u.jsonl", [{"text": f"document {i // 2 * (i > 1)}"} for i in (0, 1, 4, 8)])
    data.load_texts(file, split="train")
    assert f"{file}: 1 of 4 documents is a duplicate and was dropped" in caplog.text


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_generator_streams_what_it_gives_whole(split: str, seed: int) -> None:
    whole, streamed = (
        data.load_texts("stories", split=split, seed=seed, max_bytes=3000, streaming=streaming)
        for streaming in (False, True)
    )
    assert whole == streamed and sum(len(text.encode()) for text in whole) > 2500
    assert whole == list(data.TextStream("stories", split=split, seed=seed, max_bytes=3000).one_pass())
    endless = data.TextStream("stories", split=split, seed=seed).one_pass()
    assert list(islice(endless, len(whole))) == whole, "without a limit it goes on"


def test_one_long_text_is_cut_at_nine_tenths(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    parts = {
        split: data.load_texts(str(tmp_path / "one.txt"), split=split) for split in ("train", "validation", "test")
    }
    assert parts == {"train": [text[:900]], "validation": [text[900:]], "test": [text[900:]]}
    (tmp_path / "two.txt").write_text(f"{text}<|endoftext|>another")
    assert sorted(data.load_texts(str(tmp_path / "two.txt"), split="train")) == [text, "another"]


def test_named_splits_are_whole_and_in_an_order_of_the_seed(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": f"document {i}"} for i in range(30)])
    write_rows(tmp_path / "test.jsonl", [{"text": "one alone"}])
    one, two = (data.load_texts(str(tmp_path), split="train", seed=seed) for seed in (0, 1))
    assert sorted(one) == sorted(two) == sorted(f"document {i}" for i in range(30)) and one != two
    assert data.load_texts(str(tmp_path), split="train") == one and data.load_texts(str(tmp_path), split="test") == [
        "one alone"
    ]
    everything = {data.document_key(text) for text in one}
    with pytest.raises(UserError) as caught:
        data.load_texts(str(tmp_path), split="train", without=everything)
    assert str(caught.value) == f"dataset: {tmp_path} has no text for the split 'train'"


def test_a_split_without_documents_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "few.jsonl", [{"text": "only this"}])
    for texts in (lambda: next(iter(data.TextStream(file, split="validation"))), lambda: documents_of(file)):
        with pytest.raises(UserError) as caught:
            texts()
        assert str(caught.value) == f"dataset: {file} has no text for the split 'validation'"


def documents_of(file: str) -> list[str]:
    return data.load_texts(file, split="validation", streaming=True)


@pytest.mark.slow
def test_every_kind_of_source_streams(tmp_path: Path) -> None:
    rows = [{"text": f'story {i}, "q"\nü'} for i in range(200)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(row["text"] for row in rows), encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress((tmp_path / "b.txt").read_bytes()))
    lines = ["text", *('"{}"'.format(row["text"].replace('"', '""')) for row in rows)]
    (tmp_path / "e.csv").write_text("\n".join(lines), encoding="utf-8")
    expected = data.load_texts(str(tmp_path / "a.jsonl"), split="train", streaming=True)
    assert 160 < len(expected) < 195
    for name in ("b.txt", "c.txt.gz", "d.parquet", "e.csv", "hub"):
        assert data.load_texts(str(tmp_path / name), split="train", streaming=True) == expected, name
    stories = data.TextStream("stories", split="train", max_bytes=None)
    assert len(set(pass_of(stories, 40))) == 40, "the generator has no end, so neither has the stream"


def test_one_long_text_cannot_stream(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("To be, or not to be.\n" * 100)
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=r"one\.txt has no <\|endoftext\|> between documents.*streaming: false"):
            data.load_texts(str(tmp_path / "one.txt"), split=split, streaming=True)
    file = write_rows(tmp_path / "few.jsonl", [{"text": "only this"}])
    with pytest.raises(UserError, match="has no text for the split"):
        next(iter(data.TextStream(file, split="validation")))
