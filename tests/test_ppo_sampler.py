"""The sampler's seam: anything with `sync` and `generate` answers, and what it says is what PPO learns from."""

import dataclasses

import pytest
import torch
from ppo_tools import critic, end_alike, policy, prompts, rolled, trainer, weights

from pipeline.errors import UserError
from pipeline.model.lora import add_lora
from pipeline.model.sampler import OwnSampler, Samples


class Fixed:
    """A sampler that says `t7 <end>` to every prompt, and remembers whose weights it was given."""

    def __init__(self):
        self.synced, self.asked = [], []

    def sync(self, policy):
        self.synced.append({name: value.clone() for name, value in policy.state_dict().items()})

    def generate(self, prompts, *, max_new_tokens, temperature, eos_token_id, pad_token_id, generator):
        self.asked.append((len(prompts), max_new_tokens, temperature, tuple(eos_token_id), pad_token_id))
        width = max(map(len, prompts)) + 2
        rows = [[*prompt, 7, 1] for prompt in prompts]
        count = len(prompts)
        return Samples(
            sequences=torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_lengths=torch.full((count,), 2),
            ended=torch.ones(count, dtype=torch.bool),
            logprobs=torch.full((count, 2), -0.5),
        )


def test_what_the_sampler_says_is_scored_and_learned(tmp_path):
    made = trainer(tmp_path, sampler=Fixed(), temperature=0.7)
    rollout, metrics = rolled(made)
    assert rollout.scores.tolist() == [1.0] * 8  # one t7 in each answer
    for i in range(8):
        p = int(rollout.prompt_lengths[i])
        row = rollout.sequences[i, : p + 2][None]
        assert row[0, p:].tolist() == [7, 1]
        logprobs = (made.models.policy(row).logits[0, p - 1 : -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(rollout.logprobs[i], logprobs.gather(-1, row[0, p:, None])[:, 0], atol=1e-5, rtol=0)
    expected = (rollout.logprobs + 0.5).abs().mean().item()
    assert abs(metrics["val/sampler_gap"] - expected) < 1e-6


def test_it_is_given_the_policys_present_weights_before_each_round(tmp_path):
    sampler, moments = Fixed(), []
    made = trainer(tmp_path, sampler=sampler, total_episodes=16)
    moments.append(weights(made.models.policy))
    made.callbacks.append(lambda t, metrics: moments.append(weights(t.models.policy)))
    made.train()
    assert len(sampler.synced) == len(sampler.asked) == 2
    assert sampler.asked == [(8, 6, 1.0, (1,), 0)] * 2
    for given, own in zip(sampler.synced, moments, strict=False):
        assert all(torch.equal(given[name], own[name]) for name in own)
    assert not torch.equal(sampler.synced[0]["lm_head.weight"], sampler.synced[1]["lm_head.weight"])


def test_the_evaluation_asks_it_too_and_the_reference_once(tmp_path):
    sampler, other = Fixed(), policy(5)
    made = trainer(tmp_path, sampler=sampler, reference=other, total_episodes=8, eval_steps=1, eval_rows=prompts(5))
    made.train()
    answered = [size for size, *_ in sampler.asked]
    assert answered == [5, 5, 8, 5]  # policy and reference before, a round, the policy after
    assert torch.equal(sampler.synced[1]["lm_head.weight"], other.lm_head.weight)
    assert made.rows[0]["eval/length"] == 2.0 and made.rows[0]["eval/win_rate"] == 0.5


def test_it_is_synced_once_for_all_batches_of_an_evaluation(tmp_path):
    """A separate engine copies all weights at a sync: 20 held-out prompts are three batches of 8, but one sync."""
    sampler = Fixed()
    made = trainer(tmp_path, sampler=sampler, total_episodes=8, eval_steps=1, eval_rows=prompts(20))
    made.evaluate()
    assert [size for size, *_ in sampler.asked] == [8, 8, 4] * 2  # the policy's answers, then the reference's
    assert len(sampler.synced) == 2


class Silent(Fixed):
    """One that does not know its log-probabilities, or knows too many."""

    width = None

    def generate(self, prompts, **options):
        samples = super().generate(prompts, **options)
        samples.logprobs = None if self.width is None else torch.zeros(len(prompts), self.width)
        return samples


def test_what_a_sampler_leaves_out_is_said(tmp_path):
    made = trainer(tmp_path, sampler=Silent(), total_episodes=8)
    made.train()
    assert "val/sampler_gap" not in made.rows[0]
    with pytest.raises(UserError, match="sampler_weight_cap is set, but the sampler Silent gives no logprobs"):
        trainer(tmp_path, sampler=Silent(), sampler_weight_cap=2.0).train()
    wide = Silent()
    wide.width = 9
    with pytest.raises(UserError, match=r"Silent: logprobs must be finite numbers of the shape \(8, 2\)"):
        trainer(tmp_path, sampler=wide).train()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ended": torch.ones(8, dtype=torch.long)}, "ended must be a tensor of truth values"),
        ({"response_lengths": torch.full((8,), 9)}, "row 0: sequences must hold the prompt"),
        ({"sequences": torch.zeros(8, 20, dtype=torch.long)}, "row 0: sequences must hold the prompt"),
        ({"sequences": torch.zeros(7, 20, dtype=torch.long)}, "one answer to each of the 8 prompts"),
        ({"logprobs": torch.full((8, 2), float("nan"))}, "logprobs must be finite"),
    ],
)
def test_samples_that_make_no_sense_are_refused(tmp_path, change, sentence):
    sampler = Fixed()
    generate = sampler.generate
    sampler.generate = lambda prompts, **options: dataclasses.replace(generate(prompts, **options), **change)
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, sampler=sampler).train()


@pytest.mark.parametrize("sampler", [Fixed, len, "vllm"])
def test_a_sampler_is_an_object_with_two_methods(tmp_path, sampler):
    with pytest.raises(UserError, match="sampler: pass an object with the methods sync"):
        trainer(tmp_path, sampler=sampler)


def test_a_lora_reference_is_not_for_a_sampler_of_ones_own(tmp_path):
    models = add_lora(policy(), r=2), critic()
    with pytest.raises(UserError, match="cannot answer as a LoRA policy without its adapter"):
        trainer(tmp_path, sampler=Fixed(), models=models, eval_rows=prompts(3))
    trainer(tmp_path, sampler=OwnSampler(), models=models, eval_rows=prompts(3)).evaluate()


def test_our_own_is_the_default(tmp_path):
    one, two = trainer(tmp_path), trainer(tmp_path, sampler=OwnSampler())
    one.train(), two.train()
    assert end_alike(one, two)
