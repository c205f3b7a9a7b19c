"""Warnings in sentences: each is made to happen in a real run, stands in the log once, and not in a good run."""

import pytest
import torch
from ppo_tools import policy, prompts, trainer

from pipeline.ppo.metrics import zero_std_share
from pipeline.ppo.watch import watch_evaluation, watch_update

GOOD = {
    "objective/entropy": 2.0,
    "response/length": 20.0,
    "response/without_eos": 0.1,
    "objective/kl": 0.1,
    "objective/kl_std": 1.0,
    "val/ratio_first_var": 0.0,
}


def warnings_of(made):
    return [row["warning"] for row in made.rows if "warning" in row]


def test_a_healthy_run_has_no_warning(tmp_path):
    made = trainer(tmp_path, eval_rows=prompts(4), eval_steps=2, gold=lambda p, c, **k: [1.0] * len(p))
    made.train()
    assert warnings_of(made) == []


def test_negative_kl(tmp_path, capsys):
    """Answers that are samples of the reference, not of the policy: E[log π − log π_ref] is −KL(π_ref‖π)."""
    made = trainer(tmp_path, reference=policy(seed=5), batch_size=32, total_episodes=64, learning_rate=1e-6)
    sync = made.answerer.sync
    made.answerer.sync = lambda model: sync(made.models.reference)
    made.train()
    assert made.rows[0]["objective/kl"] < 0
    (sentences,) = warnings_of(made)  # said once, though both updates have it
    assert "below 0 by more than noise" in sentences and "(val/sampler_gap)" in sentences
    assert capsys.readouterr().out.count("warning: ") == 2


def test_a_ratio_that_is_not_one_at_the_first_step(tmp_path):
    made = trainer(tmp_path, total_episodes=16)
    block = made.models.policy.model.layers[0].mlp
    block.register_forward_hook(lambda module, args, output: output + 0.05 * torch.randn_like(output))
    made.train()
    assert len(warnings_of(made)) == 1 and "first step of an update is off 1" in warnings_of(made)[0]


def test_entropy_collapse(tmp_path):
    made = trainer(tmp_path, total_episodes=24, logging_steps=100, learning_rate=1e-6)
    estimate = made.learner.estimate

    def collapse(rollout, update, kl_coef):
        if update == 1:
            with torch.no_grad():
                made.models.policy.model.norm.weight.mul_(100.0)  # logits a hundred times as large
        return estimate(rollout, update, kl_coef)

    made.learner.estimate = collapse
    made.train()
    assert "the entropy fell from" in warnings_of(made)[0]
    assert next(row["step"] for row in made.rows if "warning" in row) == 2  # logged though logging_steps is not due


def test_length_run_away(tmp_path):
    made = trainer(tmp_path, total_episodes=24, response_length=12, learning_rate=1e-6)
    made.answerer.end_tokens = [1, 6, 7, 8, 9, 10, 11]  # short at first
    made.callbacks.append(lambda t, metrics: setattr(t.answerer, "end_tokens", [1]))
    made.train()
    was, now = (row["response/length"] for row in made.rows[:2])
    assert now > 1.5 * was
    assert (
        warnings_of(made) == [made.rows[1]["warning"]] and f"from {was:.0f} to {now:.0f} tokens" in warnings_of(made)[0]
    )


@pytest.mark.slow
def test_proxy_rises_while_gold_falls(tmp_path):
    """A reward for t7 and a gold that takes it ill: both are logged, and the sentence names both movements."""
    made = trainer(
        tmp_path,
        eval_rows=prompts(24),
        eval_steps=2,
        total_episodes=16 * 12,
        batch_size=16,
        learning_rate=5e-3,
        kl_coef=0.0,
        gold=lambda p, c, **k: [-float(t.split().count("t7")) for t in c],
    )
    made.train()
    found = [row for row in made.rows if "eval/proxy" in row]
    assert found[-1]["eval/proxy"] > found[0]["eval/proxy"] + 1
    (sentence,) = [s for s in warnings_of(made) if "gold fell" in s]
    assert f"gold fell from {found[0]['eval/gold']:.3g}" in sentence


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"objective/kl": -0.4}, False),  # 3.2 standard errors of 1/√64
        ({"objective/kl": -0.51}, True),
        ({"val/ratio_first_var": 0.9e-4}, False),
        ({"val/ratio_first_var": 1.1e-4}, True),
        ({"objective/entropy": 0.21}, False),
        ({"objective/entropy": 0.19}, True),
        ({"response/length": 29.0}, False),
        ({"response/length": 31.0}, True),
        ({"response/without_eos": 0.59}, False),
        ({"response/without_eos": 0.61}, True),
    ],
)
def test_thresholds(change, warned):
    watched = {}
    assert watch_update(watched, GOOD, 64) == []
    assert len(watch_update(watched, GOOD | change, 64)) == warned
    assert watch_update(watched, GOOD | change, 64) == []


def test_gold_must_fall_by_more_than_its_error():
    for gold, warned in ((0.41, False), (0.39, True)):
        watched = {}
        for proxy, value in ((0.0, 0.3), (1.0, 0.5), (2.0, gold)):
            said = watch_evaluation(watched, {"eval/proxy": proxy, "eval/gold": value, "eval/gold_se": 0.05})
        assert bool(said) == warned


# --- a reward or a critic that says nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": lambda p, c, **k: [0.3] * len(p), "missing_eos_penalty": 1.0},
        {"rewards": lambda p, c, **k: [5.0] * len(p), "normalize_scores": True},
        # Tells prompts apart, but not the answers to one
        {
            "rewards": lambda p, c, number, **k: [float(n) for n in number],
            "advantage_estimator": "rloo",
            "num_generations": 4,
        },
    ],
    ids=["constant", "constant and normalised", "of the prompt alone"],
)
def test_a_reward_without_a_difference(tmp_path, changes):
    made = trainer(tmp_path, total_episodes=40, learning_rate=1e-5, **changes)
    made.train()
    (sentence,) = [s for s in warnings_of(made) if "same score" in s]
    assert "the same score in 3 updates one after the other" in sentence
    assert next(row["step"] for row in made.rows if sentence in row.get("warning", "")) == 3
    assert all(row["objective/frac_reward_zero_std"] == 1.0 for row in made.rows)


def test_a_reward_with_a_difference_now_and_then_is_no_matter(tmp_path):
    updates = iter(range(100))

    def reward(prompts, completions, **columns):
        return [float(i) if next(updates) % 3 == 2 else 0.0 for i in range(len(prompts))]

    made = trainer(tmp_path, total_episodes=64, rewards=lambda p, c, **k: reward(p, c), learning_rate=1e-6)
    made.train()
    assert not [s for s in warnings_of(made) if "same score" in s]


def test_scores_of_which_prompts_are_alike():
    alone = lambda tensor: tensor  # noqa: E731
    for scores, group, share in (
        ([1.0, 1.0, 2.0, 3.0], 2, 0.5),
        ([1.0, 1.0, 2.0, 2.0 + 1e-9], 2, 1.0),
        ([1e6, 1e6 + 0.5, 0.0, 0.0], 2, 1.0),
        ([1.0, 1.0, 1.0, 1.0], 1, 1.0),
        ([1.0, 1.0, 1.0, 1.1], 1, 0.0),
        ([0.3] * 7, 1, 1.0),
    ):
        assert zero_std_share(torch.tensor(scores, dtype=torch.double), group, alone) == share


def test_one_score_a_process_is_compared_over_all_processes():
    """Two processes with an answer each: `reduce` adds what the other one, whose score is 3, would give."""
    for other, share in ((3.0, 0.0), (1.0, 1.0)):
        shares = iter([torch.tensor([other, 1.0]), torch.tensor(abs(other - (1.0 + other) / 2))])
        assert zero_std_share(torch.tensor([1.0]), 1, lambda tensor, s=shares: tensor + next(s)) == share


def test_a_critic_that_explains_nothing():
    watched = {}
    bad, good = GOOD | {"val/explained_variance": -54.0}, GOOD | {"val/explained_variance": -0.5}
    said = [watch_update(watched, row, 64) for row in [bad] * 7 + [good] + [bad] * 10]
    assert [bool(sentences) for sentences in said] == [False] * 15 + [True] + [False] * 2  # once, after 8 in a row
    assert "val/explained_variance is -54 and was below -1 in 8 updates" in said[15][0]
