"""What PPO learns: nothing from shuffled rewards, by exact expectation on a path task; and a golden trajectory."""

import itertools
import json

import golden
import pytest
import torch
from ppo_tools import critic, policy, tokenizer, trainer

BETA, END, STEPS, WORDS = 0.3, 1, 3, 8
EDGES = {(3, 4), (4, 3), (3, 5), (5, 6), (6, 7), (4, 6), (6, 4), (5, 3)}  # from t3, the goal t7 is three steps away


def walk_reward(words):
    """0.4 an edge that exists, walked from t3 until the first that does not, and 0.4 more for ending in t7."""
    place, earned = 3, 0.0
    for word in words:
        if (place, word) not in EDGES:
            return earned
        place, earned = word, earned + 0.4
    return earned + (0.4 if place == 7 else 0.0)


def path_reward(prompts, completions, **columns):
    return [walk_reward([int(word[1:]) for word in text.split()]) for text in completions]


# Every answer there is: at most STEPS tokens, the end token nowhere but last. Special tokens decode to nothing.
ANSWERS = [
    answer
    for n in range(1, STEPS + 1)
    for answer in itertools.product(range(WORDS), repeat=n)
    if END not in answer[:-1] and (n == STEPS or answer[-1] == END)
]
REWARDS = torch.tensor([walk_reward([t for t in answer if t > 2]) for answer in ANSWERS])


@torch.no_grad()
def distribution(model):
    """log π of each of ANSWERS."""
    rows = torch.tensor([[3, *answer, *[0] * (STEPS - len(answer))] for answer in ANSWERS])
    logprobs = model(rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    lengths = torch.tensor([len(answer) for answer in ANSWERS])
    return (logprobs * (torch.arange(STEPS) < lengths[:, None])).sum(1)


def walker(tmp_path, seed, reward=path_reward, updates=40, **changes):
    models = policy(seed, size=WORDS), critic(seed + 100, size=WORDS)
    return trainer(
        tmp_path,
        models=models,
        words=tokenizer(WORDS),
        rows=[{"prompt": "t3"}] * 4,
        rewards=reward,
        seed=seed,
        **{
            "kl_coef": BETA,
            "response_length": STEPS,
            "batch_size": 128,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 64,
            "learning_rate": 3e-3,
            "critic_learning_rate": 1e-2,
            "total_episodes": 128 * updates,
            **changes,
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_path_task_reaches_the_known_optimum(tmp_path, seed):
    """Over all 400 answers y: max E[r] − β·KL = β·log Σ π_ref(y)·exp(r(y)/β); at least 90 % of the gain is reached.

    Seed 0 lacks most: there the reference takes a rewarded path once in 10,000 walks, and what is hardly ever sampled
    is hardly ever learned.
    """
    made = walker(tmp_path, seed, updates=120)
    ref = distribution(made.models.policy)
    assert ref.exp().sum() == pytest.approx(1.0, abs=1e-5) and REWARDS.max() == pytest.approx(1.6)
    made.train()
    found = distribution(made.models.policy)

    def objective(logprobs):
        return (logprobs.exp() * (REWARDS - BETA * (logprobs - ref))).sum()

    best = BETA * torch.logsumexp(ref + REWARDS / BETA, 0)
    missing = ((best - objective(found)) / (best - objective(ref))).item()
    assert -1e-4 <= missing < 0.1, f"{missing:.3f} of the possible gain is missing"


@pytest.mark.slow
def test_without_a_penalty_the_kl_grows_past_the_optimum(tmp_path):
    """A control: β = 0 earns more reward at a much greater KL, and less of what β = 0.3 wants."""
    ends = {}
    for beta in (BETA, 0.0):
        made = walker(tmp_path, 1, updates=60, kl_coef=beta)
        ref = distribution(made.models.policy)
        made.train()
        found = distribution(made.models.policy)
        kl, reward = (found.exp() * (found - ref)).sum().item(), (found.exp() * REWARDS).sum().item()
        ends[beta] = kl, reward, reward - BETA * kl
    assert ends[0.0][0] > 1.5 * ends[BETA][0] and ends[0.0][1] > ends[BETA][1], ends
    assert ends[0.0][2] < ends[BETA][2], ends


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path):
    random = torch.Generator().manual_seed(0)

    def shuffled(prompts, completions, **columns):
        rewards = torch.tensor(path_reward(prompts, completions))
        return rewards[torch.randperm(len(rewards), generator=random)].tolist()

    gains = {}
    for name, reward in (("true", path_reward), ("shuffled", shuffled)):
        made = walker(tmp_path, 0, reward, updates=15)
        before = (distribution(made.models.policy).exp() * REWARDS).sum()
        made.train()
        gains[name] = ((distribution(made.models.policy).exp() * REWARDS).sum() - before).item()
    assert gains["true"] > 0.2 and abs(gains["shuffled"]) < 0.1 * gains["true"], gains


def test_golden_trajectory(tmp_path):
    """Twenty updates in fp32 on a CPU, as they were when tests/golden_ppo.json was made: a change of any number shows.

    Another version of torch may round otherwise, which twenty updates amplify; `make golden` then makes the file anew,
    after a look at whether the change is one of rounding (LOG.md).
    """
    kept = json.loads(golden.FILE.read_text())
    rows = golden.rows(tmp_path)
    assert len(rows) == len(kept["rows"]) == 20
    for update, (one, two) in enumerate(zip(rows, kept["rows"], strict=True), start=1):
        assert one == pytest.approx(two, rel=2e-3, abs=2e-4), f"update {update}; the file holds on {kept['holds on']}"
