"""Every member of the Llama family is its stock model: same logits, gradients, samples and folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gpt_tools import PAD, VOCABULARY, assert_close, assert_same_gradients, batch
from sampler_tools import responses, seeded
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.model import fast_cpu, sampler
from pipeline.model.family import why_not_ours
from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification, GPTModel
from pipeline.model.load import load_policy, load_reward

MEMBERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Llama": (LlamaConfig, {"tie_word_embeddings": False}),
    # Three query heads a key head, tied, and θ and ε as SmolLM2-135M has them
    "SmolLM2": (
        LlamaConfig,
        {
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 72,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        },
    ),
    "Llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "Mistral": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": False, "head_dim": 20}),
    "Qwen2": (Qwen2Config, {}),
    "Qwen2.5, not tied": (Qwen2Config, {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "Qwen3": (Qwen3Config, {"head_dim": 16}),
    "Qwen3 with biases": (
        Qwen3Config,
        {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # large enough that attention is far from uniform
    "num_labels": 1,
}
EVERY = pytest.mark.parametrize("member", MEMBERS)


def config_of(member: str, **changes: Any) -> PreTrainedConfig:
    kind, own = MEMBERS[member]
    return kind(**SMALL | own | changes)


def twins(member: str, ours: Any = GPTForCausalLM, **changes: Any) -> tuple[Any, Any]:
    """Ours and the stock class with the same random weights, norms and biases included."""
    torch.manual_seed(0)
    model = ours(config_of(member, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    prefix = MEMBERS[member][0].__name__.removesuffix("Config")
    stock = getattr(transformers, prefix + ours.stock_suffix)(config_of(member, **changes))
    missing = stock.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    return model, stock


@EVERY
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("kind", ["full", "right", "left", "packed"])
def test_logits_loss_and_gradients_equal_stock(member, kind, by_hand, monkeypatch):
    """Both ways through a block: the hand-written halves where they apply, and the plain formulas."""
    if not by_hand:
        monkeypatch.setattr(fast_cpu, "can_run", lambda *_: False)
    ours, stock = twins(member)
    inputs = batch(kind)
    ours_out, stock_out = ours.eval()(**inputs), stock.eval()(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else slice(None)
    assert_close(ours_out.logits[real], stock_out.logits[real], "logits")
    assert_close(ours_out.loss, stock_out.loss, "loss")
    ours.train()(**inputs).loss.backward()
    stock_out.loss.backward()
    assert_same_gradients(ours, stock)


@EVERY
@pytest.mark.parametrize("kind", ["full", "right", "left"])
def test_a_classifier_equals_stock(member, kind):
    ours, stock = twins(member, GPTForSequenceClassification)
    inputs = batch(kind) | {"labels": torch.tensor([0.3, -1.0, 2.0])}
    ours_out, stock_out = ours(**inputs), stock(**inputs)
    assert_close(ours_out.logits, stock_out.logits, "scores")
    ours_out.loss.backward()
    stock_out.loss.backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("member", [name for name in MEMBERS if "biases" not in name])
def test_every_member_takes_the_fast_ways(member, monkeypatch):
    """A bias on attention's output or in the MLP, which no published model of the family has, goes the plain way."""
    model, _ = twins(member)
    calls, run = [], fast_cpu.run
    monkeypatch.setattr(fast_cpu, "run", lambda *given: calls.append(1) or run(*given))
    model(**batch("right"))
    assert len(calls) == 3 and sampler._is_ours(model)


@EVERY
def test_samples_and_greedy_answers_equal_those_of_stock(member):
    ours, stock = (model.eval() for model in twins(member))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 4, 9, 6)]
    settings: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": [1, 5], "pad_token_id": PAD}
    greedy = responses(sampler.generate(ours, prompts, temperature=0, **settings))
    for prompt, response in zip(prompts, greedy, strict=True):
        asked = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": [1, 5], "pad_token_id": PAD}
        assert response == stock.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()
    drawn, expected = (sampler.generate(model, prompts, generator=seeded(7), **settings) for model in (ours, stock))
    assert torch.equal(drawn.sequences, expected.sequences)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=0, atol=1e-4)


@EVERY
@pytest.mark.parametrize("kind", [GPTForCausalLM, GPTForSequenceClassification])
def test_folders_open_both_ways(tmp_path, member, kind):
    ours, stock = (model.eval() for model in twins(member, kind))
    ids, name = batch("full")["input_ids"], type(stock).__name__
    stock.save_pretrained(tmp_path / "stock")
    opened = (load_policy if kind is GPTForCausalLM else load_reward)(str(tmp_path / "stock"))
    assert type(opened) is kind and type(opened.config) is type(stock.config)
    opened.save_pretrained(tmp_path / "ours")
    written, before = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "stock"))
    assert written == before and written["architectures"] == [name]
    auto = transformers.AutoModelForCausalLM if kind is GPTForCausalLM else None
    again = (auto or transformers.AutoModelForSequenceClassification).from_pretrained(tmp_path / "ours")
    assert type(again) is type(stock)
    with torch.no_grad():
        expected = stock(ids).logits
        assert torch.equal(again(ids).logits, expected)
        assert torch.equal(opened(ids).logits, ours(ids).logits)
        assert torch.equal(kind.from_pretrained(tmp_path / "stock").eval()(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rotary"),
        (
            LlamaConfig(
                **SMALL,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            ),
            "rotary",
        ),
        (MistralConfig(**SMALL, sliding_window=4), "sliding windows"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding windows"),
        (Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=2), "sliding windows"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "activation gelu"),
        (Gemma2Config(**SMALL, head_dim=16), "architecture gemma2"),  # soft caps
        (GPTNeoXConfig(**{**SMALL, "num_key_value_heads": None}), "architecture gpt_neox"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, PreTrainedConfig) else None,
)
def test_what_it_does_not_compute_opens_as_stock_with_the_same_logits(tmp_path: Path, config, reason):
    assert reason in why_not_ours(config)
    with pytest.raises(ValueError, match=reason):
        GPTModel(config)
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    opened = load_policy(str(tmp_path))
    assert type(opened) is type(stock)
    ids = batch("full")["input_ids"]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, stock(ids).logits)
