"""Policy and critic on one trunk: the gradient, the warm-up, a known optimum, resume, what is saved."""

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import critic, policy, same, trainer, weights
from safetensors.torch import load_file
from test_ppo_bandit import ARMS, BETA, bandit, distribution

from pipeline.errors import UserError
from pipeline.ppo import algorithm as A


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision a process; other tests want another."""
    AcceleratorState._reset_state(reset_partial_state=True)


def shared(tmp_path, **changes):
    return trainer(tmp_path, share_trunk=True, **changes)


def test_the_gradient_is_that_of_both_losses(tmp_path):
    made = shared(tmp_path, num_mini_batches=1, num_ppo_epochs=1, vf_coef=0.7, entropy_coef=0.1, reference=policy(5))
    rollout, _ = made.sample(0)
    made.learner.estimate(rollout, 0, made.state.kl_coef)
    everything = torch.arange(8)
    ids, predicts = rollout.inputs(everything)
    hidden = made.models.policy.model(ids).last_hidden_state[predicts]
    values = made.models.critic(hidden)[:, 0]
    torch.testing.assert_close(rollout.values[rollout.mask], values.detach())
    found = {}

    def record(network):
        found["policy"] = {n: p.grad.clone() for n, p in made.models.policy.named_parameters()}
        found["head"] = made.models.critic.weight.grad.clone()
        return torch.zeros(())

    made.learner.step = record
    metrics = made.learner.update(rollout, 0)

    made.learner.policy.optimizer.zero_grad()
    tokens, mask = rollout.mask.sum(), rollout.mask
    distribution_ = made.models.policy.lm_head(hidden).log_softmax(-1)
    logprobs = distribution_.gather(-1, ids[:, 1:][predicts[:, :-1]][:, None])[:, 0]
    policy_loss = -(rollout.advantages[mask] * (logprobs - rollout.logprobs[mask]).exp()).sum()
    value_loss, _ = A.value_loss(values, rollout.values[mask], rollout.returns[mask], 0.2)
    entropy = -(distribution_.exp() * distribution_).sum()
    ((policy_loss + 0.7 * value_loss - 0.1 * entropy) / tokens).backward()
    for name, parameter in made.models.policy.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found["policy"][name], parameter.grad, atol=1e-5 * scale + 1e-9, rtol=1e-3, msg=name)
    torch.testing.assert_close(found["head"], made.models.critic.weight.grad, atol=1e-7, rtol=1e-3)
    assert metrics["loss/value_avg"] == pytest.approx((value_loss / tokens).item(), rel=1e-4)


def test_the_head_alone_warms_up(tmp_path):
    made = shared(tmp_path, critic_warmup_updates=2, total_episodes=24, weight_decay=0.1, reference=policy(5))
    before, head = weights(made.models.policy), made.models.critic.weight.detach().clone()
    after = []
    made.callbacks.append(lambda t, m: after.append((same(before, weights(t.models.policy)), dict(m))))
    made.train()
    assert [resting for resting, _ in after] == [True, True, False]
    assert not torch.equal(made.models.critic.weight, head)
    assert "loss/policy_avg" not in after[0][1] and "loss/value_avg" in after[0][1]
    assert "policy/grad_norm" not in after[0][1] and after[0][1]["critic/grad_norm"] > 0
    assert after[2][1]["val/ratio_first"] == 1.0 and "policy/grad_norm" in after[2][1]


def test_learning_rates_are_apart(tmp_path):
    made = shared(tmp_path, learning_rate=1e-4, critic_learning_rate=1e-2, lr_scheduler_type="constant")
    made.train()
    assert (made.rows[-1]["lr"], made.rows[-1]["critic/lr"]) == (1e-4, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_bandit_reaches_the_known_optimum(tmp_path, seed):
    made = bandit(tmp_path, seed, models=(policy(seed, size=8), None), share_trunk=True)
    ref = distribution(made.models.policy)
    made.train()
    found, best = distribution(made.models.policy), BETA * torch.logsumexp(ref + ARMS / BETA, 0)

    def objective(logprobs):
        return (logprobs.exp() * (ARMS - BETA * (logprobs - ref))).sum()

    assert 0 <= (best - objective(found)) / (best - objective(ref)) < 0.02


def test_a_run_goes_on_to_the_bit(tmp_path):
    whole = shared(tmp_path / "whole", total_episodes=32, reference=policy(5))
    whole.train()
    first = shared(tmp_path / "parts", total_episodes=32, save_steps=2, reference=policy(5))
    first.callbacks.append(lambda t, m: (_ for _ in ()).throw(KeyboardInterrupt) if t.state.updates_done == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = shared(tmp_path / "parts", total_episodes=32, save_steps=2, reference=policy(5))
    second.train()
    assert second.rows[0]["step"] == 3
    assert same(weights(whole.models.policy), weights(second.models.policy)) and torch.equal(
        whole.models.critic.weight, second.models.critic.weight
    )


def test_the_head_is_saved_beside_the_policy(tmp_path):
    made = shared(tmp_path, total_episodes=8)
    made.train()
    made.save_model(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "value_head.safetensors")["weight"], made.models.critic.weight)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "critic").exists()


@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_critic_or_a_shared_trunk_but_not_both(tmp_path, share_trunk):
    judge = critic() if share_trunk else None
    with pytest.raises(UserError, match="one of the two"):
        trainer(tmp_path, models=(policy(), judge), share_trunk=share_trunk)
