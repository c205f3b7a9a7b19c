"""`PPOTrainer.step`: answers that the caller sampled and scored are learned from as `train` learns from its own."""

import pytest
import torch
from ppo_tools import count_t7, critic, end_alike, policy, prompts, same, trainer, weights

from pipeline.errors import UserError


def recorded(made):
    """Train, and return what `step` takes: (prompts, completions, scores, logprobs) of each update."""
    rounds, sample = [], made.sample

    def sample_and_keep(update):
        rollout, metrics = sample(update)
        asked, said, logprobs = [], [], []
        for i, (p, r) in enumerate(
            zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True)
        ):
            asked.append(rollout.sequences[i, :p].tolist())
            said.append(rollout.sequences[i, p : p + r].clone())
            logprobs.append(rollout.sampler_logprobs[i, :r].tolist())
        scores = rollout.scores + made.args.missing_eos_penalty * (~rollout.ended)
        rounds.append((asked, said, scores.tolist(), logprobs))
        return rollout, metrics

    made.sample = sample_and_keep
    made.train()
    return rounds


def numbers(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time", "episodes_per", "seconds"))} for row in rows]


def test_step_gives_the_weights_and_figures_of_train(tmp_path):
    settings = {
        "missing_eos_penalty": 0.5,
        "eval_rows": prompts(4),
        "eval_steps": 2,
        "total_episodes": 24,
        "critic_warmup_updates": 1,
        "adaptive_kl_target": 0.5,
    }
    one, two = trainer(tmp_path / "train", **settings), trainer(tmp_path / "step", **settings)
    for asked, said, scores, logprobs in recorded(one):
        metrics = two.step(asked, said, torch.tensor(scores), logprobs)
    assert metrics["objective/kl"] == one.state.metrics["objective/kl"]
    assert end_alike(one, two)
    assert numbers(one.rows) == numbers(two.rows)
    with pytest.raises(UserError, match="all 3 updates of total_episodes are done"):
        two.step(asked, said, scores)


def test_step_takes_text_and_messages(tmp_path):
    made = trainer(tmp_path, batch_size=2, num_mini_batches=1)
    seen, estimate = [], made.learner.estimate
    made.learner.estimate = lambda rollout, *rest: (seen.append(rollout), estimate(rollout, *rest))[1]
    made.step(["t6 t7", "t8"], ["t9 t10", [1]], [1.0, 2.0])
    made.step([[{"role": "user", "content": "t6"}]] * 2, [[{"role": "assistant", "content": "t9"}]] * 2, [1.0, 2.0])
    assert seen[0].sequences.tolist() == [[6, 7, 9, 10, 1], [8, 1, 0, 0, 0]]
    assert seen[0].ended.tolist() == [True, True] and seen[0].response_lengths.tolist() == [3, 1]
    assert seen[1].sequences.tolist() == [[3, 6, 5, 4, 9, 1]] * 2 and seen[1].prompt_lengths.tolist() == [4, 4]


def test_a_loop_of_ones_own_is_resumed(tmp_path):
    rounds = recorded(trainer(tmp_path / "whole", total_episodes=24))
    whole = trainer(tmp_path / "steps", total_episodes=24, save_steps=1)
    for asked, said, scores, _ in rounds:
        whole.step(asked, said, scores)
    parts = [
        trainer(
            tmp_path / "parts", total_episodes=24, save_steps=1, models=(policy(s), critic(s + 1)), reference=policy(0)
        )
        for s in (0, 7)
    ]
    for part, first, last in ((parts[0], 0, 2), (parts[1], 2, 3)):
        assert part.resume() == first
        for asked, said, scores, _ in rounds[first:last]:
            part.step(asked, said, scores)
    assert same(weights(whole.models.policy), weights(parts[1].models.policy))


def test_steps_beside_another_runs_checkpoints_are_refused(tmp_path):
    (asked, said, scores, _), *_ = recorded(trainer(tmp_path / "whole", total_episodes=24))
    trainer(tmp_path / "run", total_episodes=24, save_steps=1).step(asked, said, scores)
    other = trainer(tmp_path / "run", total_episodes=24, save_steps=1)
    with pytest.raises(UserError, match="call `resume` to go on from them, or choose another output_dir"):
        other.step(asked, said, scores)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": [[6]]}, "1 prompts, but batch_size asks for 2"),
        ({"scores": [1.0]}, "1 scores, but batch_size asks for 2"),
        ({"scores": [1.0, float("nan")]}, "row 1: the score is nan"),
        ({"completions": [[9, 1], []]}, "row 1: the prompt or the completion is empty"),
        ({"completions": [[9] * 48, [1]]}, r"row 0: .* context of 48"),
        ({"logprobs": [[-1.0], [-1.0]]}, "row 0: 1 logprobs for 2 tokens"),
        ({"logprobs": [[-1.0, -1.0], [float("nan")]]}, "row 1: a logprob is not a finite number"),
        ({"completions": [[9, 1], [16]]}, "row 1: a token id lies outside the policy's vocabulary of 16"),
        ({"prompts": [[-1], [7]]}, "row 0: a token id lies outside the policy's vocabulary of 16"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, change, sentence):
    made = trainer(tmp_path, batch_size=2, num_mini_batches=1)
    rows = {"prompts": [[6], [7]], "completions": [[9, 1], [1]], "scores": [0.0, 1.0]}
    with pytest.raises(UserError, match=sentence):
        made.step(**rows | change)


def test_the_weight_cap_asks_for_the_samplers_logprobs(tmp_path):
    made = trainer(tmp_path, batch_size=2, num_mini_batches=1, sampler_weight_cap=2.0)
    with pytest.raises(UserError, match="pass the sampler's logprobs"):
        made.step([[6], [7]], [[9, 1], [1]], count_t7([0, 0], ["t7", ""]))
