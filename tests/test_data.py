"""Data sets: each format on a literal and on real files, splits, errors in one sentence."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.errors import UserError
from pipeline.text import data
from reward_data import formats

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "reward_data" / "sample"
SHARED = ROOT.parent / "shared" / "data"
LOAD = {"instructions": data.load_instructions, "preferences": data.load_preferences, "prompts": data.load_prompts}
SPLITS = ("train", "validation", "test", "preferences", "ppo")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample files of ../shared/data are not here")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_a_suffix_is_put_after_text_and_after_the_last_message(tmp_path: Path) -> None:
    texts = [{"prompt": f"Add {i}:", "answer": str(i)} for i in range(9)]
    talks = [{"prompt": [*user("Hi"), *assistant("Hello"), *user(f"Add {i}")], "answer": str(i)} for i in range(9)]
    for rows in (texts, talks):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        plain, loaded = (data.load_prompts(file, split="train", suffix=suffix) for suffix in (None, " now"))
        assert loaded.notes == [*plain.notes, "each prompt ends with ' now'"]
        for before, after in zip(plain.rows, loaded.rows, strict=True):
            expected = f"{before['prompt']} now"
            if rows is talks:
                expected = [*before["prompt"][:-1], *user(before["prompt"][-1]["content"] + " now")]
            assert after == {"prompt": expected, "answer": before["answer"]}


# ---- formats --------------------------------------------------------------------------------------------------------

TALK = [{"role": "system", "content": "Be kind."}, *user("Hi"), *assistant("Hello"), *user("Bye")]
POST = {"info": {"subreddit": "pets", "title": "My cat", "post": "It sleeps."}, "choice": 1}
LITERALS = {
    "alpaca": (
        "instructions",
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"prompt": user("Add.\n\n1 and 2"), "completion": assistant("3")},
    ),
    "alpaca without input": (
        "instructions",
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"prompt": user("Greet."), "completion": assistant("Hi")},
    ),
    "instruction preferences": (
        "preferences",
        {"instruction": "Greet.", "input": "", "output": "Hi", "chosen": "Hi", "rejected": "Go"},
        {"prompt": user("Greet."), "chosen": assistant("Hi"), "rejected": assistant("Go")},
    ),
    "hh-rlhf": (
        "preferences",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Take care.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Whatever.",
        },
        {"prompt": TALK[1:], "chosen": assistant("Take care."), "rejected": assistant("Whatever.")},
    ),
    "sharegpt preferences": (
        "preferences",
        {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        {"prompt": TALK[:2], "chosen": assistant("Hello"), "rejected": assistant("No")},
    ),
    "sharegpt": (
        "instructions",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": user("Hi"), "completion": assistant("Hello")},
    ),
    "messages": (
        "instructions",
        {"messages": [*TALK, *assistant("See you")]},
        {"prompt": TALK, "completion": assistant("See you")},
    ),
    "text": ("instructions", {"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
    "prompt and completion": (
        "instructions",
        {"prompt": user("Hi"), "completion": assistant("Hello")},
        {"prompt": user("Hi"), "completion": assistant("Hello")},
    ),
    "ultrafeedback": (
        "preferences",
        {
            "prompt": "Hi",
            "chosen": [*user("Hi"), *assistant("Hello")],
            "rejected": [*user("Hi"), *assistant("No")],
            "messages": [*user("Hi"), *assistant("Hello")],
            "score_chosen": 8.0,
        },
        {"prompt": user("Hi"), "chosen": assistant("Hello"), "rejected": assistant("No")},
    ),
    "trl messages": (
        "preferences",
        {"prompt": user("Hi"), "chosen": assistant("Hello"), "rejected": assistant("No"), "flipped": True},
        {"prompt": user("Hi"), "chosen": assistant("Hello"), "rejected": assistant("No"), "flipped": True},
    ),
    "llmbar": (
        "preferences",
        {"input": "Hi", "output_1": "No", "output_2": "Hello", "label": 2},
        {"prompt": user("Hi"), "chosen": assistant("Hello"), "rejected": assistant("No")},
    ),
    "tl;dr": (
        "instructions",
        {"prompt": "POST: It sleeps.\n\nTL;DR:", "label": "Sleepy cat."},
        {"prompt": "POST: It sleeps.\n\nTL;DR:", "completion": " Sleepy cat."},
    ),
    "tl;dr comparisons": (
        "preferences",
        {**POST, "summaries": [{"text": " Cat."}, {"text": " A cat sleeps."}]},
        {
            "prompt": "SUBREDDIT: pets\n\nTITLE: My cat\n\nPOST: It sleeps.\n\nTL;DR:",
            "chosen": " A cat sleeps.",
            "rejected": " Cat.",
        },
    ),
    "text preferences": (
        "preferences",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    ),
    "preferences as instructions": (
        "instructions",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi", "completion": "Hello"},
    ),
    "prompts keep other columns": (
        "prompts",
        {"prompt": user("Hi"), "words": ["kite"]},
        {"prompt": user("Hi"), "words": ["kite"]},
    ),
    "instruction as prompt": ("prompts", {"instruction": "Greet."}, {"prompt": user("Greet.")}),
    "unpaired as prompt": (
        "prompts",
        {"messages": [*user("Hi"), *assistant("No")], "label": False},
        {"prompt": user("Hi")},
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_each_format(name: str) -> None:
    kind, row, expected = LITERALS[name]
    assert formats.adapt([row], kind).rows == [expected]


def test_useless_pairs_are_dropped_and_counted() -> None:
    talk = "\n\nHuman: Hi\n\nAssistant:"
    pairs = [(" a", " b"), (" a", " "), (" a", " a"), (" a\n\nHuman: x\n\nAssistant: c", " b")]
    rows = [{"chosen": talk + first, "rejected": talk + second} for first, second in pairs]
    adapted = formats.adapt(rows, "preferences")
    assert [row["chosen"] for row in adapted.rows] == [assistant("a")]
    assert adapted.dropped == {"empty reply": 1, "equal replies": 1, "no shared prompt": 1}


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_rows_are_refused(label: bool) -> None:
    for kind in ("preferences", "instructions"):
        with pytest.raises(ValueError, match="unpaired"):
            formats.adapt([{"messages": [*user("Hi"), *assistant("No")], "label": label}], kind)
        with pytest.raises(ValueError, match="unpaired"):
            formats.adapt([{"prompt": "Hi", "completion": "No", "label": label}], kind)


@needs_shared
@pytest.mark.parametrize(
    ("file", "kind", "count", "dropped"),
    [
        ("sft/alpaca_en_demo.json", "instructions", 999, {}),
        ("sft/rasbt_instruction-data.json", "instructions", 1100, {}),
        ("preference/rasbt_preference.json", "preferences", 1094, {"equal replies": 6}),
        ("preference/hh_harmless_sample.jsonl.gz", "preferences", 299, {"empty reply": 4}),
        ("preference/llamafactory_dpo_en_demo_100.json", "preferences", 100, {}),
        ("preference/llmbar_Natural.json", "preferences", 100, {}),
        ("preference/llmbar_Manual.json", "preferences", 46, {}),
        ("preference/llamafactory_kto_en_demo_100.json", "prompts", 100, {}),
    ],
)
def test_real_files(file: str, kind: str, count: int, dropped: dict) -> None:
    opener = gzip.open if file.endswith(".gz") else open
    with opener(SHARED / file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream] if ".jsonl" in file else json.load(stream)
    adapted = formats.adapt(rows, kind)
    assert (len(adapted.rows), adapted.dropped) == (count, dropped)
    parts = [LOAD[kind](str(SHARED / file), split=split).rows for split in ("train", "validation", "test")]
    assert sum(part.num_rows for part in parts) == count
    for row in parts[0]:
        assert all(row[name] for name in row)
        assert "\n\nHuman:" not in formats.text_of(row["prompt"])
        if kind == "preferences":
            assert row["chosen"] != row["rejected"] and row["prompt"][-1]["role"] == "user"


@needs_shared
def test_real_unpaired_file_is_refused() -> None:
    file = SHARED / "preference/llamafactory_kto_en_demo_100.json"
    with pytest.raises(UserError, match=r"kto_en_demo_100\.json: the rows are unpaired"):
        data.load_preferences(str(file), split="train")


@needs_shared
def test_real_texts() -> None:
    shakespeare = str(SHARED / "pretrain/tinyshakespeare.txt")
    train, held_out = (data.load_texts(shakespeare, split=split) for split in ("train", "validation"))
    assert [len(text) for text in (*train, *held_out)] == [1_003_854, 111_540]  # nanoGPT's split
    assert train[0] + held_out[0] == Path(shakespeare).read_text(encoding="utf-8")
    stories = str(SHARED / "pretrain/tinystories_sample.txt")
    parts = [data.load_texts(stories, split=split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1815, 101, 101] and sum(map(len, parts)) == 2017


# ---- splits ---------------------------------------------------------------------------------------------------------


def prompts_of(rows) -> set[str]:
    return {formats.text_of(row["prompt"]) for row in rows}


def test_no_prompt_is_on_both_sides_whatever_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 150}", "chosen": f"a{i}", "rejected": "b"} for i in range(400)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    parts = {s: data.load_preferences(file, split=s, seed=0).rows for s in SPLITS}
    assert sum(parts[split].num_rows for split in ("train", "validation", "test")) == 400
    assert [len(prompts_of(parts[split])) for split in ("train", "validation", "test")] == [134, 8, 8]
    others = {split: prompts_of(data.load_preferences(file, split=split, seed=7).rows) for split in parts}
    for split in ("validation", "test"):
        assert prompts_of(parts[split]) == others[split]
        for training in ("train", "preferences", "ppo"):
            assert not others[split] & prompts_of(parts[training])
    assert not others["validation"] & others["test"]
    # The same file split as instructions and as prompts keeps the same sides.
    assert prompts_of(data.load_instructions(file, split="test").rows) == others["test"]
    assert prompts_of(data.load_prompts(file, split="ppo").rows) == others["train"]


def test_the_seed_orders_and_size_cuts(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in range(100)])
    first, again, other = (data.load_prompts(file, split="ppo", seed=seed).rows["prompt"] for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other) and sorted(first) == sorted(other)
    assert list(data.load_prompts(file, split="ppo", seed=1, size=10).rows["prompt"]) == list(first)[:10]


@pytest.mark.parametrize("kind", LOAD)
def test_the_seed_is_0_where_none_is_given_and_size_cuts_every_kind(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    load, file = LOAD[kind], write_rows(tmp_path / "rows.jsonl", rows)
    whole = load(file, split="train", seed=0).rows.to_list()
    assert len(whole) == 36 and load(file, split="train").rows.to_list() == whole
    assert load(file, split="train", seed=1).rows.to_list() != whole
    assert load(file, split="train", size=3).rows.to_list() == whole[:3]
    assert load(file, split="train", size=None).rows.num_rows == load(file, split="train", size=99).rows.num_rows == 36


def test_turns_of_one_conversation_stay_together(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        talk = [*user(f"question {i}"), *assistant("answer")]
        rows += [{"messages": talk}, {"messages": [*talk, *user("and?"), *assistant("more")]}]
    file = write_rows(tmp_path / "chats.jsonl", rows)
    first_words = [
        {row["prompt"][0]["content"] for row in data.load_instructions(file, split=split).rows}
        for split in ("train", "validation", "test")
    ]
    assert [len(words) for words in first_words] == [54, 3, 3] and len(set.union(*first_words)) == 60


def test_a_folder_is_taken_at_its_word(tmp_path: Path) -> None:
    for name, count in (("train", 30), ("test", 5)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "stage.json").write_text("{}")
    sizes = {s: data.load_instructions(str(tmp_path), split=s).rows.num_rows for s in ("train", "test", "validation")}
    assert sizes == {"train": 30, "test": 5, "validation": 5}
    write_rows(tmp_path / "ppo-00000.jsonl", [{"prompt": f"own{i}"} for i in range(7)])
    assert data.load_prompts(str(tmp_path), split="ppo").rows.num_rows == 7


@pytest.mark.parametrize("kind", ["instructions", "preferences", "prompts"])
def test_the_sample(kind: str) -> None:
    rows = [LOAD[kind](str(SAMPLE / f"{kind}.jsonl"), split=split).rows for split in ("train", "validation", "test")]
    assert [part.num_rows for part in rows] == [10, 1, 1]
    assert rows[0][0]["prompt"][0]["role"] == "user"


def test_the_sample_corpus() -> None:
    parts = [data.load_texts(str(SAMPLE / "corpus.txt"), split=split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [10, 1]
    assert all("<|endoftext|>" not in text and text == text.strip() for part in parts for text in part)


# ---- kinds of files -------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f'p{i}, "q"\nü', "completion": f"c{i}"} for i in range(20)]
    jsonl = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    quoted = ["prompt,completion"] + ['"{}","{}"'.format(r["prompt"].replace('"', '""'), r["completion"]) for r in rows]
    (tmp_path / "e.csv").write_text("\n".join(quoted), encoding="utf-8-sig")
    expected = data.load_instructions(jsonl, split="train").rows.to_list()
    assert len(expected) == 18
    for name in ("b.json", "c.jsonl.gz", "d.parquet", "e.csv"):
        assert data.load_instructions(str(tmp_path / name), split="train").rows.to_list() == expected, name


def test_a_folder_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    """UltraFeedback's shape: several training splits, of which each stage takes its own."""
    pair = {"prompt": "", "chosen": [*user("Hi"), *assistant("Hello")], "rejected": [*user("Hi"), *assistant("No")]}
    (tmp_path / "data").mkdir()
    for name, count in (("train_prefs", 12), ("train_sft", 9), ("test_prefs", 4)):
        rows = [{**pair, "prompt": f"{name} {i}"} for i in range(count)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in ("train_prefs", "train_sft", "test_prefs"))
        + "---\n"
    )
    assert data.load_preferences(str(tmp_path), split="train").rows.num_rows == 12
    assert data.load_preferences(str(tmp_path), split="test").rows.num_rows == 4
    assert data.load_instructions(str(tmp_path), split="train").rows.num_rows == 9


def test_texts(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 80} ü"} for i in range(100)] + [{"text": "  "}]
    file = write_rows(tmp_path / "t.jsonl", rows)
    train, held_out = (data.load_texts(file, split=split, seed=3) for split in ("train", "validation"))
    assert len(train) == 72 and len(held_out) == 4 and not set(train) & set(held_out)  # 80 once duplicates are gone
    cut = data.load_texts(file, split="train", seed=3, max_bytes=100)
    assert cut == train[: len(cut)] and 100 - len(train[len(cut)].encode()) < sum(len(t.encode()) for t in cut) <= 100
    assert data.load_texts(file, split="train", seed=3, max_bytes=5) == [train[0][:5]]
    write_rows(tmp_path / "o.jsonl", [{"story": f"s{i}"} for i in range(30)])
    assert len(data.load_texts(str(tmp_path / "o.jsonl"), split="train", text_column="story")) == 26


# ---- errors ---------------------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "a", "completion": "b"}\n'
BROKEN = {
    "nothing at all": (b"", "is empty"),
    "blank": (b"\n \n", "is empty"),
    "wrong columns": (b'{"question": "a", "reply": "b"}\n', "columns are question, reply, but instructions need"),
    "malformed line": (GOOD * 2 + b'{"prompt": \n', "line 3 is not valid JSON"),
    "not an object": (GOOD + b"[1]\n", "line 2 should be a JSON object"),
    "nothing but empty fields": (
        b'{"prompt": " ", "completion": "b"}\n{"prompt": "a", "completion": ""}\n',
        "all of its 2 rows are dropped for instructions: 1 empty prompt, 1 empty reply",
    ),
    "number for text": (GOOD + b'{"prompt": "a", "completion": 3}\n', "line 2: field 'completion' should be text"),
    "unknown role": (b'{"messages": [{"role": "bot", "content": "x"}]}\n', "line 1: .* has the role 'bot'"),
    "text and messages": (
        GOOD + json.dumps({"prompt": user("a"), "completion": assistant("b")}).encode(),
        "line 2: field 'prompt' is text in one row and messages in another",
    ),
    "half an emoji": (GOOD + b'{"prompt": "a \\ud800", "completion": "b"}\n', "line 2: field 'prompt' has half a char"),
    "half an emoji in a message": (
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
        "line 1: field 'messages' has half a character",
    ),
    "a list for a role": (b'{"messages": [{"role": ["user"], "content": "x"}]}\n', "line 1: .* has the role"),
    "latin-1": (GOOD + '{"prompt": "é"}'.encode("latin-1"), r"not UTF-8 text \(line 2, byte \d+\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = BROKEN[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        data.load_instructions(str(file), split="train")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_further_broken_rows_are_one_sentence(tmp_path: Path) -> None:
    row = {"info": {"post": "p"}, "summaries": ["a", "b"], "choice": 0}
    with pytest.raises(UserError, match=r"line 1: fields 'info', 'summaries' and 'choice' should hold"):
        data.load_preferences(write_rows(tmp_path / "tldr.jsonl", [row]), split="train")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 99)
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz cannot be read"):
        data.load_prompts(str(tmp_path / "torn.jsonl.gz"), split="train")


@pytest.mark.parametrize("name", ["label", "completion", "output", "answer"])
def test_an_answer_beside_a_prompt_reaches_the_rewards(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i} plus 1?", name: str(i + 1)} for i in range(30)])
    rows = data.load_prompts(file, split="train").rows
    assert rows.column_names == ["prompt", name]
    assert all(int(row[name]) == int(row["prompt"].split()[0]) + 1 for row in rows)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    for wrong in (tmp_path / "corpsu.txt", tmp_path / "corpus"):
        with pytest.raises(UserError, match=r"did you mean .*corpus\.txt"):
            data.load_texts(str(wrong), split="train")
    with pytest.raises(UserError, match="did you mean stories"):
        data.load_texts("storys", split="train")
    with pytest.raises(UserError, match="holds no data files"):
        (tmp_path / "empty").mkdir()
        data.load_texts(str(tmp_path / "empty"), split="train")


def test_other_errors(tmp_path: Path) -> None:
    def fails(sentence: str, name: str, content: bytes, load=data.load_instructions) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            load(str(tmp_path / name), split="validation")

    fails("line 2: Expecting", "a.json", b'[{"a": 1},\n oops]')
    fails("JSON list of objects", "b.json", b'{"a": {"b": 1}}')
    fails("line 3 has more or fewer fields", "c.csv", b"prompt,completion\na,b\na,b,c\n")
    fails(r"c2\.csv, line 3: a carriage return stands in the middle", "c2.csv", b"prompt,completion\na,b\nc\rd,e\n")
    fails("cannot be read as parquet", "d.parquet", b"PAR1 but not really")
    fails("cannot be read", "e.jsonl.gz", b"not gzip")
    fails("no known kind of data file", "f.xlsx", b"x")
    fails("too few to hold any out", "g.jsonl", GOOD)
    fails("no text column 'text', only prompt, completion", "h.jsonl", GOOD, data.load_texts)
    with pytest.raises(UserError, match="cannot be had from the hub"):
        data.load_texts("nobody/no-such-data", split="train")
    with pytest.raises(UserError, match="stories has no preferences of its own"):
        data.load_preferences("stories", split="train")
    with pytest.raises(UserError, match="stories never ends"):
        data.load_prompts("stories", split="ppo")
