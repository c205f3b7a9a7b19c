"""Faults that users met between their files and what a stage reads: each came out wrong, or silent, before."""

import gzip
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from pipeline.bounds import check_bounds
from pipeline.checkpoint import write_jsonl
from pipeline.errors import UserError
from pipeline.runtime.arguments import PreferencesArguments, RewardArguments, SFTArguments
from pipeline.text import data
from pipeline.text.sources import data_files, find_sources, say_once, split_of
from reward_data import formats
from reward_data.formats import BadRow, adapt, assistant, user

LOAD = {"instructions": data.load_instructions, "preferences": data.load_preferences, "prompts": data.load_prompts}
SYSTEM = [{"role": "system", "content": "You are a pirate."}]
ROW = {"prompt": "Q", "completion": "A"}


def write_rows(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(number: int, name: str = "q") -> dict[str, str]:
    return {"prompt": f"{name} {number}", "completion": f"answer {number}"}


def refused(sentence: str, load: Any, dataset: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load(str(dataset), **{"split": "train"} | options)
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


# ---- 4: turns -------------------------------------------------------------------------------------------------------

TALK = [*assistant("Which one?"), *user("The red one"), *assistant("Here")]
OTHER = [*TALK[:2], *assistant("No")]


@pytest.mark.parametrize("prompt", [user("Hat?"), "Hat?", [*SYSTEM, *user("Hat?")]])
def test_an_answer_is_the_last_turn_and_the_earlier_ones_are_its_prompt(prompt: Any) -> None:
    pair = {"prompt": prompt, "chosen": TALK, "rejected": OTHER}
    before = [*(user(prompt) if isinstance(prompt, str) else prompt), *TALK[:2]]
    expected = {"prompt": before, "chosen": assistant("Here"), "rejected": assistant("No")}
    assert adapt([pair], "preferences").rows == [expected]
    assert adapt([pair], "instructions").rows == [{"prompt": before, "completion": assistant("Here")}]
    assert adapt([{"prompt": prompt, "completion": TALK}], "instructions").rows == [
        {"prompt": before, "completion": assistant("Here")}
    ]
    whole = [*(user("Hat?") if isinstance(prompt, str) else prompt), *TALK]
    assert adapt([{"messages": whole}], "instructions").rows == [{"prompt": before, "completion": assistant("Here")}]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (TALK, [*assistant("That?"), *user("No"), *assistant("No")], "no shared prompt"),
        (TALK, assistant("No"), "no shared prompt"),
        (TALK[:2], OTHER, "no reply by the assistant"),
        (TALK, [*OTHER, *user("Oh")], "no reply by the assistant"),
        ([*TALK[:2], *assistant(" ")], OTHER, "empty reply"),
        ([*assistant(""), *TALK[1:]], [*assistant(""), *OTHER[1:]], "empty prompt"),
    ],
)
def test_pairs_whose_turns_do_not_fit_are_counted(chosen: list, rejected: list, reason: str) -> None:
    good = {"prompt": user("Hat?"), "chosen": TALK, "rejected": OTHER}
    adapted = adapt([good, good | {"chosen": chosen, "rejected": rejected}], "preferences")
    assert (len(adapted.rows), adapted.dropped) == (1, {reason: 1})


def test_turns_in_plain_text_are_turns_too() -> None:
    prompt, more = "\n\nHuman: Hat?\n\nAssistant:", " Which?\n\nHuman: Red\n\nAssistant:"
    row = {"prompt": prompt, "chosen": more + " Here", "rejected": more + " No"}
    assert adapt([row], "preferences").rows == [{"prompt": prompt + more, "chosen": " Here", "rejected": " No"}]
    ended = {"prompt": prompt, "completion": " Which?\n\nHuman: Red"}
    assert adapt([row, ended | {"chosen": None}], "instructions").dropped == {"no reply by the assistant": 1}


def test_no_user_turn_is_ever_in_an_answer() -> None:
    turns = [user("u"), assistant("a"), SYSTEM, user("v"), assistant("b")]
    for size in range(1, 6):
        for start in range(6 - size):
            talk = [message for turn in turns[start : start + size] for message in turn]
            rows = [
                {"messages": talk},
                {"conversations": [{"from": m["role"], "value": m["content"]} for m in talk]},
                {"prompt": user("x"), "completion": talk},
                {"prompt": "x", "completion": talk},
                {"prompt": user("x"), "chosen": talk, "rejected": [*talk[:-1], *assistant("other")]},
            ]
            for made in (made for row in rows for made in adapt([row, row], "prompts").rows if made):
                assert isinstance(made["prompt"], list)
            for row in rows:
                if "system" in {talk[-1]["role"]} or talk[-1]["role"] == "user":
                    continue
                for made in adapt([row], "instructions").rows:
                    assert [message["role"] for message in made["completion"]] == ["assistant"]


# ---- 5: the prompt stands once --------------------------------------------------------------------------------------

HH = "\n\nHuman: Q\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "before", "answer"),
    [
        (HH, HH, " good"),
        (HH, HH.lstrip(), " good"),  # the blanks before it are gone
        (HH + " ", HH + " ", "good"),
        (HH + " ", HH, "good"),
        (HH + " ", HH + "\n", "good"),
        ("Q", "Q ", "good"),
        ("2+2=", "2+2=", "4"),
        ("What is two and two", "What is two and two", "? It is 4"),
    ],
)
def test_a_prompt_that_the_answers_repeat_stands_once(prompt: str, before: str, answer: str) -> None:
    if prompt == "What is two and two":
        answer = " is a question"
    row = {"prompt": prompt, "chosen": before + answer, "rejected": before + " bad"}
    (made,) = adapt([row], "preferences").rows
    assert made["prompt"] == prompt and "Q" not in made["chosen"] + made["rejected"]
    assert (made["chosen"].strip(), made["rejected"].strip()) == (answer.strip(), "bad")
    one = adapt([{"prompt": prompt, "completion": before + answer}], "instructions")
    assert one.rows == [{"prompt": prompt, "completion": made["chosen"]}] and one.repeated == 1


def test_prompt_and_answer_are_the_text_that_stood_there() -> None:
    row = {"prompt": HH, "chosen": HH + " good", "rejected": HH + " bad"}
    (made,) = adapt([row], "preferences").rows
    assert made["prompt"] + made["chosen"] == row["chosen"] and made["prompt"] + made["rejected"] == row["rejected"]


def test_in_some_rows_alone_the_prompt_is_taken_off_too() -> None:
    plain = [{"prompt": f"Tell me of {i}.", "completion": f"{i} is a number."} for i in range(9)]
    adapted = adapt([*plain, {"prompt": "Tell me of 10.", "completion": "Tell me of 10. Ten!"}], "instructions")
    assert adapted.rows[-1]["completion"] == " Ten!" and adapted.repeated == 1
    assert [row["completion"] for row in adapted.rows[:9]] == [row["completion"] for row in plain]


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Hello", "Hello! How are you?"), ("Hi", "Hi there"), ("cat", "category"), ("Yes", "Yes")]
)
def test_an_answer_that_begins_with_a_word_of_the_prompt_stays(prompt: str, answer: str) -> None:
    rows = [{"prompt": prompt, "completion": answer}, *({"prompt": f"p{i}", "completion": "x"} for i in range(3))]
    assert adapt(rows, "instructions").rows[0]["completion"] == answer


def test_messages_that_hold_their_prompt_are_not_asked_twice() -> None:
    whole = [*SYSTEM, *user("Q")]
    for prompt, chosen in (
        (user("Q"), [*user("Q"), *assistant("good")]),
        (user("Q"), [*whole, *assistant("good")]),
        (whole, [*user("Q "), *assistant("good")]),
        ("Q", [*user("Q"), *assistant("good")]),
    ):
        rejected = [*chosen[:-1], *assistant("bad")]
        (made,) = adapt([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], "preferences").rows
        assert [m["content"].strip() for m in made["prompt"] if m["role"] == "user"] == ["Q"]
        assert (made["chosen"], made["rejected"]) == (assistant("good"), assistant("bad"))
        (made,) = adapt([{"prompt": prompt, "completion": chosen}], "instructions").rows
        assert [m["content"].strip() for m in made["prompt"] if m["role"] == "user"] == ["Q"]
    (made,) = adapt([{"prompt": "Q", "chosen": HH + " good", "rejected": HH + " bad"}], "preferences").rows
    assert made == {"prompt": user("Q"), "chosen": assistant("good"), "rejected": assistant("bad")}
    # A conversation of its own beside a prompt that says something else is used, and that is counted
    adapted = adapt(
        [{"prompt": "Other", "chosen": [*user("Q"), *assistant("a")], "rejected": [*user("Q"), *assistant("b")]}],
        "preferences",
    )
    assert adapted.rows[0]["prompt"] == user("Q") and adapted.contradicted == 1


# ---- 6: labels of unpaired data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[True, False], [0, 1], [1.0, 0.0], ["0", "1"], ["True", "False"], ["true", "FALSE"], [1, 1], ["", "no"], [-1, 1]],
)
def test_labels_of_any_spelling_are_refused(tmp_path: Path, labels: list) -> None:
    for answers in (
        {"prompt": "Q", "completion": "A"},
        {"messages": [*user("Q"), *assistant("A")]},
        {"instruction": "Q", "output": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ):
        rows = [answers | {"label": label} for label in labels]
        for kind in ("instructions", "preferences"):
            with pytest.raises(ValueError, match=r"the rows are unpaired.*drop the column 'label'"):
                adapt(rows, kind)
        assert len(adapt(rows, "prompts").rows) == 2
    lines = [f"Q,A,{label}" for label in labels]
    (tmp_path / "kto.csv").write_text("\n".join(["prompt,completion,label", *lines]))
    refused("the rows are unpaired", data.load_instructions, tmp_path / "kto.csv")


def test_other_labels_are_answers_or_unused() -> None:
    rows = [{"prompt": "POST: a TL;DR:", "label": "Short."}, {"prompt": "POST: b TL;DR:", "label": "True"}]
    assert [row["completion"] for row in adapt(rows, "instructions").rows] == [" Short.", " True"]
    with pytest.raises(ValueError, match="call it completion if it is the answer itself"):
        adapt(rows[1:], "instructions")
    adapted = adapt([ROW | {"label": "science"}], "instructions")
    assert adapted.rows == [ROW] and adapted.unused == ["label"]
    llmbar = {"input": "Hi", "output_1": "Hello", "output_2": "No", "label": 1}
    assert adapt([llmbar, llmbar], "preferences").rows[0]["chosen"] == assistant("Hello")


# ---- 7: columns that are part of what is meant ----------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.SYSTEM)
def test_a_system_column_is_part_of_the_prompt(name: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for row in (
        {"instruction": "Q", "output": "A"},
        {"conversations": turns},
        {"messages": [*user("Q"), *assistant("A")]},
        {"messages": [{"role": "system", "content": ""}, *user("Q"), *assistant("A")]},
        {"messages": [*SYSTEM, *user("Q"), *assistant("A")]},
        {"prompt": user("Q"), "completion": assistant("A")},
        {"prompt": user("Q"), "chosen": assistant("A"), "rejected": assistant("B")},
        {"conversations": turns[:1], "chosen": turns[1], "rejected": {"from": "gpt", "value": "B"}},
    ):
        for kind in ("instructions", "prompts"):
            assert adapt([row | {name: "You are a pirate."}], kind).rows[0]["prompt"] == [*SYSTEM, *user("Q")], row
        assert adapt([row | {name: ""}, row | {name: None}, row], "prompts").rows[0]["prompt"][-1:] == user("Q")
    with pytest.raises(BadRow, match="row 1: the system message of the conversation and the column beside it differ"):
        adapt([{"messages": [*SYSTEM, *user("Q")], name: "You are a cook."}], "prompts")
    with pytest.raises(BadRow, match=f"row 2: field '{name}' stands beside a prompt in plain text, which has no place"):
        adapt([ROW, ROW | {name: "You are a pirate."}], "instructions")


def test_the_history_is_part_of_the_prompt() -> None:
    row = {"instruction": "Q", "output": "A", "system": "You are a pirate.", "history": [["Hi", "Hello"]]}
    before = [*SYSTEM, *user("Hi"), *assistant("Hello"), *user("Q")]
    assert adapt([row], "instructions").rows == [{"prompt": before, "completion": assistant("A")}]
    assert adapt([row | {"history": before[1:3]}], "prompts").rows[0]["prompt"] == before
    assert adapt([row | {"history": [], "system": None}], "prompts").rows[0]["prompt"] == user("Q")
    for history in ("earlier", [["Hi"]], [["Hi", 3]], {"Hi": "Hello"}):
        with pytest.raises(BadRow, match="field 'history' should be a list of"):
            adapt([row | {"history": history}], "instructions")
    with pytest.raises(BadRow, match="field 'history' stands beside a prompt in plain text"):
        adapt([ROW | {"history": [["Hi", "Hello"]]}], "instructions")


def test_dolly_and_its_context() -> None:
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"}
    adapted = adapt([row, row | {"context": ""}], "instructions")
    assert [made["prompt"] for made in adapted.rows] == [user("Who?\n\nAda wrote it."), user("Who?")]
    assert adapted.rows[0]["completion"] == assistant("Ada") and adapted.unused == ["category"]
    with pytest.raises(BadRow, match="fields 'input' and 'context' say two different things"):
        adapt([row | {"input": "Bob wrote it."}], "instructions")


CALL = [{"function": {"name": "f"}}]
CHANGED = {
    "context": (ROW | {"context": "A passage."}, "'context'"),
    "input": ({"messages": [*user("Q"), *assistant("A")], "input": "A text."}, "'input'"),
    "instruction": (ROW | {"instruction": "Be brief."}, "'instruction'"),
    "tools": ({"messages": [*user("Q"), *assistant("A")], "tools": [{"name": "f"}]}, "'tools'"),
    "weight": (ROW | {"weight": 0}, "'weight' 0"),
    "weight in text": (ROW | {"weight": "0.5"}, "'weight' '0.5'"),
    "images": (ROW | {"images": ["a.png"]}, "'images'"),
    "tool_calls": (
        {"messages": [*user("Q"), {"role": "assistant", "content": "", "tool_calls": CALL}]},
        "'tool_calls'",
    ),
    "no content": ({"messages": [*user("Q"), {"role": "assistant", "tool_calls": CALL}]}, "'tool_calls'"),
    "function_call": (
        {"messages": [*user("Q"), {"role": "assistant", "content": "x", "function_call": {"n": 1}}]},
        "call",
    ),
    "reasoning": ({"messages": [*user("Q"), assistant("A")[0] | {"reasoning_content": "hm"}]}, "'reasoning_content'"),
    "turn weight": ({"messages": [*user("Q"), assistant("A")[0] | {"weight": 0}]}, "'weight' 0"),
    "turn train": ({"messages": [*user("Q"), assistant("A")[0] | {"train": False}]}, "'train' False"),
    "tool role": ({"messages": [*user("Q"), {"role": "tool", "content": "3"}, *assistant("A")]}, "role 'tool'"),
    "function role": (
        {"messages": [*user("Q"), {"role": "function", "content": "3"}, *assistant("A")]},
        "role 'function'",
    ),
    "image part": (
        {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "completion": "A"},
        "'image_url'",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_the_meaning_is_refused_by_name_and_place(name: str, tmp_path: Path) -> None:
    row, named = CHANGED[name]
    plain = {key: row[key] for key in row if key in ("prompt", "completion")} or {
        "messages": [*user("Q"), *assistant("A")]
    }
    file = write_rows(tmp_path / "rows.jsonl", [plain if name != "image part" else ROW, row])
    refused(rf"rows\.jsonl, line 2: .*{named}", data.load_instructions, file)


def test_what_says_nothing_changes_nothing() -> None:
    empty = {"tools": [], "images": None, "weight": 1, "context": "", "functions": "[]", "loss_weight": "1.0"}
    message = assistant("A")[0] | {"tool_calls": None, "weight": 1, "train": True, "function_call": {}}
    assert adapt([ROW | empty], "instructions").rows == [ROW]
    assert adapt([{"messages": [*user("Q"), message]}], "instructions").rows[0]["completion"] == assistant("A")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}]}]
    assert adapt([{"prompt": parts, "completion": "A"}], "instructions").rows[0]["prompt"] == user("Q!")


def test_what_is_merely_unused_is_named_once(tmp_path: Path) -> None:
    message = user("Q")[0] | {"name": "Ada", "id": None}
    rows = [{"messages": [message, *assistant(f"A{i}")], "source": "web", "n": i} for i in range(30)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    loaded = data.load_instructions(file, split="train")
    assert loaded.notes.count(f"{file}: not used: source, n, messages.name") == 1


# ---- 12, 13, 23, 47: folders ----------------------------------------------------------------------------------------


def test_names_of_folders_count_as_names_of_files_do(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for shard in range(2):
            rows = [asked(i, f"{part}{shard}") for i in range(50)]
            write_rows(tmp_path / part / "deep" / f"part{shard}.jsonl", rows)
    parts = {split: data.load_instructions(str(tmp_path), split=split) for split in ("train", "validation", "test")}
    assert [len(part.rows) for part in parts.values()] == [100, 100, 100]
    assert {row["prompt"][:4] for row in parts["train"].rows} == {"trai"}
    assert parts["test"].places[0].startswith(str(tmp_path / "test" / "deep" / "part"))
    write_rows(tmp_path / "test" / "train.jsonl", [asked(1)])
    refused("test/train is for test and train at once, by the names of its folder", data.load_instructions, tmp_path)


def test_what_a_name_tells() -> None:
    told = {
        "train-00000-of-00002": "train",
        "data/dev/part": "validation",
        "Testing/x": "test",
        "v1.2.test": "test",
        "contest/latest": None,
        "preferences/train": "train",
        "ppo/part": "ppo",
    }
    assert {name: split_of(name) for name in told} == told


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [asked(i) for i in range(20)])
    for hidden in (".ipynb_checkpoints/train-checkpoint.jsonl", ".train.jsonl.swp", "._train.jsonl", "a/.b/c.jsonl"):
        write_rows(tmp_path / hidden, [{"prompt": "hidden", "completion": "x"}])
    assert data_files(tmp_path) == [tmp_path / "train.jsonl"]
    assert data.load_instructions(str(tmp_path), split="train").rows.num_rows == 18
    assert data.load_texts(str(tmp_path), split="train", text_column="completion")


def test_files_that_are_left_out_of_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        write_rows(tmp_path / f"{name}.jsonl", [asked(i, name) for i in range(5)])
    (tmp_path / "more.xlsx").write_bytes(b"x")
    loaded = data.load_instructions(str(tmp_path), split="train")
    assert any("extra.jsonl is not read: the other names tell a split" in note for note in loaded.notes)
    assert any("more.xlsx is not read: a spreadsheet; save it as .csv" in note for note in loaded.notes)


def test_the_state_of_a_stage_is_no_data(tmp_path: Path) -> None:
    """`preferences` keeps its parts in `checkpoints` beside train.jsonl."""
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [asked(i, name) for i in range(5)])
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "part.json").write_text("[]")
    (tmp_path / "stage.json").write_text("{}")
    loaded = data.load_instructions(str(tmp_path), split="train")
    assert len(loaded.rows) == 5 and not any("not read" in note for note in loaded.notes)


def test_links_are_followed_within_the_folder_alone(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    write_rows(folder / ".store" / "rows.jsonl", [asked(i) for i in range(40)])
    write_rows(outside / "secret.jsonl", [asked(1, "secret")])
    (folder / "linked").symlink_to(folder / ".store", target_is_directory=True)
    (folder / "again.jsonl").symlink_to(folder / ".store" / "rows.jsonl")
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "round2").symlink_to("round")
    assert len(data_files(folder)) == 1, "one file, whatever links lead to it"
    assert data.load_instructions(str(folder), split="train").rows.num_rows == 36
    (tmp_path / "alias").symlink_to(folder)
    assert data.load_instructions(str(tmp_path / "alias"), split="train").rows.num_rows == 36
    for target, is_folder in ((outside, True), (outside / "secret.jsonl", False)):
        link = folder / f"{target.stem}.jsonl"
        link.symlink_to(target, target_is_directory=is_folder)
        refused(rf"{link} is a link out of the folder, to {target}", data.load_instructions, folder)
        link.unlink()
    (folder / "x.jsonl").symlink_to("nowhere.jsonl")
    refused("x.jsonl is a link to nothing", data.load_instructions, folder)


def test_one_file_is_not_on_two_sides(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [asked(1)])
    (tmp_path / "test.jsonl").symlink_to("train.jsonl")
    refused("are one file, under the names of two splits", data.load_instructions, tmp_path)


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def test_a_card_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "secret.parquet", [asked(i, "secret") for i in range(20)])
    write_parquet(tmp_path / "a" / "b" / "mine.parquet", [asked(i, "mine") for i in range(20)])
    for path in ("../../secret.parquet", str(tmp_path / "secret.parquet")):
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n"
        (tmp_path / "a" / "b" / "README.md").write_text(card)
        rows = data.load_instructions(str(tmp_path / "a" / "b"), split="train").rows
        assert rows.num_rows == 18 and all(row["prompt"].startswith("mine") for row in rows)
        texts = data.load_texts(str(tmp_path / "a" / "b"), split="train", text_column="prompt", streaming=True)
        assert texts and all(text.startswith("mine") for text in texts)


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    rows = Dataset.from_list([asked(i) for i in range(40)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "two")
    (tmp_path / "one" / "cache-1.arrow").write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    one = data.load_instructions(str(tmp_path / "one"), split="train")
    assert one.rows.num_rows == 36 and "row" in one.places[0]
    sizes = [data.load_instructions(str(tmp_path / "two"), split=split).rows.num_rows for split in ("train", "test")]
    assert sizes == [40, 5]
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../two/train/data-00000-of-00001.arrow"}]
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    refused("holds no data files", data.load_instructions, tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    refused("state.json is damaged", data.load_instructions, tmp_path / "one")


def test_more_kinds_of_files(tmp_path: Path) -> None:
    rows = [asked(i) for i in range(20)]
    expected = data.load_instructions(write_rows(tmp_path / "a.jsonl", rows), split="train").rows.to_list()
    table = "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in rows)
    (tmp_path / "b.tsv").write_text(table)
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(table.encode()))
    write_rows(tmp_path / "c.ndjson", rows)
    with (
        pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, (t := pa.Table.from_pylist(rows)).schema) as out,
    ):
        out.write_table(t)
    for name in ("b.tsv", "b.tsv.gz", "c.ndjson", "d.arrow"):
        assert data.load_instructions(str(tmp_path / name), split="train").rows.to_list() == expected, name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.xlsx", "a spreadsheet; save it as .csv"),
        ("a.zip", "an archive; unpack it"),
        ("a.tar.gz", "an archive; unpack it"),
        ("a.jsonl.zst", "compressed in a way"),
        ("a.pkl", "a file of Python objects"),
        ("a.md", "known are .txt, .jsonl"),
        ("a.arrow", "cannot be read as arrow"),
    ],
)
def test_other_kinds_are_named_for_what_they_are(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    refused(f"{name} .*{sentence}", data.load_instructions, tmp_path / name)
    if "known" not in sentence and "arrow" not in name:
        refused(f"holds no data files .*{sentence}", data.load_instructions, tmp_path)


# ---- 14: CSV --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("line", [2, 20, 201])
@pytest.mark.parametrize("broken", ['"q,a', 'q,"a', '"q "so" on",a', 'q,"two\nlines'])
def test_an_open_quote_is_named_by_its_line(tmp_path: Path, line: int, broken: str, suffix: str) -> None:
    mark = {"csv": ",", "tsv": "\t"}[suffix]
    for quoted in ('"q {}"', "q {}"):  # with and without quotes that may close it further on
        lines = ["prompt,completion", *(f"{quoted.format(i)},a {i}" for i in range(2, 202))]
        lines[line - 1] = broken
        (tmp_path / f"a.{suffix}").write_text("\n".join(lines).replace(",", mark))
        refused(rf"a\.{suffix}, line {line}: a quote opens there", data.load_instructions, tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_no_quote_can_be_lost_or_added_in_silence(tmp_path: Path, columns: int) -> None:
    """Whatever texts stand around it: with newlines, commas and quotes, so that another one may close it by chance."""
    texts = ["\nHuman: a", "b,", ",c", 'say ""d""', "e", ",\n", "f\n", '""', "g, h"]
    rows = [[texts[(row * columns + i) % len(texts)] for i in range(columns)] for row in range(12)]
    header = ",".join(["prompt", "completion", "third"][:columns])
    whole = "\n".join([header, *(",".join(f'"{text}"' for text in row) for row in rows)]) + "\n"
    (tmp_path / "a.csv").write_text(whole)
    assert sum(1 for _ in find_sources(str(tmp_path / "a.csv"))[0].read()) == 12
    places = [i for i, char in enumerate(whole) if char == '"']
    doubled = {i for i in places if whole[i - 1] == '"' or whole[i + 1] == '"'}
    for place in sorted({*places} - doubled):
        for broken in (whole[:place] + whole[place + 1 :], whole[:place] + '"' + whole[place:]):
            (tmp_path / "b.csv").write_text(broken)
            with pytest.raises(UserError, match=r"b\.csv, lines? \d+"):
                list(find_sources(str(tmp_path / "b.csv"))[0].read())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prompt,completion\na,b\nc\rd,e\n", r"line 3: a carriage return stands in the middle of the line"),
        ("prompt,completion\ra,b\rc,d", r"line 1: a carriage return stands in the middle of the line"),
        ("prompt,completion,prompt\na,b,c\n", "line 1: the header of the csv names the column 'prompt' twice"),
        ("prompt,completion, prompt\na,b,c\n", "names the column 'prompt' twice"),
        (",prompt,completion\n0,a,b\n", r"line 1: the header of the csv has no name for column 1; .*index=False"),
        ("prompt;completion\na;b\n", "has one column, 'prompt;completion'; if ';' stands between its columns"),
        ('prompt,completion\n"a\nb",c\nd\n', r"line 4 has more or fewer fields than the header \(1, not 2\)"),
        ('prompt,completion\na,b\n5" disk,c\n', "line 3: a quote stands in a field that is not in quotes"),
        ("prompt,completion\na,b,c\n", r"line 2 has more or fewer fields than the header \(3, not 2\)"),
    ],
)
def test_a_csv_that_is_wrong_is_refused_with_its_line(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode())
    refused(
        rf"a\.csv, {sentence}" if sentence.startswith("line") else sentence, data.load_instructions, tmp_path / "a.csv"
    )


def test_a_good_csv_is_read_as_it_is(tmp_path: Path) -> None:
    content = 'prompt, completion\r\n"a\rb","say ""hi"""\r\n\r\n"5"" disk","x\ny"\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode("utf-8-sig"))
    loaded = data.load_instructions(str(tmp_path / "a.csv"), split="train")
    assert sorted(map(tuple, (row.values() for row in loaded.rows))) == [('5" disk', "x\ny"), ("a\rb", 'say "hi"')]
    assert sorted(place[-6:] for place in loaded.places) == ["line 2", "line 4"]


def test_a_name_that_stands_twice_is_refused_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "b", "x": 1}\n')
    refused(
        r"a\.jsonl, line 2 cannot be read: the field 'prompt' stands there twice",
        data.load_prompts,
        tmp_path / "a.jsonl",
    )
    (tmp_path / "a.json").write_text('[{"prompt": "a"},\n {"prompt": "a", "prompt": "b"}]')
    refused(r"a\.json, row 2: the field 'prompt' stands there twice", data.load_prompts, tmp_path / "a.json")
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    refused(r"a\.parquet has the column 'prompt' twice", data.load_prompts, tmp_path / "a.parquet")


# ---- 15: time -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_time_is_linear_in_the_rows(tmp_path: Path) -> None:
    """160,000 pairs took 87 s of CPU, 200,000 documents 108 s.

    Sixteen times as many rows take about 16 times as long, and 256 times where each row looks at every other. The
    bound lies between them, far from both: this is no measurement of speed, and other programs may run beside it.
    """

    def seconds(count: int, load: Any, **options: Any) -> float:
        rows = [{"prompt": f"p {i}", "chosen": f"c {i}", "rejected": "r", "text": f"t {i}"} for i in range(count)]
        file = write_rows(tmp_path / f"{count}.jsonl", rows)
        started = time.process_time()
        load(file, split="train", **options)
        return time.process_time() - started

    for load, options in ((data.load_preferences, {}), (data.load_texts, {"max_bytes": 2_000_000})):
        small, large = seconds(5_000, load, **options), seconds(80_000, load, **options)
        assert large < 64 * max(small, 0.05), load


# ---- 17: places -----------------------------------------------------------------------------------------------------


def test_each_row_knows_its_place(tmp_path: Path) -> None:
    lines = [json.dumps(asked(i)) + ("\n" if i % 3 else "\n\n") for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    where = {
        f"q {i}": number
        for number, line in enumerate("".join(lines).split("\n"), 1)
        if line
        for i in [json.loads(line)["prompt"].split()[1]]
    }
    for kind in ("instructions", "prompts"):
        for split in ("train", "validation", "test"):
            loaded = LOAD[kind](str(tmp_path / "a.jsonl"), split=split, seed=3, size=50)
            assert len(loaded.places) == len(loaded.rows)
            for row, place in zip(loaded.rows, loaded.places, strict=True):
                assert place == f"{tmp_path}/a.jsonl, line {where[row['prompt']]}"


def test_places_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [asked(i) for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.csv").write_text('prompt,completion\n"q 0\n",answer 0\nq 1,answer 1\n')
    write_parquet(tmp_path / "c.parquet", rows)
    expected = {
        "a.json": ["row 1 (line 2)", "row 2 (line 6)"],
        "b.csv": ["line 2", "line 4"],
        "c.parquet": ["row 1", "row 2"],
    }
    for name, places in expected.items():
        loaded = data.load_instructions(str(tmp_path / name), split="train")
        found = sorted(zip((row["prompt"] for row in loaded.rows), loaded.places, strict=True))
        assert [place for _, place in found] == [f"{tmp_path / name}, {place}" for place in places]
    (tmp_path / "d.txt").write_text(
        "one\n<|endoftext|>\n\ntwo<|endoftext|>three\n<|endoftext|>\nfour \ud83d\n", errors="ignore"
    )
    places = [place[-6:] for place, _ in find_sources(str(tmp_path / "d.txt"))[0].read()]
    assert places == ["line 1", "line 4", "line 4", "line 6"]
    assert list(data.load_prompts("stories", split="ppo", size=2).places) == ["stories, row 1", "stories, row 2"]


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    rows: list[Any] = [asked(i) for i in range(1500)]
    rows[1411] = {"prompt": "q", "completion": 3}
    file = write_rows(tmp_path / "train.jsonl", rows)
    refused(
        r"train\.jsonl, line 1412: field 'completion' should be text or messages, but is int",
        data.load_instructions,
        file,
    )
    write_rows(tmp_path / "test.jsonl", [asked(1)])
    refused(r"train\.jsonl, line 1412: field", data.load_instructions, tmp_path)
    write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": 3}])
    refused(r"t\.jsonl, line 2: field 'text' should be text", data.load_texts, tmp_path / "t.jsonl")


# ---- 18, 19: columns beside -----------------------------------------------------------------------------------------


def test_a_column_of_some_rows_is_there_in_all(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}"} | ({"answer": i} if i == 7 else {}) for i in range(60)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    for split in ("ppo", "validation", "test"):
        for seed in range(3):
            loaded = data.load_prompts(file, split=split, seed=seed, size=2).rows
            assert loaded.column_names == ["prompt", "answer"]
            assert all(row["answer"] == (7 if row["prompt"] == "q 7" else None) for row in loaded)
    write_rows(tmp_path / "b" / "one.jsonl", rows[:6])
    write_rows(tmp_path / "b" / "two.jsonl", rows[6:])
    assert all(row.keys() == {"prompt", "answer"} for row in data.load_prompts(str(tmp_path / "b"), split="ppo").rows)


def test_values_reach_the_rewards_as_they_are(tmp_path: Path) -> None:
    values = ["n/a", 1, 2.5, None, ["x", 1], {"a": 1}, {"b": {"c": "3"}}, True, 2**70, "3"]
    rows = [{"prompt": f"q {i}", "score": value} for i, value in enumerate(values)]
    write_rows(tmp_path / "test.jsonl", rows[:1])
    write_rows(tmp_path / "ppo.jsonl", rows)
    loaded = data.load_prompts(str(tmp_path), split="ppo", seed=1).rows
    assert sorted(loaded, key=lambda row: row["prompt"]) == rows
    columns = loaded.select([0, 0, 1]).to_dict()
    assert list(columns) == ["prompt", "score"] and len(columns["score"]) == 3
    assert loaded["prompt"] == [row["prompt"] for row in loaded] and loaded.num_rows == 10


def test_unused_columns_of_mixed_types_stop_no_stage(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "c", "rejected": "r"}
    odd = ["n/a", 1, None, {"a": [1, "b"]}, 2**70]
    rows = [pair | {"prompt": f"q {i}", "score": odd[i % 5], "flipped": odd[i % 5]} for i in range(40)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    loaded = data.load_preferences(file, split="train")
    assert loaded.rows.column_names == ["prompt", "chosen", "rejected"] and len(loaded.rows) == 36
    assert f"{file}: not used: score, flipped" in loaded.notes
    assert data.load_instructions(file, split="train").rows.column_names == ["prompt", "completion"]
    assert len(data.load_prompts(file, split="train").rows) == 36
    marked = [row | {"flipped": True} if i % 2 else pair | {"prompt": f"q {i}"} for i, row in enumerate(rows)]
    flipped = data.load_preferences(write_rows(tmp_path / "b.jsonl", marked), split="train").rows
    assert all(row["flipped"] == (int(row["prompt"].split()[1]) % 2 == 1) for row in flipped)


# ---- 20: empty fields -----------------------------------------------------------------------------------------------

EMPTY = {
    "prompt and completion": ("instructions", ROW, ("prompt", "completion")),
    "alpaca": ("instructions", {"instruction": "Q", "input": "", "output": "A"}, ("instruction", "output")),
    "text pairs": ("preferences", {"prompt": "Q", "chosen": "A", "rejected": "B"}, ("prompt", "chosen", "rejected")),
    "transcripts": ("preferences", {"chosen": HH + " a", "rejected": HH + " b"}, ("chosen", "rejected")),
    "rasbt": (
        "preferences",
        {"instruction": "Q", "chosen": "A", "rejected": "B"},
        ("instruction", "chosen", "rejected"),
    ),
    "llmbar": (
        "preferences",
        {"input": "Q", "output_1": "A", "output_2": "B", "label": 1},
        ("input", "output_1", "output_2"),
    ),
    "prompts": ("prompts", {"prompt": "Q"}, ("prompt",)),
    "tl;dr": ("instructions", {"prompt": "Q TL;DR:", "label": "A"}, ("label",)),
}
EMPTY_MESSAGES = {
    "messages": ("instructions", "messages", [[*user("Q"), *assistant("")], [*user(" "), *assistant("A")], []]),
    "content": ("instructions", "messages", [[*user("Q"), {"role": "assistant", "content": None}]]),
    "prompts": ("prompts", "prompt", [user(""), [], SYSTEM]),
    "sharegpt": ("instructions", "conversations", [[{"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}]]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_with_an_empty_field_is_dropped_and_counted(name: str, tmp_path: Path) -> None:
    kind, row, fields = EMPTY[name]
    for field in fields:
        rows = [row] * 30 + [row | {field: value} for value in ("", " \n", None)]
        file = write_rows(tmp_path / f"{field}.jsonl", rows)
        loaded = LOAD[kind](file, split="train")
        assert sum("33 rows read, 3 rows dropped: " in note for note in loaded.notes) == 1, (field, loaded.notes)
        missing = [row] * 30 + [{key: value for key, value in row.items() if key != field}]
        adapted = adapt(missing, kind)
        assert (len(adapted.rows), adapted.dropped.total()) == (30, 1)
        refused(
            "all of its 2 rows are dropped|the columns are", LOAD[kind], write_rows(tmp_path / "all.jsonl", rows[-3:-1])
        )


@pytest.mark.parametrize("name", EMPTY_MESSAGES)
def test_messages_that_say_nothing_are_dropped_and_counted(name: str) -> None:
    kind, column, values = EMPTY_MESSAGES[name]
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    for value in values:
        adapted = adapt([{column: good}, {column: value}], kind)
        assert (len(adapted.rows), adapted.dropped.total(), adapted.kept) == (1, 1, [0]), value


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"t {i}"} for i in range(20)] + [{"text": ""}, {"text": None}, {"other": 1}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    for streaming in (False, True):
        texts = [data.load_texts(file, split=split, streaming=streaming) for split in ("train",)]
        assert texts[0]
    assert said.text.count("3 of 23 documents are empty and were left out") == 1


def test_all_kinds_hold_out_the_same_prompts(tmp_path: Path) -> None:
    """Rows that serve for prompts alone do not move the others from one side to the other."""
    talks = [[*user(f"q {i}"), *(assistant("a") if i % 2 else [])] for i in range(400)]
    file = write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    sides = {
        kind: {
            s: {r["prompt"][0]["content"] for r in LOAD[kind](file, split=s).rows}
            for s in ("train", "test", "validation")
        }
        for kind in ("prompts", "instructions")
    }
    for side, asked_there in sides["instructions"].items():
        assert asked_there <= sides["prompts"][side]


# ---- 22: any text ---------------------------------------------------------------------------------------------------

ODD = 'a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1eh\ti\\n"j"\u200b\ufeffk\U0001f600\u0000l\r\nm\rn'


def test_any_text_comes_back_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} {ODD}", "completion": ODD} for i in range(2)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_parquet(tmp_path / "c.parquet", rows)
    field = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
    table = "prompt,completion\n" + "".join(f"{field(row['prompt'])},{field(ODD)}\n" for row in rows)
    (tmp_path / "d.csv").write_bytes(table.encode())
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv"):
        for load in (data.load_instructions, data.load_prompts):
            loaded = load(str(tmp_path / name), split="train").rows
            assert sorted(loaded, key=lambda row: row["prompt"]) == rows, name  # too few to hold any out
    (tmp_path / "e.txt").write_bytes(f"x{ODD}y<|endoftext|>\nz<|endoftext|>w".encode())
    assert f"x{ODD}y" in [
        t for s in ("train", "test", "validation") for t in data.load_texts(str(tmp_path / "e.txt"), split=s)
    ]


def test_a_name_with_half_a_character_can_be_said(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{**asked(1), "\ud83d": 1}])
    assert any(note.endswith(r"not used: \ud83d") for note in data.load_instructions(file, split="train").notes)
    refused(r"the columns are prompt, completion, \\ud83d, but", data.load_preferences, file)
    refused(r"has no text column 'text', only prompt, completion, \\ud83d", data.load_texts, file)


# ---- 28: nothing is asked for ---------------------------------------------------------------------------------------


def test_sizes_of_zero_are_refused(tmp_path: Path) -> None:
    for arguments, names in (
        (SFTArguments, ("dataset_size", "validation_size")),
        (PreferencesArguments, ("dataset_size", "test_size")),
        (RewardArguments, ("center_samples",)),
    ):
        for name in names:
            with pytest.raises(UserError, match=f"{name}: 0 must be at least 1"):
                check_bounds(arguments(**{name: 0}))
    file = write_rows(tmp_path / "a.jsonl", [asked(i) for i in range(20)])
    for size in (0, -1):
        refused(f"{size} rows of .* are asked for", data.load_prompts, file, size=size)
    write_rows(tmp_path / "t.jsonl", [{"text": "üüü"}, {"text": "ä"}, {"text": "ö"}])
    for streaming in (False, True):
        refused(
            "a limit of 1 bytes .*max_bytes.* does not hold the first character",
            data.load_texts,
            tmp_path / "t.jsonl",
            max_bytes=1,
            streaming=streaming,
        )


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * 20_000 + "\n")
    refused(r"deep\.jsonl, line 1 ", data.load_prompts, tmp_path / "deep.jsonl")
    (tmp_path / "deep.json").write_text("[" * 20_000)
    refused(r"deep\.json", data.load_prompts, tmp_path / "deep.json")
    (tmp_path / "big.jsonl").write_text('{"prompt": "a", "n": ' + "1" * 5000 + "}\n")
    refused(r"big\.jsonl, line 1 cannot be read", data.load_prompts, tmp_path / "big.jsonl")
    for number, broken in enumerate(
        ("[", "[1", '[{"prompt": "a"}', '[{"prompt": "a"},]', '[{"prompt": "a"}] x', "{]", "3")
    ):
        (tmp_path / f"{number}.json").write_text(broken)
        refused(rf"{number}\.json (is not valid JSON|should hold)", data.load_prompts, tmp_path / f"{number}.json")
    (tmp_path / "list.jsonl").write_text('[\n{"prompt": "a"}\n]')
    refused(
        r"line 1 is not valid JSON.*a list of rows over several lines is called \.json",
        data.load_prompts,
        tmp_path / "list.jsonl",
    )
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0)
        refused("locked cannot be read: Permission denied", data.load_prompts, tmp_path / "locked")


# ---- neighbours of these faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": "Q#", "response": "A", "label": "math"},
            "the columns are prompt, response, label, but instructions",
        ),
        ({"instruction": "Q#", "output": "A", "persona": "A pirate."}, None),
        ({**ROW, "passage": "It rains."}, "the row has 'passage', which no stage can use"),
        ({**ROW, "label": "unsafe"}, "the rows are unpaired"),
        ({**ROW, "feedback": False}, "the rows are unpaired"),
        ({"instruction": "Q#", "output": "A", "response": "B"}, "'output' and 'response' say two different things"),
        (
            {"prompt": "[{'role': 'user', 'content': 'Q#'}]", "completion": "A"},
            "field 'prompt' has a list of messages written out as text",
        ),
    ],
)
def test_neighbours_that_would_change_what_is_learned(
    tmp_path: Path, row: dict[str, Any], sentence: str | None
) -> None:
    rows = [json.loads(json.dumps(row).replace("#", str(i))) for i in range(30)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    if sentence:
        refused(sentence, data.load_instructions, file)
    else:
        loaded = data.load_instructions(file, split="train")
        assert loaded.rows[0]["prompt"][0] == {"role": "system", "content": "A pirate."}


def test_a_column_that_tells_splits_is_not_passed_over(tmp_path: Path) -> None:
    rows = [asked(i) | {"split": "test" if i % 2 else "train"} for i in range(30)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    refused("the column 'split' says test and train, which is not looked at", data.load_instructions, file)


@pytest.mark.parametrize("names", [("train1", "test1"), ("trainset", "testset"), ("my-train_data2", "my-test_data2")])
def test_numbered_names_tell_a_split(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, mark in zip(names, "ab", strict=True):
        write_rows(tmp_path / f"{name}.jsonl", [asked(i, mark) for i in range(10)])
    assert len(data.load_instructions(str(tmp_path), split="train").rows) == 10


def test_a_score_of_any_size_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_score": 10**30, "rejected_score": 0}
    loaded = data.load_preferences(write_rows(tmp_path / "rows.jsonl", [row] * 5), split="train")
    assert loaded.rows["chosen_score"][0] == 1e30


def test_conversations_that_begin_alike_are_told_apart_by_the_rest(tmp_path: Path) -> None:
    rows = [{"instruction": f"Q{i}", "output": "A", "history": [["Hi", "Hello"]]} for i in range(60)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    sizes = [len(data.load_instructions(file, split=split).rows) for split in ("train", "validation", "test")]
    assert sizes == [54, 3, 3]
