"""RLOO: its advantage by hand, its gradient without bias, a known optimum, and no critic anywhere."""

import itertools
import json

import pytest
import torch
from ppo_tools import critic, policy, rolled, same, trainer, weights
from test_ppo_bandit import ARMS, BETA, bandit, distribution

from pipeline.errors import UserError
from pipeline.ppo import algorithm as A

RLOO = {"advantage_estimator": "rloo", "num_generations": 4}


def test_leave_one_out_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 10.0])
    expected = [1 - 2.5, 2 - 2, 3 - 1.5, 4 - 7, 4 - 7, 10 - 4]
    assert A.leave_one_out(returns, 3).tolist() == pytest.approx(expected)
    assert A.leave_one_out(returns, 2).tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0, -6.0, 6.0])


def test_the_gradient_has_no_bias():
    """Its expectation over all pairs of draws is the gradient of the expected return, exactly."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.double, requires_grad=True)
    rewards = torch.tensor([1.0, 5.0, -2.0], dtype=torch.double)
    (exact,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    found = torch.zeros(3, dtype=torch.double)
    for pair in itertools.product(range(3), repeat=2):
        logprobs = logits.log_softmax(0)[list(pair)]
        advantages = A.leave_one_out(rewards[list(pair)], 2)
        (gradient,) = torch.autograd.grad((advantages * logprobs).mean(), logits)
        found += logprobs.sum().exp().detach() * gradient
    torch.testing.assert_close(found, exact)


def test_every_token_of_an_answer_has_the_advantage_of_its_return(tmp_path):
    made = trainer(tmp_path, reference=policy(5), kl_coef=0.3, missing_eos_penalty=0.5, **RLOO)
    rollout, metrics = rolled(made)
    kl = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    returns = rollout.scores - 0.3 * kl
    for i in range(8):
        others = [j for j in range(8) if j // 4 == i // 4 and j != i]
        row, length = rollout.advantages[i], int(rollout.response_lengths[i])
        expected = returns[i] - returns[others].mean()
        torch.testing.assert_close(row[:length], expected.expand(length), atol=1e-5, rtol=0)
        assert (row[length:] == 0).all()
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.3 * kl.mean().item(), rel=1e-4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_bandit_reaches_the_known_optimum(tmp_path, seed):
    """The same 1 % of the possible gain as with a critic (test_ppo_bandit.py)."""
    made = bandit(tmp_path, seed, models=(policy(seed, size=8), None), critic_learning_rate=None, **RLOO)
    ref = distribution(made.models.policy)
    made.train()
    found, best = distribution(made.models.policy), BETA * torch.logsumexp(ref + ARMS / BETA, 0)

    def objective(logprobs):
        return (logprobs.exp() * (ARMS - BETA * (logprobs - ref))).sum()

    gap = (best - objective(found)) / (best - objective(ref))
    assert 0 <= gap < 0.01, f"{gap:.3f} of the possible gain is missing"


def test_there_is_no_critic_anywhere(tmp_path):
    made = trainer(tmp_path, total_episodes=16, save_steps=1, **RLOO)
    made.train()
    assert made.models.critic is made.models.critic_forward is made.learner.critic is None
    names = {"critic", "value", "clipfrac_avg", "explained"}
    logged = set().union(*made.rows)
    assert {n for n in logged if any(word in n for word in names)} == {"policy/clipfrac_avg"}
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    assert set(json.loads((checkpoint / "manifest.json").read_text())) == {"policy.safetensors", "state.pt"}
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert set(state["optimizers"]) == {"policy"}
    made.save_model(tmp_path / "out")
    assert not (tmp_path / "out" / "critic").exists() and not (tmp_path / "out" / "value_head.safetensors").exists()


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    options = RLOO | {"save_steps": 2, "reference": policy(5)}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    def kill(made, metrics):
        if made.state.updates_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", callbacks=[kill], **options).train()
    second = trainer(tmp_path / "parts", **(options | {"models": (policy(7), None)}))
    second.train()
    assert [row["step"] for row in second.rows] == [3, 4]
    assert same(weights(whole.models.policy), weights(second.models.policy))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_generations": 1}, "compares answers to one prompt; set num_generations to 2 or more"),
        ({"models": (policy(), critic())}, "advantage_estimator rloo has no critic; pass none"),
        ({"share_trunk": True}, "share_trunk has no meaning with advantage_estimator rloo"),
        ({"critic_warmup_updates": 1}, "critic_warmup_updates has no meaning"),
        ({"critic_learning_rate": 1e-3}, "critic_learning_rate has no meaning"),
        ({"vf_coef": 0.5}, "vf_coef has no meaning"),
        ({"cliprange_value": None}, "cliprange_value has no meaning"),
        ({"gamma": 0.9}, "gamma has no meaning"),
        ({"lam": 0.9}, "lam has no meaning"),
        ({"lam_value": 1.0}, "lam_value has no meaning"),
        ({"whiten_rewards": True}, "whiten_rewards has no meaning"),
        ({"advantage_estimator": "grpo"}, "advantage_estimator: 'grpo' is none of 'gae', 'rloo'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, **(RLOO | changes))


def test_step_wants_the_answers_to_a_prompt_together(tmp_path):
    made = trainer(tmp_path, batch_size=4, num_mini_batches=1, **RLOO)
    with pytest.raises(UserError, match="row 2: another prompt than the row before, but num_generations 4"):
        made.step([[6], [6], [7], [6]], [[9, 1]] * 4, [0.0, 1.0, 2.0, 3.0])
    made.step([[6]] * 4, [[9, 1]] * 4, [0.0, 1.0, 2.0, 3.0])
