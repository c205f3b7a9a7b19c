"""What the loader says of the rows of several files, to the letter, and what it makes of them together."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from pipeline.errors import UserError
from pipeline.text import data
from reward_data.formats import assistant, user

TEXT = [{"prompt": "t", "completion": "o"}]
PAIR = [{"prompt": "t", "chosen": "o", "rejected": "p"}]


def folder_of(folder: Path, **files: list[dict]) -> str:
    """A folder whose `train_1`, `train_2` and `test` are files of rows."""
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name.replace('_', '-')}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def test_rows_of_all_files_are_counted(tmp_path: Path) -> None:
    one = [{"instruction": f"i{i}", "output": "o" if i else "", "source": "s"} for i in range(4)]
    two = [{"messages": talk, "id": 1} for talk in (user("q") + assistant("r"), user("q") + assistant(""), user("q"))]
    name = folder_of(tmp_path, train_1=one, train_2=two, test=TEXT)
    loaded = data.load_instructions(name, split="train")
    assert loaded.notes == [
        f"{name} (alpaca and messages): 7 rows read, 3 rows dropped: 2 empty reply, 1 no reply by the assistant",
        f"{name}: not used: source, id",
    ]
    assert sorted(loaded.places) == [
        *(f"{name}/train-1.jsonl, line {line}" for line in (2, 3, 4)),
        f"{name}/train-2.jsonl, line 1",
    ]
    assert data.load_instructions(name, split="train", size=1).rows.num_rows == 1
    rows = {row["prompt"][0]["content"]: place for row, place in zip(loaded.rows, loaded.places, strict=True)}
    assert rows["i1"].endswith("train-1.jsonl, line 2") and rows["q"].endswith("train-2.jsonl, line 1")


def test_where_nothing_was_dropped_nothing_is_said_of_it(tmp_path: Path) -> None:
    name = folder_of(tmp_path, train_1=TEXT, train_2=TEXT * 2, test=TEXT)
    assert data.load_instructions(name, split="train").notes == [f"{name} (prompt and completion): 3 rows read"]


def test_one_row_is_told_of_as_one(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    taken_off = [{"prompt": "A long question", "completion": "A long question answer"}]
    name = folder_of(tmp_path / "one", train_1=[{"prompt": "x", "completion": ""}], train_2=taken_off, test=TEXT)
    assert data.load_instructions(name, split="train").notes == [
        f"{name} (prompt and completion): 2 rows read, 1 row dropped: 1 empty reply",
        f"{name}: answers began with their own prompt in 1 row; it was taken off",
    ]
    assert data.load_instructions(name, split="test").notes == [f"{name} (prompt and completion): 1 row read"]
    talk = {"prompt": "other", "chosen": user("Hi") + assistant("x"), "rejected": user("Hi") + assistant("y")}
    name = folder_of(tmp_path / "two", train_1=[talk], test=PAIR)
    assert data.load_preferences(name, split="train").notes[1:] == [
        f"{name}: the field 'prompt' is not in the conversation beside it in 1 row; the conversation was used"
    ]


def test_one_row_of_a_split_or_of_a_file_is_told_of_as_one(tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(4)))
    assert data.load_instructions(str(few), split="test").notes[1:] == ["1 of 4 rows is for 'test'"]
    assert data.load_instructions(str(few), split="train").notes[1:] == ["2 of 4 rows are for 'train'"]
    empty = tmp_path / "empty.jsonl"
    for count, rows in ((1, "its only row is"), (2, "all of its 2 rows are")):
        empty.write_text((json.dumps({"prompt": "p", "completion": ""}) + "\n") * count)
        with pytest.raises(UserError) as caught:
            data.load_instructions(str(empty), split="train")
        assert str(caught.value) == f"dataset: {empty}: {rows} dropped for instructions: {count} empty reply"


def test_prompts_of_both_sides_are_counted() -> None:
    """Where files are named for splits, nobody keeps a prompt from both."""
    places = ["line 1", "line 2", "line 3"]
    talks = [user("Hi") + assistant("Hello") + user("Bye"), user("Hi"), user("No")]
    for same, other, third in (("a", "b", "c"), talks):
        seen = data.Loaded(Dataset.from_list([{"prompt": p} for p in (same, same, other)]), places)
        new = data.Loaded(data.Rows([{"prompt": p} for p in (third, same, other)]), places)
        one = data.Loaded(data.Rows([{"prompt": p} for p in (third, same)]), places[:2])
        splits = {"training": seen, "held-out": new, "test": one, "none": data.Loaded(new.rows.select([0]), places[:1])}
        assert data.repeated_prompts(splits, "rows") == [
            "2 of 3 held-out rows repeat prompts of the training split",
            "1 of 2 test rows repeats a prompt of the training split",
        ]
        assert data.repeated_prompts({"test": one}, "rows") == []


def test_prompts_taken_off_are_counted(tmp_path: Path) -> None:
    long = [{"prompt": f"A long question {i}", "completion": f"A long question {i} answer"} for i in range(3)]
    name = folder_of(tmp_path, train_1=long[:2], train_2=long[2:], test=TEXT)
    loaded = data.load_instructions(name, split="train")
    assert loaded.notes[1:] == [f"{name}: answers began with their own prompt in 3 rows; it was taken off"]
    assert [row["completion"] for row in loaded.rows] == [" answer"] * 3


def test_prompts_that_contradict_are_counted(tmp_path: Path) -> None:
    talks = [user(f"Hi {i}") for i in range(3)]
    rows = [{"prompt": "other", "chosen": talk + assistant("x"), "rejected": talk + assistant("y")} for talk in talks]
    name = folder_of(tmp_path, train_1=rows[:2], train_2=rows[2:], test=PAIR)
    assert data.load_preferences(name, split="train").notes[1:] == [
        f"{name}: the field 'prompt' is not in the conversation beside it in 3 rows; the conversation was used"
    ]


def test_text_in_one_file_and_messages_in_another_are_refused(tmp_path: Path) -> None:
    name = folder_of(tmp_path, train_1=TEXT, train_2=[{"messages": user("q") + assistant("r")}], test=TEXT)
    with pytest.raises(UserError) as caught:
        data.load_instructions(name, split="train")
    place = f"dataset: {name}/train-2.jsonl, line 1"
    assert str(caught.value) == f"{place}: field 'prompt' is text in one file and messages in another"


def test_a_column_of_one_file_is_there_in_all(tmp_path: Path) -> None:
    """A pair without the mark is not flipped; of any other column nothing is known."""
    flipped = [{"prompt": "x", "chosen": "y", "rejected": "z", "flipped": True, "key": 1}]
    name = folder_of(tmp_path, train_1=flipped, train_2=PAIR, test=PAIR)
    pairs = {row["prompt"]: row["flipped"] for row in data.load_preferences(name, split="train").rows}
    assert pairs == {"x": True, "t": False}
    rows = {row["prompt"]: row["flipped"] for row in data.load_prompts(name, split="train").rows}
    assert rows == {"x": True, "t": None}


def test_a_conversation_without_a_user_has_its_side_by_all_of_it() -> None:
    talk = [{"role": "system", "content": "Tell a story."}]
    assert data._prompt_key(talk) == data._prompt_key("Tell a story.") != data._prompt_key(user("Tell a story") + talk)


def test_a_generator_that_makes_no_rows_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_generate", lambda *_, **__: iter(()))
    with pytest.raises(UserError) as caught:
        data.load_instructions("stories", split="test")
    assert str(caught.value) == "dataset: stories has no instructions for the split 'test'"


def test_a_missing_column_is_named_with_what_to_do(tmp_path: Path) -> None:
    name = folder_of(tmp_path, train_1=[{"story": "once", "id": 1}], test=[{"story": "twice"}])
    with pytest.raises(UserError) as caught:
        data.load_texts(name, split="train")
    assert str(caught.value) == (
        f"dataset: {name}/train-1.jsonl has no text column 'text', only story, id; name the right one in text_column"
    )


def test_empty_documents_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [{"text": text} for text in ("", "a", " ", "b", "\n")]
    name = folder_of(tmp_path, train_1=texts, test=[{"text": "c"}])
    assert sorted(data.load_texts(name, split="train")) == ["a", "b"]
    assert f"{name}/train-1.jsonl: 3 of 5 documents are empty and were left out" in caplog.text
    folder_of(tmp_path, train_1=texts[:2])
    assert data.load_texts(name, split="train") == ["a"]
    assert f"{name}/train-1.jsonl: 1 of 2 documents is empty and was left out" in caplog.text
