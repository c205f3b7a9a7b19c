"""Pairs and what the reward model is judged by, against values computed by hand."""

import json
import math
import random
import sys
from collections import Counter

import pytest
import torch
from ppo_tools import policy, tokenizer

from pipeline.errors import UserError
from pipeline.runtime.arguments import PreferencesArguments
from pipeline.runtime.command_line import resolve
from stages.preferences import main, pair_up
from stages.reward import calibration

PROMPT = [{"role": "user", "content": "Write."}]


def pairs_of(texts: list[str], scores: list[float], beta: float, min_gap: float, coin: random.Random) -> list[dict]:
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return pair_up(PROMPT, list(zip(answers, scores, strict=True)), beta, min_gap, coin)


def test_all_pairs_of_a_prompt_better_first() -> None:
    rows = pairs_of(["a", "b", "c", "d"], [0.1, 0.4, 0.4, 0.9], 1e9, 0.0, random.Random(0))
    pairs = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}
    assert pairs == {("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c")}  # b and c tie
    assert all(not row["flipped"] and row["chosen_score"] > row["rejected_score"] for row in rows)
    assert all(row["prompt"] == PROMPT and row["chosen"][0]["role"] == "assistant" for row in rows)


def test_near_ties_and_equal_texts_are_dropped() -> None:
    assert len(pairs_of(["a", "b"], [0.5, 0.6], 1e9, 0.05, random.Random(0))) == 1
    assert pairs_of(["a", "b"], [0.5, 0.6], 1e9, 0.2, random.Random(0)) == []
    assert pairs_of(["a", "a"], [0.5, 0.6], 1e9, 0.0, random.Random(0)) == []


@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_noise_is_bradley_terrys(beta: float) -> None:
    gap, n, coin = 0.2, 4000, random.Random(0)
    rows = [row for _ in range(n) for row in pairs_of(["a", "b"], [0.3, 0.3 + gap], beta, 0.0, coin)]
    flips = Counter(row["flipped"] for row in rows)[True] / n
    expected = 1 - 1 / (1 + math.exp(-beta * gap))
    assert abs(flips - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert all(row["flipped"] == (row["chosen"][0]["content"] == "a") for row in rows)


def test_calibration_by_hand() -> None:
    # σ(ln 3) = 0.75, three of four right; σ(ln 19) = 0.95, always right
    margins = torch.tensor([math.log(3)] * 3 + [-math.log(3)] + [math.log(19)] * 5)
    bins = calibration(margins)["bins"]
    assert [b["n"] for b in bins] == [4, 5]
    assert bins[0]["predicted"] == pytest.approx(0.75) and bins[0]["observed"] == pytest.approx(0.75)
    assert bins[1]["predicted"] == pytest.approx(0.95) and bins[1]["observed"] == 1.0


LABELLERS = """
def longest(prompts, completions, answer, **columns):
    assert all(c[0]["role"] == "assistant" for c in completions) and answer == [p[0]["content"] for p in prompts]
    return [float(len(c[0]["content"])) for c in completions]

def nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)

def few(prompts, completions, **columns):
    return [0.0]

def broken(prompts, completions, **columns):
    raise KeyError("x")
"""


@pytest.mark.parametrize(
    ("labeller", "sentence"),
    [
        ("longest", None),
        ("nan", "returned nan on row 0"),
        ("few", "returned 1 values for 8 rows"),
        ("broken", "KeyError"),
    ],
)
def test_a_labeller_is_called_as_a_reward_is_and_checked(tmp_path, monkeypatch, labeller, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"labels_{labeller}.py").write_text(LABELLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, words = policy(), tokenizer()
    for part in (model, words):
        part.save_pretrained("model")
    rows = [{"prompt": [{"role": "user", "content": f"t{6 + i % 9} t{6 + i // 9}"}]} for i in range(60)]
    rows = [row | {"answer": row["prompt"][0]["content"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = resolve(
        PreferencesArguments(
            run_dir=str(tmp_path),
            model_name_or_path="model",
            dataset="rows.jsonl",
            labeller=f"labels_{labeller}:{labeller}",
            dataset_size=4,
            test_size=4,
            num_generations=4,
            batch_size=8,
            max_new_tokens=6,
            mixed_precision="no",
        )
    )
    if sentence:
        with pytest.raises(UserError, match=sentence):
            main(args)
        return
    main(args)
    made = [json.loads(line) for line in (tmp_path / "preferences/train.jsonl").read_text().splitlines()]
    assert made and all(row["chosen_score"] > row["rejected_score"] or row["flipped"] for row in made)


def test_prompts_without_room_are_known_before_the_first_answer(tmp_path, monkeypatch, capsys):
    """Wherever in the file they stand; dropped and counted, or refused by file and row."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels_calls.py").write_text(
        "asked = []\n\ndef calls(prompts, completions, **columns):\n    asked.extend(prompts)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for part in (policy(), tokenizer()):
        part.save_pretrained("model")
    texts = ["t6 " * (45 if i % 20 == 19 else 1 + i % 20) + f"t{6 + i // 20}" for i in range(60)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"run_dir": str(tmp_path), "model_name_or_path": "model", "dataset": "rows.jsonl", "max_new_tokens": 6}
    given |= {"labeller": "labels_calls:calls", "batch_size": 8, "mixed_precision": "no"}
    with pytest.raises(
        UserError, match=r"rows\.jsonl, .*: a prompt of 49 tokens and max_new_tokens 6 do not fit the 48"
    ):
        main(resolve(PreferencesArguments(**given, overlong="refuse")))
    asked = sys.modules["labels_calls"].asked
    assert asked == []
    main(resolve(PreferencesArguments(**given)))
    assert asked and all(len(prompt[0]["content"]) < 100 for prompt in asked)
    assert "dropped: longer, with max_new_tokens 6, than the 48 tokens that the policy" in capsys.readouterr().out
