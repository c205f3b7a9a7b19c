"""What a model does after its head is taken from the model: sampler, log-probabilities and gradients agree with it."""

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import config, critic, policy, rolled, tokenizer, trainer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.judging import Policy, answer, sequence_kl, sequence_logprobs
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.lora import add_lora
from pipeline.model.sampler import generate, stream

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


class Louder(LlamaForCausalLM):
    """Logits times a number that stands in the config under a name of its own."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits * self.config.loudness
        return out


class OursLouder(GPTForCausalLM):
    """The same of our own GPT, whose fast decoder knows nothing of it."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits * 3.0
        return out


def falcon():
    shape = SHAPE | FALCON | {"lm_head_multiplier": 3.0, "num_hidden_layers": 1}
    return FalconH1ForCausalLM(FalconH1Config(**shape))


MODELS = {
    "an unknown name": lambda: Louder(LlamaConfig(**SHAPE, loudness=3.0)),
    "ours": lambda: OursLouder(config()),
    "falcon_h1": falcon,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=1.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=3.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=0.3)),
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def own_logprobs(model, sequence, start, temperature):
    """log π of the tokens from `start` on, by the model's own forward pass over one row."""
    with torch.no_grad():
        logits = model(input_ids=sequence[None]).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, sequence[1:, None])[start - 1 :, 0]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_models_own_forward(tmp_path, name, capsys):
    made = trainer(tmp_path, models=(build(name), critic()), temperature=0.7, total_episodes=16, num_ppo_epochs=1)
    assert made.models.policy_forward.own_logits and made.models.reference_forward.own_logits
    said = [line for line in capsys.readouterr().out.splitlines() if "not those of the head alone" in line]
    assert len(said) == 1 and "policy and reference" in said[0]
    rollout, metrics = rolled(made)
    assert metrics["val/sampler_gap"] < 1e-4  # the sampler follows the model, too
    for i, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)):
        expected = own_logprobs(made.models.policy, rollout.sequences[i, : start + length], int(start), 0.7)
        torch.testing.assert_close(rollout.logprobs[i, :length], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs)
    made.train()  # two updates: the second sees a policy that has moved
    assert all(row["val/sampler_gap"] < 1e-4 and "sampler" not in row.get("warning", "") for row in made.rows)


def test_a_plain_head_is_used_as_it_is(tmp_path, capsys):
    made = trainer(tmp_path, models=(LlamaForCausalLM(LlamaConfig(**SHAPE)), critic()))
    assert not made.models.policy_forward.own_logits and not made.models.reference_forward.own_logits
    assert "head alone" not in capsys.readouterr().out
    assert not trainer(tmp_path / "ours").models.policy_forward.own_logits


@pytest.mark.parametrize("way", ["share_trunk", "lora", "recomputed"])
def test_every_way_of_training_follows_the_model(tmp_path, way):
    model = build("an unknown name")
    changes = {"share_trunk": way == "share_trunk", "gradient_checkpointing": way == "recomputed"}
    models = (add_lora(model, r=2, alpha=4) if way == "lora" else model, None if way == "share_trunk" else critic())
    made = trainer(tmp_path, models=models, total_episodes=16, **changes)
    made.train()
    for row in made.rows:
        assert row["val/sampler_gap"] < 1e-4 and row["val/ratio_first"] == pytest.approx(1.0, abs=1e-6)
    assert made.rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)


def test_gradients_are_those_of_the_models_own_forward(tmp_path):
    """d log π / d weights of one answer, against plain autograd through the model."""
    made = trainer(tmp_path, models=(build("an unknown name"), critic()))
    rollout, _ = rolled(made)
    row = torch.tensor([0])
    model = made.models.policy
    model.zero_grad()
    made.models.policy_forward(*rollout.inputs(row))[0].sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    start, length = int(rollout.prompt_lengths[0]), int(rollout.response_lengths[0])
    ids = rollout.sequences[0, : start + length]
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
    logprobs[start - 1 :].sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["an unknown name", "ours"])
def test_sampling_and_judging_follow_the_model(name):
    model, words = build(name), tokenizer()
    prompts = [[6, 7], [8]]
    options = {"max_new_tokens": 5, "eos_token_id": 1}
    samples = generate(model, prompts, pad_token_id=0, generator=torch.Generator().manual_seed(0), **options)
    for i, row in enumerate(samples.answers(with_end=True)):
        expected = own_logprobs(model, torch.tensor(prompts[i] + row), len(prompts[i]), 1.0)
        torch.testing.assert_close(samples.logprobs[i, : len(row)], expected, atol=1e-5, rtol=1e-4)
        assert sequence_logprobs(model, [prompts[i]], [row]).item() == pytest.approx(expected.sum().item(), abs=1e-4)
    alone = generate(model, prompts[:1], pad_token_id=0, generator=torch.Generator().manual_seed(1), **options)
    one = list(stream(model, prompts[0], generator=torch.Generator().manual_seed(1), **options))
    assert one == alone.answers(with_end=True)[0]
    said = Policy(model, words)
    answers = answer(said, ["t6", "t7"], max_new_tokens=4, temperature=1.0, batch_size=2)
    assert sequence_kl(said, Policy(model, words), answers) == pytest.approx(0.0, abs=1e-6)


def test_a_reference_of_another_architecture_is_followed_by_itself(tmp_path, capsys):
    made = trainer(tmp_path, models=(policy(), critic()), reference=build("an unknown name"))
    assert not made.models.policy_forward.own_logits and made.models.reference_forward.own_logits
    assert "the logits of reference are not" in capsys.readouterr().out
