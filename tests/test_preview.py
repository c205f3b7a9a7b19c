"""`--show`: the rows as the model will see them, and nothing written."""

import json
import random
import re
from pathlib import Path

import pytest
from conftest import ROOT, make
from tiny_models import tiny_tokenizer, write_models

from pipeline.runtime.arguments import (
    EvaluateArguments,
    PreferencesArguments,
    PretrainArguments,
    RewardArguments,
    SFTArguments,
    TokenizerArguments,
)
from pipeline.runtime.command_line import resolve
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.preview import marked_text
from stages import evaluate, ppo, preferences, pretrain, reward, sft, tokenizer

WORDS = ["Ben", "found", "a", "kite", "near", "the", "river", "He", "was", "happy", "Ann", "lost", "fox", "sad"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's models, and a file for each stage: most rows are short, every tenth has 150 words."""
    run = write_models(tmp_path_factory.mktemp("run"))
    (run / "tokenizer").mkdir()
    tiny_tokenizer().save_pretrained(run / "tokenizer")
    rng = random.Random(0)

    def text(number: int) -> str:
        return f"{number} " + " ".join(rng.choices(WORDS, k=150 if number % 10 == 9 else 6))

    rows = {
        "texts": [{"text": text(i)} for i in range(60)],
        "answers": [
            {"prompt": [said("user", f"Say {i}.")], "completion": [said("assistant", text(i))]} for i in range(60)
        ],
        "pairs": [{"prompt": f"Say {i}:", "chosen": " " + text(i), "rejected": " He was sad."} for i in range(60)],
        "prompts": [{"prompt": [said("user", text(i))]} for i in range(60)],
    }
    for name, content in rows.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return run


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shown(run: Path, stage, kind, data: str, capsys: pytest.CaptureFixture, **settings: object) -> str:
    """What `--show 3` prints, and that it leaves nothing behind."""
    before = sorted(run.rglob("*"))
    given = {"run_dir": str(run), "output_dir": str(run / "new"), "dataset": str(run / f"{data}.jsonl"), "show": 3}
    capsys.readouterr()
    stage.main(resolve(kind(**given | {"mixed_precision": "no"} | settings)))
    assert sorted(run.rglob("*")) == before
    return capsys.readouterr().out


def test_sft(run: Path, capsys: pytest.CaptureFixture) -> None:
    out = shown(run, sft, SFTArguments, "answers", capsys, max_length=100)
    assert out.count("<|assistant|>[[") == 3 and "trained on is what stands between [[ and ]]" in out
    *_, used, lengths = out.strip().splitlines()
    assert re.match(r"54 of 54 training rows are used, \d of 54 answers lose their end at max_length 100; ", used)
    assert used.endswith("; an answer ends with <|end|>, or also <|endoftext|>")
    assert lengths.startswith("tokens of training rows: 50 % up to ") and lengths.endswith("; max_length 100")


def test_reward_shows_both_sides_as_they_are_scored(run: Path, capsys: pytest.CaptureFixture) -> None:
    out = shown(run, reward, RewardArguments, "pairs", capsys, max_length=100)
    assert out.count("chosen: ") == out.count("rejected: ") == 3 and out.count("[[<|end|>]]") == 6
    assert "the score is read at the token between [[ and ]]" in out
    used = out.strip().splitlines()[-2]
    assert "train pairs are used" in used and "dropped: longer than max_length 100" in used


def test_ppo_preferences_and_evaluate_show_prompts(run: Path, capsys: pytest.CaptureFixture) -> None:
    for stage, kind, settings in (
        (ppo, PPOArguments, {"response_length": 60}),
        (preferences, PreferencesArguments, {"max_new_tokens": 60}),
        (evaluate, EvaluateArguments, {"max_new_tokens": 60}),
    ):
        settings |= {"gold": None} if stage is evaluate else {}
        out = shown(run, stage, kind, "prompts", capsys, **settings)
        assert out.count("<|assistant|>") == 3 and out.count("tokens, then an answer of up to 60, for which") == 3
        (setting,) = (name for name in settings if name != "gold")
        assert out.strip().endswith(f"; {setting} 60 leaves room for 68")
        if stage is not evaluate:  # which has three prompts alone
            assert f"dropped: longer, with {setting} 60, than the 128 tokens that the policy" in out


@pytest.mark.parametrize(
    ("stage", "kind", "settings", "told"),
    [
        (sft, SFTArguments, {}, "1 of 3 held-out rows repeats a prompt of the training split"),
        (reward, RewardArguments, {}, "1 of 3 test pairs repeats a prompt of the train split"),
        (ppo, PPOArguments, {"response_length": 8}, "1 of 3 held-out prompts repeats a prompt of the training split"),
        (preferences, PreferencesArguments, {}, "1 of 3 test prompts repeats a prompt of the train split"),
        (
            preferences,
            PreferencesArguments,
            {"labeller": "human"},
            "1 of 3 test pairs repeats a prompt of the train split",
        ),
    ],
)
def test_prompts_of_both_files_are_told_of(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, stage, kind, settings: dict, told: str
) -> None:
    """Files that are named for splits are taken at their word, so a prompt may stand in both."""
    (tmp_path / "given").mkdir()
    for name, numbers in (("train", range(5)), ("test", range(4, 7))):
        rows = [{"prompt": f"Say {i}:", "chosen": " He was happy.", "rejected": " He was sad."} for i in numbers]
        if stage is sft:
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        (tmp_path / f"given/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = shown(run, stage, kind, "pairs", capsys, dataset=str(tmp_path / "given"), **settings)
    assert out.splitlines().count(told) == 1


def test_pairs_that_people_labelled(run: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"labeller": "human", "model_name_or_path": "none/such"}
    out = shown(run, preferences, PreferencesArguments, "pairs", capsys, **settings)
    assert out.count("chosen: ") == 3 and out.strip().endswith("54 train pairs, 3 test pairs")


@pytest.mark.parametrize("streaming", [False, True])
def test_pretrain_shows_packed_rows(run: Path, capsys: pytest.CaptureFixture, streaming: bool) -> None:
    out = shown(run, pretrain, PretrainArguments, "texts", capsys, block_size=40, streaming=streaming)
    assert "a document ends with <|endoftext|>" in out and "<|endoftext|>" in out.split("row 2")[0]
    assert out.count("40 tokens\n") == 3 and out.count("[[") == 4  # a token of the row before stands outside
    assert ("tokens of held-out documents: 50 %" if streaming else "tokens of training documents: 50 %") in out


def test_tokenizer_shows_documents(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(run.rglob("*"))
    given = {"run_dir": str(run), "output_dir": str(run / "new"), "dataset": str(run / "texts.jsonl")}
    tokenizer.main(resolve(TokenizerArguments(**given, show=2)))
    out = capsys.readouterr().out
    assert "document 2, " in out and "document 3, " not in out and "54 documents, " in out
    assert sorted(run.rglob("*")) == before


def test_a_run_opens_with_the_same_two_lines(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    *_, used, lengths = shown(run, sft, SFTArguments, "answers", capsys, max_length=100).strip().splitlines()
    given = {"run_dir": str(run), "output_dir": str(tmp_path / "sft"), "dataset": str(run / "answers.jsonl")}
    sft.main(resolve(SFTArguments(**given, max_steps=1, max_length=100, mixed_precision="no")))
    assert f"\nsft  {used}\nsft  {lengths}\n" in capsys.readouterr().out


def test_marks_lose_no_character_and_move_no_cursor() -> None:
    words = tiny_tokenizer()
    text = "Ben\x1b[2J ran\n home é🙂"
    ids = words(text)["input_ids"]
    for start in range(1, len(ids)):
        made = marked_text(words, ids, [i >= start for i in range(len(ids))]).plain
        assert made.count("[[") == made.count("]]") == 1 and "\x1b" not in made
        if "\ufffd" not in made:  # a character may be several tokens
            assert made.replace("[[", "").replace("]]", "") == text.replace("\x1b", "\\x1b")


@pytest.mark.slow
def test_make_show_names_its_stage() -> None:
    done = make("-n", "show", "STAGE=sft", "PRESET=smoke", "RUN=runs/x", "SEED=2")
    command = "-m stages.sft --config configs/smoke/sft.yaml --run_dir runs/x --seed 2"
    assert command in done.stdout.replace("'", "") and "--show 3" in done.stdout
    for words in (("show",), ("show", "STAGE=shft")):
        done = make(*words, "PRESET=smoke")
        assert done.returncode == 2 and "STAGE" in done.stderr and "sft" in done.stderr
    assert (ROOT / "Makefile").exists()
