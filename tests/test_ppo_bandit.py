"""PPO finds the optimum of a bandit with a KL penalty, which is known."""

import pytest
import torch
from ppo_tools import critic, policy, tokenizer, trainer

BETA = 0.5
ARMS = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 0.9, 0.1, 0.4])  # the first three are special: they decode to nothing


def bandit(tmp_path, seed, rewards=ARMS, **changes):
    def reward(prompts, completions, **columns):
        return [float(rewards[int(text[1:])] if text else rewards[0]) for text in completions]

    models = changes.pop("models", (policy(seed, size=8), critic(seed + 100, size=8)))
    return trainer(
        tmp_path,
        models=models,
        words=tokenizer(8),
        rows=[{"prompt": "t6 t7"}] * 4,
        rewards=reward,
        seed=seed,
        **{
            "kl_coef": BETA,
            "response_length": 1,
            "batch_size": 128,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 64,
            "learning_rate": 3e-3,
            "critic_learning_rate": 1e-2,
            "total_episodes": 128 * 40,
            **changes,
        },
    )


def distribution(model):
    with torch.no_grad():
        return model(torch.tensor([[6, 7]])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_bandit_reaches_the_known_optimum(tmp_path, seed):
    """The optimum of E[r] − β·KL(π‖π_ref) is π* ∝ π_ref·exp(r/β), and its value β·log Z."""
    made = bandit(tmp_path, seed)
    ref = distribution(made.models.policy)
    made.train()
    found = distribution(made.models.policy)
    best = BETA * torch.logsumexp(ref + ARMS / BETA, 0)

    def objective(logprobs):
        return (logprobs.exp() * (ARMS - BETA * (logprobs - ref))).sum()

    optimum = (ref + ARMS / BETA).log_softmax(-1)
    assert objective(optimum) == pytest.approx(best.item(), abs=1e-5)
    gap = (best - objective(found)) / (best - objective(ref))
    assert 0 <= gap < 0.01, f"{gap:.3f} of the possible gain is missing"
    assert (found.exp() - optimum.exp()).abs().max() < 0.03


def test_a_constant_reward_moves_nothing_but_noise(tmp_path):
    made = bandit(tmp_path, 0, rewards=torch.full((8,), 0.7), total_episodes=128 * 20)
    ref = distribution(made.models.policy)
    made.train()
    found = distribution(made.models.policy)
    assert (found.exp() * (found - ref)).sum() < 0.01
