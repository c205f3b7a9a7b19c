"""The judgement: each figure against a number that can be worked out by hand, and the stage on tiny models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, END_OF_TURN, tiny_policy, tiny_tokenizer, write_models

from pipeline import judging as evaluate
from pipeline.errors import UserError
from pipeline.judging import (
    Answers,
    Policy,
    answer,
    best_of,
    best_of_n_kl,
    bootstrap_interval,
    distinct_n,
    paired_difference,
    samples_of,
    sequence_kl,
    sequence_logprobs,
    text_bits_per_byte,
    verdict_of,
    wilson_interval,
    win_rate,
)
from pipeline.model.load import load_policy
from pipeline.runtime.arguments import EvaluateArguments
from pipeline.runtime.command_line import resolve
from pipeline.text.tokenizer import load_tokenizer
from reward_data.formats import text_of
from stages import evaluate as stage

PROMPTS = [[{"role": "user", "content": text}] for text in ("Write of Ben.", "Ann?", "The fox was sad. Why?")]


@pytest.fixture(scope="module")
def sft() -> Policy:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|end|>"
    return Policy(tiny_policy(1, [END_OF_TURN, END_OF_TEXT]), tokenizer)


@pytest.fixture(scope="module")
def pretrained() -> Policy:
    return Policy(tiny_policy(0), tiny_tokenizer(), plain=True)


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["a b a b"], 2 / 3),  # ab ba ab
        (["a b c", "a b"], 2 / 3),  # ab bc | ab: none across texts
        (["a b", "c d"], 1.0),
        (["the the the the the"], 1 / 4),
        (["one", ""], 0.0),  # no bigram at all
    ],
)
def test_distinct_2_by_hand(texts: list[str], value: float) -> None:
    assert distinct_n(texts, 2) == pytest.approx(value)


def test_distinct_1_and_3() -> None:
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["a b a b a"], 3) == pytest.approx(2 / 3)


def test_a_tie_is_half_a_win() -> None:
    rate = win_rate([1.0, 0.5, 0.2, 0.7], [0.0, 0.5, 0.3, 0.7])
    assert rate["mean"] == (1 + 0.5 + 0 + 0.5) / 4 and rate["n"] == 4
    assert win_rate([1.0] * 9, [0.0] * 9) == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 9}
    assert win_rate([0.5] * 9, [0.5] * 9) == {"mean": 0.5, "ci95": [0.5, 0.5], "n": 9}
    assert win_rate([0.0], [1.0])["mean"] == 0.0
    with pytest.raises(ValueError, match="3 and 2 scores"):
        win_rate([1.0] * 3, [1.0] * 2)


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    values = [0.0, 1.0] * 200
    half_width = 1.96 * 0.5 / math.sqrt(400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.5 - half_width, abs=0.006) and high == pytest.approx(0.5 + half_width, abs=0.006)
    assert bootstrap_interval(values) == (low, high)  # the seed makes it repeatable
    assert bootstrap_interval(values, level=0.5)[1] == pytest.approx(0.5 + 0.6745 * 0.025, abs=0.005)
    assert bootstrap_interval([0.3] * 10) == (pytest.approx(0.3), pytest.approx(0.3))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=100), resamples=400)
        hits += low <= 0 <= high
    assert 180 <= hits <= 200  # 190 expected; the binomial's standard deviation is 3


# ---- best of n ------------------------------------------------------------------------------------------------------


def test_best_of_picks_the_highest_of_each_run_and_the_first_of_a_tie() -> None:
    assert best_of([1, 3, 2, 5, 4, 5, 0, 0, 0], 3) == [1, 3, 6]
    assert best_of([4, 2], 1) == [0, 1]
    with pytest.raises(ValueError, match="not a multiple"):
        best_of([1, 2, 3], 2)


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_best_of_n_kl_is_that_of_the_highest_of_n_uniform_scores(n: int) -> None:
    """The best of n has density n·u^(n−1) over the rank u; its KL to the uniform density is an integral over [0, 1]."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1.0)
    integral = np.mean(density * (math.log(n) + (n - 1) * np.log(u)))
    assert best_of_n_kl(n) == pytest.approx(integral, abs=1e-4)
    assert best_of_n_kl(16) == pytest.approx(1.8351, abs=1e-4)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2**25, 10_000])  # all rows at once, and a row or two at a time
def test_sequence_logprobs_equal_one_forward_a_token(sft: Policy, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", budget)
    prompts = [[3, 40, 5], [70], [8, 9, 10, 11, 12, 13]]
    responses = [[9, 200, 5], [14, 14, 14, 14, 14, 1], [6]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        total = 0.0
        for i, token in enumerate(response):
            logits = sft.model(torch.tensor([prompt + response[:i]])).logits[0, -1] / 0.7
            total += logits.log_softmax(-1)[token].item()
        expected.append(total)
    assert sequence_logprobs(sft.model, prompts, responses, 0.7).tolist() == pytest.approx(expected, abs=1e-4)


def test_sequence_logprobs_of_a_stock_model_are_the_same(sft: Policy) -> None:
    from transformers import Qwen3ForCausalLM

    stock = Qwen3ForCausalLM(sft.model.config).eval()
    stock.load_state_dict(sft.model.state_dict())
    rows = [[3, 40, 5], [70, 8]], [[9, 200, 5], [14]]
    ours = sequence_logprobs(sft.model, *rows)
    torch.testing.assert_close(sequence_logprobs(stock, *rows), ours, atol=1e-4, rtol=0)


def test_kl_is_zero_when_policy_and_reference_are_equal(sft: Policy) -> None:
    answers = answer(sft, PROMPTS, max_new_tokens=8, temperature=1.0, batch_size=2)
    assert sequence_kl(sft, sft, answers) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_the_exact_one_within_its_error(sft: Policy, temperature: float) -> None:
    """With one token an answer the KL is a sum over the vocabulary."""
    other = Policy(tiny_policy(7, [END_OF_TURN, END_OF_TEXT]), sft.tokenizer)
    prompt = torch.tensor(other.encode(PROMPTS[:1]))
    p, q = (policy.model(prompt).logits[0, -1].div(temperature).log_softmax(-1) for policy in (other, sft))
    exact = (p.exp() * (p - q)).sum().item()
    spread = (p.exp() * (p - q - exact).square()).sum().sqrt().item()
    count = 4000
    generator = torch.Generator().manual_seed(0)
    answers = answer(
        other, PROMPTS[:1] * count, max_new_tokens=1, temperature=temperature, batch_size=count, generator=generator
    )
    assert exact > 0.05
    assert sequence_kl(other, sft, answers, temperature) == pytest.approx(exact, abs=4 * spread / math.sqrt(count))


def test_the_end_of_a_document_counts_as_the_end_of_a_turn(sft: Policy, pretrained: Policy) -> None:
    prompts = ["Ben"]
    responses = [[40, 41, END_OF_TEXT]]
    only_turns = Policy(tiny_policy(1, [END_OF_TURN]), sft.tokenizer)
    answers = Answers(prompts, pretrained.encode(prompts), responses, [True], ["?"])
    ours = sequence_logprobs(pretrained.model, answers.prompt_ids, responses).item()
    theirs = sequence_logprobs(only_turns.model, answers.prompt_ids, [[40, 41, END_OF_TURN]]).item()
    assert sequence_kl(pretrained, only_turns, answers) == pytest.approx(ours - theirs, abs=1e-6)
    # also where the reference could end with both: either's usual end is the same event
    theirs = sequence_logprobs(sft.model, answers.prompt_ids, [[40, 41, END_OF_TURN]]).item()
    assert sequence_kl(pretrained, sft, answers) == pytest.approx(ours - theirs, abs=1e-6)
    # an end that is not the policy's usual one is asked for as it was said
    own = sequence_logprobs(sft.model, answers.prompt_ids, responses).item()
    theirs = sequence_logprobs(only_turns.model, answers.prompt_ids, [[40, 41, END_OF_TURN]]).item()
    assert sequence_kl(sft, sft, answers) == 0 and sequence_kl(sft, only_turns, answers) == pytest.approx(own - theirs)


def test_bits_per_byte_of_a_uniform_model(pretrained: Policy) -> None:
    model = tiny_policy(0)
    torch.nn.init.zeros_(model.model.embed_tokens.weight)  # tied head: all logits are 0
    texts = ["Ben found a kite.", "", "naïve 🙂"]
    tokens = sum(len(ids) for ids in pretrained.tokenizer(texts)["input_ids"])
    size = sum(len(text.encode()) for text in texts)
    assert text_bits_per_byte(model, pretrained.tokenizer, texts) == pytest.approx(
        tokens * math.log2(300) / size, rel=1e-5
    )
    assert text_bits_per_byte(model, pretrained.tokenizer, ["", ""]) is None


# ---- answers and verdicts -------------------------------------------------------------------------------------------


def test_a_plain_policy_is_asked_the_bare_text(sft: Policy, pretrained: Policy) -> None:
    assert pretrained.tokenizer.decode(pretrained.encode(PROMPTS)[1]) == "Ann?"
    assert sft.tokenizer.decode(sft.encode(PROMPTS)[1]) == "<|user|>Ann?<|end|><|assistant|>"
    assert pretrained.encode(["Ann?"]) == pretrained.encode(PROMPTS[1:2])


def test_answers_are_the_sampled_tokens(sft: Policy) -> None:
    done: list[int] = []
    answers = answer(
        sft,
        PROMPTS,
        max_new_tokens=20,
        temperature=1.0,
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        advance=done.append,
    )
    assert done == [2, 1] and len(answers.texts) == 3
    for ids, ended, text in zip(answers.response_ids, answers.ended, answers.texts, strict=True):
        assert ended == (ids[-1] in (END_OF_TURN, END_OF_TEXT)) and (ended or len(ids) == 20)
        assert not any(i in (END_OF_TURN, END_OF_TEXT) for i in ids[:-1])
        assert text == sft.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_verdict_counts_what_it_says() -> None:
    answers = Answers(PROMPTS[:2], [[1], [1]], [[9, 9, 5], [9, 9, 9, 9, 9]], [True, False], ["a b a b", "a b"])
    verdict = verdict_of(answers, proxy=[1.0, 2.0], gold=lambda p, texts: [0.25, 0.75], kl=3.5, fluency=lambda t: 1.5)
    low, high = verdict.figures.pop("gold_ci95")
    assert low == 0.25 and high == 0.75
    assert verdict.figures == {
        "gold": 0.5,
        "proxy": 1.5,
        "kl": 3.5,
        "length": 4.0,
        "distinct_2": 0.5,
        "bpb_under_pretrained": 1.5,
        "without_eos": 0.5,
    }
    rows = samples_of({"sft": verdict, "ppo": verdict})
    assert [(r["index"], r["policy"]) for r in rows] == [(0, "sft"), (0, "ppo"), (1, "sft"), (1, "ppo")]
    assert rows[2] == {
        "index": 1,
        "prompt": "Ann?",
        "policy": "sft",
        "completion": "a b",
        "gold": 0.75,
        "proxy": 2.0,
        "ended": False,
    }


def test_a_verdict_with_more_judges() -> None:
    answers = Answers(PROMPTS[:2], [[1], [1]], [[9, 5], [9, 5]], [True, True], ["a", "b c"])
    judges = {"words": lambda p, texts: [len(text.split()) for text in texts]}
    common = {"gold": None, "kl": 0.0, "fluency": lambda t: None, "judges": judges}
    verdict = verdict_of(answers, proxy=[1.0, 2.0], **common)
    assert verdict.judges == {"words": [1, 2]} and verdict.figures["judge_words"] == 1.5
    assert verdict.figures["judge_words_ci95"] == [1.0, 2.0]
    assert [row["judge_words"] for row in samples_of({"sft": verdict})] == [1, 2]


def test_a_paired_difference_by_hand() -> None:
    """Differences 0.1, 0.3 and −0.1: mean 0.1, squared deviations 0, 0.04, 0.04, so √(0.08 / 2 / 3)."""
    found = paired_difference([0.6, 0.9, 0.2], [0.5, 0.6, 0.3])
    assert found["mean"] == pytest.approx(0.1) and found["n"] == 3
    assert found["standard_error"] == pytest.approx(math.sqrt(0.04 / 3))
    assert paired_difference([1.0], [0.0]) == {"mean": 1.0, "standard_error": None, "n": 1}


# ---- the stage ------------------------------------------------------------------------------------------------------


def count_letters(prompts: list, completions: list, **columns: list) -> list[float]:
    """A judge that can be worked out: the share of letters."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in map(text_of, completions)]


def arguments(run: Path, **changes: object) -> EvaluateArguments:
    settings = {
        "run_dir": str(run),
        "num_prompts": 6,
        "best_of": 4,
        "max_new_tokens": 12,
        "batch_size": 16,
        "gold": "test_judging:count_letters",
        "mixed_precision": "no",
    }
    return resolve(EvaluateArguments(**settings | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_models(tmp_path_factory.mktemp("run"))
    stage.main(arguments(run))
    return run


def test_stage_writes_scores_that_agree_with_its_samples(run: Path) -> None:
    scores = json.loads((run / "evaluate/scores.json").read_text())
    rows = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    assert list(scores["policies"]) == ["pretrain", "sft", "best_of_4", "ppo"] and len(rows) == 4 * 6
    for name, figures in scores["policies"].items():
        mine = [row for row in rows if row["policy"] == name]
        assert figures["gold"] == pytest.approx(np.mean(count_letters([], [row["completion"] for row in mine])))
        assert figures["proxy"] == pytest.approx(np.mean([row["proxy"] for row in mine]))
        assert figures["without_eos"] == pytest.approx(np.mean([not row["ended"] for row in mine]))
        assert figures["gold_ci95"][0] <= figures["gold"] <= figures["gold_ci95"][1]
    policies = scores["policies"]
    assert policies["ppo"]["kl"] == 0 == policies["sft"]["kl"]  # the same weights
    assert policies["pretrain"]["kl"] > 0 and policies["best_of_4"]["kl"] == pytest.approx(math.log(4) - 0.75)
    assert policies["best_of_4"]["proxy"] > policies["sft"]["proxy"]
    ours, theirs = ([row["gold"] for row in rows if row["policy"] == name] for name in ("ppo", "sft"))
    assert scores["win_rate"]["ppo_vs_sft"] == win_rate(ours, theirs)
    assert len({row["prompt"] for row in rows}) == 6


def test_stage_records_and_repeats_itself(run: Path) -> None:
    record = json.loads((run / "evaluate/stage.json").read_text())
    scores = (run / "evaluate/scores.json").read_text()
    assert set(record["metrics"]) == {"policies", "win_rate"}
    assert {"pretrain", "sft", "ppo", "reward"} <= set(record["inputs"])
    stage.main(arguments(run, fresh=True))
    assert (run / "evaluate/scores.json").read_text() == scores == (run / "evaluate.old-1/scores.json").read_text()


def count_words(prompts: list, completions: list, **columns: list) -> list[float]:
    """A judge on another scale."""
    return [float(len(text.split())) for text in map(text_of, completions)]


def test_stage_with_more_judges_a_chat_model_and_another_reader(run: Path, tmp_path: Path) -> None:
    """Every judge's figures are those of its samples; the bits per byte are those of the model that was named."""
    changes = {"judges": ["test_judging:count_words"], "pretrain_chat": True, "fluency_model": f"{run}/sft"}
    stage.main(arguments(run, output_dir=str(tmp_path), ppo_model=f"{run}/pretrain", **changes))
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    by = {name: [row for row in rows if row["policy"] == name] for name in scores["policies"]}
    words = {name: count_words([], [row["completion"] for row in mine]) for name, mine in by.items()}
    reader = Policy(load_policy(f"{run}/sft"), load_tokenizer(f"{run}/sft"))
    for name, figures in scores["policies"].items():
        assert [row["judge_count_words"] for row in by[name]] == words[name]
        assert figures["judge_count_words"] == pytest.approx(np.mean(words[name]))
        texts = [row["completion"] for row in by[name]]
        assert figures["bpb_under_pretrained"] == pytest.approx(
            text_bits_per_byte(reader.model, reader.tokenizer, texts), rel=1e-5
        )
    assert scores["judges"] == {"count_words": {"ppo_vs_sft": paired_difference(words["ppo"], words["sft"])}}
    assert json.loads((tmp_path / "stage.json").read_text())["metrics"]["judges"] == scores["judges"]
    # Asked through the template, the pretrained model says what it says as the policy of ppo, but for the draw
    policies = stage.load_policies({"pretrain": f"{run}/pretrain"}, None, True)
    assert policies["pretrain"].encode(PROMPTS[1:2]) == reader.encode(PROMPTS[1:2])


def test_stage_without_a_gold_judge(run: Path, tmp_path: Path) -> None:
    stage.main(arguments(run, gold=None, output_dir=str(tmp_path)))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["win_rate"] == {} and scores["policies"]["ppo"]["gold"] is None


def test_stage_says_which_stage_is_missing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ppo .*does not exist; run `make ppo"):
        stage.main(arguments(run, ppo_model=f"{run}/nothing/ppo"))
    with pytest.raises(UserError, match="best_of: 0"):
        stage.main(arguments(run, best_of=0))


def test_stage_refuses_another_vocabulary(run: Path, tmp_path: Path) -> None:
    from pipeline.text.tokenizer import train_tokenizer

    tiny_policy(4).save_pretrained(tmp_path / "other")
    train_tokenizer(["zebra quagga okapi"] * 30, 300).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another vocabulary"):
        stage.main(arguments(run, ppo_model=str(tmp_path / "other"), output_dir=str(tmp_path / "out")))


def test_a_judge_gets_answers_in_the_form_of_their_prompts() -> None:
    seen = []

    def gold(prompts, completions, answer):
        seen.extend(zip(completions, answer, strict=True))
        return [1.0] * len(prompts)

    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    stage._judged(gold, "gold", {"answer": [1, 2]}, [prompt for prompt in prompts for _ in range(2)], list("wxyz"))
    assert [(answer[0]["content"], key) for answer, key in seen] == [("w", 1), ("x", 1), ("y", 2), ("z", 2)]
    assert stage._judged(gold, "gold", {"answer": [1]}, ["text"], ["w"]) and seen[-1] == ("w", 1)


def test_wilson_interval() -> None:
    """Against the formula solved the other way: the shares p from which the observed one is 1.96 σ(p) away."""
    for share, n in ((0.518, 620), (0.7, 10), (0.02, 50), (0.5, 1)):
        for end in wilson_interval(share, n):
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert wilson_interval(0.518, 620) == (pytest.approx(0.4787, abs=1e-4), pytest.approx(0.5571, abs=1e-4))
    assert wilson_interval(1.0, 20) == (pytest.approx(0.8389, abs=1e-4), pytest.approx(1.0))
    assert wilson_interval(0.0, 20)[0] == pytest.approx(0.0, abs=1e-12)
