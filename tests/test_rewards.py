"""Rewards: models with their own tokenizers, functions, mixes, and one clear sentence for each way to fail."""

import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import config, count_t7, critic, policy, same, tokenizer, trainer, weights
from transformers import BertConfig, BertForSequenceClassification, Qwen3ForSequenceClassification

from pipeline.errors import UserError
from pipeline.model.memory import weight_bytes
from pipeline.ppo.algorithm import add_to_moments, scale_scores
from pipeline.rewards import Ensemble, RewardModel, WeightedRewards, is_function_name, load_rewards, reward_names

TALK = [[{"role": "user", "content": text}] for text in ("t6 t7", "t8", "t9")]
ANSWERS = ["t10 t11 t12 t13", "t10", "t12 t13"]


def saved(folder, model=None, words=None, **extra):
    model = model or critic(seed=4)
    for name, value in extra.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return str(folder)


def score_alone(model, ids):
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden)[0, -1, 0].item()


def test_conversations_are_scored_through_the_models_own_template(tmp_path):
    model = critic(seed=4)
    reward = RewardModel(saved(tmp_path, model), mixed_precision="no", batch_size=2)
    scores = reward(TALK, ANSWERS, unused=[1, 2, 3])
    rows = [[3, 6, 7, 5, 4, 10, 11, 12, 13, 5], [3, 8, 5, 4, 10, 5], [3, 9, 5, 4, 12, 13, 5]]
    assert scores == pytest.approx([score_alone(model, row) for row in rows], abs=1e-5)
    messages = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    assert reward(TALK, messages) == scores


def test_plain_text_ends_with_the_models_end_token(tmp_path):
    model = critic(seed=4)
    reward = RewardModel(saved(tmp_path, model), mixed_precision="no")
    # The end token is glued to the text, so a word model needs the space in the answer.
    scores = reward(["t6 t7 "], ["t10 "])
    assert scores == pytest.approx([score_alone(model, [6, 7, 10, 1])], abs=1e-5)


def test_a_reward_model_with_another_tokenizer(tmp_path):
    """The policy's words are t0 …; this model's ids are shifted by three and its vocabulary is larger."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1, "<u>": 2, **{f"t{i}": i + 3 for i in range(16)}}, "<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>", eos_token="<e>", unk_token="<u>")
    other.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    model = critic(seed=4, size=24)
    reward = RewardModel(saved(tmp_path, model, other), mixed_precision="no")
    assert reward(TALK[:1], ANSWERS[:1]) == pytest.approx([score_alone(model, [9, 10, 13, 14, 15, 16])], abs=1e-5)


def test_score_is_read_at_the_last_token_even_if_pad_is_the_end_token(tmp_path):
    model = critic(seed=4)
    plain = RewardModel(saved(tmp_path / "a", model), mixed_precision="no")
    glued = RewardModel(saved(tmp_path / "b", model, tokenizer(pad="t5"), pad_token_id=5), mixed_precision="no")
    assert glued(TALK, ANSWERS) == pytest.approx(plain(TALK, ANSWERS), abs=1e-5)


def test_batching_and_order_change_nothing(tmp_path):
    reward = RewardModel(saved(tmp_path), mixed_precision="no")
    together = reward(TALK, ANSWERS)
    alone = [reward([p], [c])[0] for p, c in zip(TALK, ANSWERS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3


def test_scores_are_standardised_by_the_models_config(tmp_path):
    plain = RewardModel(saved(tmp_path / "a"), mixed_precision="no")(TALK, ANSWERS)
    path = saved(tmp_path / "b", reward_mean=2.0, reward_std=0.5)
    shifted = RewardModel(path, mixed_precision="no")(TALK, ANSWERS)
    assert shifted == pytest.approx([(r - 2.0) / 0.5 for r in plain], abs=1e-4)


def test_bf16_changes_little_and_something(tmp_path):
    path = saved(tmp_path)
    exact, rounded = (RewardModel(path, mixed_precision=p)(TALK, ANSWERS) for p in ("no", "bf16"))
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.1)


def test_a_stock_classifier_and_one_with_another_head(tmp_path):
    torch.manual_seed(0)
    stock = Qwen3ForSequenceClassification(config(num_labels=1)).eval()
    reward = RewardModel(saved(tmp_path / "q", stock), mixed_precision="no")
    assert reward(TALK[:1], ["t10"]) == pytest.approx([score_alone(stock, [3, 6, 7, 5, 4, 10, 5])], abs=1e-5)
    shape = BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=1
    )
    bert = BertForSequenceClassification(shape).eval()
    reward = RewardModel(saved(tmp_path / "b", bert), mixed_precision="no")
    expected = bert(torch.tensor([[3, 8, 5, 4, 10, 5]])).logits.item()
    assert reward(TALK, ANSWERS)[1] == pytest.approx(expected, abs=1e-5)


def test_a_conversation_longer_than_the_context_keeps_its_end(tmp_path):
    model = critic(seed=4)
    reward = RewardModel(saved(tmp_path, model), mixed_precision="no")
    ids = [3, 6, 5, 4] + [10] * 60 + [5]
    scores = reward([[{"role": "user", "content": "t6"}]], [" ".join(["t10"] * 60)])
    assert scores == pytest.approx([score_alone(model, ids[-48:])], abs=1e-5)


# --- functions and mixes ----------------------------------------------------------------------------------------------


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c.split()) for c in completions]\n"
        "def answer(prompts, completions, answer, **columns):\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("some_rewards", None)


def test_functions_and_models_mix_by_weight(functions, tmp_path):
    path = saved(tmp_path / "model")
    mix = load_rewards(["some_rewards:length", "some_rewards:answer", path], [0.5, -2.0, 3.0], mixed_precision="no")
    model = RewardModel(path, mixed_precision="no")(TALK, ANSWERS)
    scores = mix(TALK, ANSWERS, answer=["t11", "t11", "t13"])
    expected = [0.5 * 4 - 2 + 3 * model[0], 0.5 + 3 * model[1], 0.5 * 2 - 2 + 3 * model[2]]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert load_rewards(["some_rewards:length"])(TALK, ANSWERS) == [4.0, 1.0, 2.0]


def test_names_of_functions_and_folders_are_told_apart(tmp_path):
    assert is_function_name("package.module:name")
    assert not is_function_name("runs/stories/reward") and not is_function_name("org/model")
    assert not is_function_name("C:/models/reward") and not is_function_name("./a:b")


@pytest.mark.parametrize(
    ("names", "weights", "sentence"),
    [
        ([], None, "no reward is given"),
        (["some_rewards:length"], [1.0, 2.0], "2 reward_weights for 1 rewards"),
        (["some_rewards:lenght"], None, "some_rewards has no function lenght"),
        (["some_rewards:constant"], None, "has no function constant"),
        (["no_such_module:f"], None, "importing no_such_module failed"),
        (["broken_rewards:f"], None, r"importing broken_rewards failed \(NameError: name 'nothing' is not defined\)"),
        (["/no/such/folder"], None, "/no/such/folder"),
    ],
)
def test_a_wrong_name_is_one_sentence(functions, names, weights, sentence):
    with pytest.raises(UserError, match=sentence):
        load_rewards(names, weights)


def raises(prompts, completions, **columns):
    if "t10" in completions:
        raise KeyError("boom")
    return [0.0] * len(completions)


def raises_on_batches(prompts, completions, **columns):
    if len(prompts) > 1:
        raise ValueError("one at a time")
    return [0.0]


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (raises, r"reward mine raised KeyError: 'boom', on row 1 \('t10', the answer to 't8'\)"),
        (raises_on_batches, "ValueError: one at a time, on the whole batch"),
        (lambda p, c, **k: [0.0, float("nan"), 1.0], r"returned nan on row 1 \('t10', the answer to 't8'\)"),
        (lambda p, c, **k: [0.0, 1.0, float("inf")], "returned inf on row 2"),
        (lambda p, c, **k: [0.0, 1.0], "returned 2 values for 3 rows"),
        (lambda p, c, **k: None, "returned 'None' instead of a list of numbers"),
        (lambda p, c, **k: 1.0, "returned '1.0' instead of a list of numbers"),
        (lambda p, c, **k: "123", "returned '123' instead of a list of numbers"),
        (lambda p, c, **k: {0: 1.0, 1: 2.0, 2: 3.0}, "instead of a list of numbers"),
        (lambda p, c, **k: [0.0, "1", 2.0], r"returned '1' instead of a number on row 1 \('t10', the answer to 't8'\)"),
        (lambda p, c, **k: [0.0, 1.0, None], "returned 'None' instead of a number on row 2"),
        (lambda p, c, **k: [[0.0], [1.0], [2.0]], "instead of a number on row 0"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_row(function, sentence, monkeypatch):
    monkeypatch.setattr("pipeline.rewards.PAUSES", ())
    with pytest.raises(UserError, match=sentence):
        WeightedRewards([("mine", function, 1.0)])(TALK, ANSWERS)


def test_tensors_and_arrays_of_numbers_are_fine():
    mix = WeightedRewards([("mine", lambda p, c, **k: torch.arange(3), 2.0)])
    assert mix(TALK, ANSWERS) == [0.0, 2.0, 4.0]


# --- folders that are no reward ---------------------------------------------------------------------------------------


def test_a_language_model_is_no_reward(tmp_path):
    """Its head would be drawn at random."""
    with pytest.raises(UserError, match=r"is no trained reward model: it has no weights for score\.weight"):
        RewardModel(saved(tmp_path, policy()))


def test_a_classifier_with_two_labels_is_no_reward(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="no model can be opened"):
        RewardModel(saved(tmp_path, Qwen3ForSequenceClassification(config(num_labels=2))))


def test_messages_without_a_chat_template_are_one_sentence(tmp_path):
    words = tokenizer()
    words.chat_template = None
    mix = load_rewards([saved(tmp_path, words=words)], mixed_precision="no")
    with pytest.raises(UserError, match="has no chat template, which conversations need"):
        mix(TALK, ANSWERS)


# --- ensembles --------------------------------------------------------------------------------------------------------


def gives(*values):
    return lambda prompts, completions, **columns: list(values)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("mean", [2.0, 2.0, 1.0]),
        ("min", [1.0, 2.0, -1.0]),
        # Variances of (1, 2, 3), (2, 2, 2), (-1, 4, 0): 2/3, 0, 14/3
        ("uwo", [2.0 - 0.5 * 2 / 3, 2.0, 1.0 - 0.5 * 14 / 3]),
    ],
)
def test_ensembles_by_hand(combine, expected):
    ensemble = Ensemble([gives(1.0, 2.0, -1.0), gives(2.0, 2.0, 4.0), gives(3.0, 2.0, 0.0)], combine, uwo_coef=0.5)
    assert ensemble(TALK, ANSWERS) == pytest.approx(expected)


def test_an_ensemble_by_name_is_one_reward_of_a_mix(functions, tmp_path):
    names = [saved(tmp_path / "a", critic(seed=4)), saved(tmp_path / "b", critic(seed=5), reward_mean=1.0)]
    first, second = (RewardModel(name, mixed_precision="no")(TALK, ANSWERS) for name in names)
    mix = load_rewards([", ".join(names), "some_rewards:length"], [3.0, 0.5], mixed_precision="no", ensemble="min")
    expected = [3 * min(a, b) + 0.5 * n for a, b, n in zip(first, second, (4, 1, 2), strict=True)]
    assert mix(TALK, ANSWERS) == pytest.approx(expected, abs=1e-4)
    uwo = load_rewards([",".join(names)], mixed_precision="no", ensemble="uwo", uwo_coef=2.0)
    expected = [(a + b) / 2 - 2 * ((a - b) / 2) ** 2 for a, b in zip(first, second, strict=True)]
    assert uwo(TALK, ANSWERS) == pytest.approx(expected, abs=1e-4)
    assert reward_names([",".join(names), "some_rewards:length"]) == [*names, "some_rewards:length"]


def test_a_folder_with_a_comma_in_its_name_is_one_reward(tmp_path):
    assert reward_names([saved(tmp_path / "a,b")]) == [str(tmp_path / "a,b")]


def test_an_ensemble_says_which_member_failed_on_which_row():
    def broken(prompts, completions, **columns):
        return [0.0, float("nan"), 0.0]

    mix = WeightedRewards([("both", Ensemble([gives(1.0, 2.0, 3.0), broken]), 1.0)])
    with pytest.raises(UserError, match=r"^reward broken returned nan on row 1 \('t10'"):
        mix(TALK, ANSWERS)


def test_an_ensemble_needs_members_and_a_known_way():
    with pytest.raises(UserError, match="at least two rewards, not 1"):
        Ensemble([gives(1.0)])
    with pytest.raises(UserError, match="'max' is none of mean, min, uwo"):
        Ensemble([gives(1.0), gives(2.0)], "max")


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_scores_so_far():
    values = [1000.1, 1000.4, 999.0, 1003.0, 1000.0, 1001.5, 998.0]
    moments = [0.0, 0.0, 0.0]
    for part in (values[:2], values[2:3], values[3:]):
        moments = add_to_moments(moments, torch.tensor(part, dtype=torch.double))
    count, mean, squares = moments
    assert (count, mean) == (7, pytest.approx(statistics.fmean(values)))
    assert squares / 6 == pytest.approx(statistics.variance(values), rel=1e-9)


def test_running_moments_are_those_of_all_processes():
    """Two processes that hold half of the scores each; `reduce` adds what the other one would give."""
    mine, other = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 8.0, 3.0])
    mean = torch.cat([mine, other]).mean().item()
    shares = iter([torch.tensor([3.0, 13.0]), ((other - mean) ** 2).sum()])
    moments = add_to_moments([2.0, 4.0, 2.0], mine, lambda tensor: tensor + next(shares))
    assert moments == pytest.approx(add_to_moments([2.0, 4.0, 2.0], torch.cat([mine, other])), rel=1e-6)


def test_scores_are_normalised_then_clipped():
    scores = torch.tensor([1.0, 3.0, 11.0])  # mean 5, variance (16 + 4 + 36)/2 = 28
    moments = add_to_moments([0.0, 0.0, 0.0], scores)
    expected = torch.tensor([-4.0, -2.0, 6.0]) / math.sqrt(28)
    torch.testing.assert_close(scale_scores(scores, moments, None), expected)
    torch.testing.assert_close(scale_scores(scores, moments, 1.0), expected.clamp(-1, 1))
    assert scale_scores(scores, None, 2.0).tolist() == [1.0, 2.0, 2.0]
    assert scale_scores(scores, None, None) is scores
    same = torch.full((4,), 3.0)
    assert scale_scores(same, add_to_moments([0.0, 0.0, 0.0], same), None).tolist() == [0.0] * 4


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_reward_that_fails_stops_the_run_with_its_state_kept(tmp_path):
    """Once it is mended, the run goes on and ends with the weights of one in which nothing happened."""
    calls = []

    def broken(prompts, completions, **columns):
        calls.append(len(prompts))
        return [
            float("nan") if len(calls) == 3 and i == 5 else 1.0 * text.count("t7") for i, text in enumerate(completions)
        ]

    whole = trainer(tmp_path / "a", rewards=count_t7, normalize_scores=True)
    whole.train()
    cut = trainer(tmp_path / "b", rewards=broken, normalize_scores=True)
    with pytest.raises(
        UserError, match=r"reward broken returned nan on row 5 \('.*'\).*the state after update 2 is kept"
    ):
        cut.train()
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000002"]
    again = trainer(tmp_path / "b", rewards=count_t7, normalize_scores=True)
    again.train()
    assert [row["step"] for row in again.rows] == [3, 4] and again.state.score_moments == whole.state.score_moments
    assert same(weights(whole.models.policy), weights(again.models.policy)) and same(
        weights(whole.models.critic), weights(again.models.critic)
    )


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_normalises_and_clips_before_the_penalty(tmp_path):
    made = trainer(
        tmp_path,
        rewards=lambda prompts, completions, number: [float(n) for n in number],
        normalize_scores=True,
        score_clip=0.5,
        missing_eos_penalty=10.0,
        response_length=4,
    )
    seen = []
    for update in range(2):
        rollout, metrics = made.sample(update)
        raw = [float(n) for n in made.prompts.order(8 * update, 8, seed=0)]
        seen += raw
        mean, std = statistics.fmean(seen), statistics.stdev(seen)
        expected = [
            max(-0.5, min(0.5, (r - mean) / std)) - 10 * (not end)
            for r, end in zip(raw, rollout.ended.tolist(), strict=True)
        ]
        assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert metrics["objective/scores_raw"] == pytest.approx(statistics.fmean(raw))


# --- copies, and a second and third try ------------------------------------------------------------------------------


def test_what_a_reward_does_to_its_input_no_other_one_sees():
    seen = []

    def careless(prompts, completions, numbers, **columns):
        seen.append(([list(p) for p in prompts], list(completions), [list(n) for n in numbers]))
        for prompt, completion, number in zip(prompts, completions, numbers, strict=True):
            prompt += [{"role": "assistant", "content": completion}]
            prompt[0]["content"] = "?"
            number.append(7)
        prompts.clear(), completions.clear()
        return [0.0] * len(numbers)

    shared = [{"role": "user", "content": "t6"}]  # one prompt in two rows, as with num_generations
    prompts, completions, columns = [shared, shared, TALK[1]], list(ANSWERS), {"numbers": [[1], [2], [3]]}
    before = repr((prompts, completions, columns))
    mix = WeightedRewards([("a", careless, 1.0), ("b", Ensemble([careless, careless]), 1.0)])
    mix(prompts, completions, **columns)
    assert repr((prompts, completions, columns)) == before
    assert len(seen) == 3 and all(given == seen[0] for given in seen) and seen[0][1] == ANSWERS


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, in none of which time passes."""
    made = []
    monkeypatch.setattr("pipeline.rewards.time.sleep", made.append)
    return made


def failing(times, error=None):
    """A judge behind a network that does not answer the first `times` times."""
    calls, error = [], error or TimeoutError("no answer in 30 s")

    def judge(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) <= times:
            raise error
        return [float(len(calls))] * len(prompts)

    judge.calls = calls
    return judge


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_reward_that_fails_for_a_while_is_tried_again(pauses, caplog, times):
    judge = failing(times)
    assert WeightedRewards([("judge", judge, 1.0)])(TALK, ANSWERS) == [times + 1.0] * 3
    assert judge.calls == [3] * (times + 1) and pauses == [1.0, 5.0][:times]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == times
    if times:
        assert said[0] == "reward judge raised TimeoutError: no answer in 30 s; it is tried again in 1 s"


def test_a_judge_that_stays_away_is_asked_three_times_and_the_rows_are_named(pauses):
    judge = failing(100)
    sentence = r"TimeoutError: no answer in 30 s, on the rows 0 to 2 of the batch, first row 0 \('t10.*after 3 tries"
    with pytest.raises(UserError, match=sentence):
        WeightedRewards([("judge", judge, 1.0)])(TALK, ANSWERS)
    assert judge.calls == [3, 3, 3] and pauses == [1.0, 5.0]


@pytest.mark.parametrize("kind", [KeyError, TypeError, IndexError, AttributeError, NameError, ZeroDivisionError])
def test_a_mistake_in_the_code_is_not_tried_again_and_its_row_found_by_halves(pauses, caplog, kind):
    calls = []

    def wrong(prompts, completions, **columns):
        calls.append(list(completions))
        if "bad" in completions:
            raise kind("boom")
        return [0.0] * len(prompts)

    answers = ["fine"] * 32
    answers[21] = "bad"
    with pytest.raises(UserError, match=r"boom'?, on row 21 \('bad', the answer to 't'\)"):
        WeightedRewards([("wrong", wrong, 1.0)])(["t"] * 32, answers)
    assert pauses == [] and len(calls) <= 1 + 10
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "reward wrong failed; it is asked for parts of the batch, at most 10, to find the row"


def test_a_slow_reward_is_not_asked_for_parts(pauses, monkeypatch):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("pipeline.rewards.time.perf_counter", lambda: next(clock))
    judge = failing(100, RuntimeError("overloaded"))
    with pytest.raises(UserError, match=r"overloaded, on the rows 0 to 2 of the batch.*after 3 tries"):
        WeightedRewards([("judge", judge, 1.0)])(TALK, ANSWERS)
    assert judge.calls == [3, 3, 3]


def test_a_generators_error_and_a_set_are_sentences(pauses):
    def lazily(prompts, completions, **columns):
        yield 1.0
        raise KeyError("second")

    for reward, sentence in (
        (lazily, "reward mine raised KeyError: 'second'"),
        (lambda p, c, **k: {1.0, 2.0, 3.0}, "instead of a list of numbers"),
    ):
        with pytest.raises(UserError, match=sentence):
            WeightedRewards([("mine", reward, 1.0)])(TALK, ANSWERS)
    assert WeightedRewards([("mine", lambda p, c, **k: (float(i) for i in range(3)), 1.0)])(TALK, ANSWERS) == [0, 1, 2]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_judge_that_stays_away_costs_no_update(pauses, tmp_path):
    judge, calls = failing(100), []

    def sometimes(prompts, completions, **columns):
        calls.append(1)
        return judge(prompts, completions) if len(calls) > 2 else count_t7(prompts, completions)

    made = trainer(tmp_path, rewards=sometimes)
    with pytest.raises(UserError, match=r"rows 0 to 7 of the batch.*after 3 tries.*the state after update 2 is kept"):
        made.train()
    assert judge.calls == [8, 8, 8] and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_weights_are_finite_numbers(functions):
    with pytest.raises(UserError, match="reward_weights: nan must be finite"):
        load_rewards(["some_rewards:length"], [float("nan")])


def test_matrices_kept_in_bf16_change_no_score(tmp_path, monkeypatch):
    path = saved(tmp_path)
    halved, maps = RewardModel(path, mixed_precision="bf16"), Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()  # nor does it lie in the file
    monkeypatch.setattr("pipeline.rewards.keep_products_in_bf16", lambda model: None)
    whole = RewardModel(path, mixed_precision="bf16")
    assert weight_bytes(halved.model) < weight_bytes(whole.model)
    assert halved(TALK, ANSWERS) == whole(TALK, ANSWERS)
