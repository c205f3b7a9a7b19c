"""Any causal language model is a policy: five architectures, whole or with LoRA, recomputed blocks, bf16."""

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import critic, policy, same, trainer, weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
)

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.load import keep_products_in_bf16, load_critic, load_policy
from pipeline.model.lora import add_lora, trained_weights
from pipeline.model.memory import weight_bytes
from pipeline.model.sampler import generate

COMMON = {
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "num_labels": 1,
    "initializer_range": 0.2,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
}
PYTHIA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
SHAPES = {
    "ours": (lambda: policy(), lambda: critic()),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2ForSequenceClassification,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48},
    ),
    "llama": (LlamaForCausalLM, LlamaForSequenceClassification, LlamaConfig, LLAMA | {"attention_dropout": 0.1}),
    "qwen2": (Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Config, LLAMA | {"tie_word_embeddings": True}),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXConfig, PYTHIA),
}
# Every matrix of the blocks, by the names that each architecture gives them.
MATRICES = {"ours": 7, "gpt2": 4, "llama": 7, "qwen2": 7, "pythia": 4}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_missing_weights_are_not_drawn_at_random(tmp_path, name):
    actor, _ = build(name)
    actor.save_pretrained(tmp_path)
    load_policy(str(tmp_path)), load_critic(str(tmp_path))  # whole; the critic's head is new
    weights = load_file(tmp_path / "model.safetensors")
    block = ".h.1." if name == "gpt2" else ".norm."
    save_file(
        {key: value for key, value in weights.items() if block not in key},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="lacks weights of its language model"):
        load_policy(str(tmp_path))
    with pytest.raises(UserError, match="lacks weights"):
        load_critic(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="no model can be opened"):
        load_policy(str(tmp_path))


def build(name, lora=False):
    """A policy and a critic of an architecture, with random weights."""
    causal, classifier, *shape = SHAPES[name]
    torch.manual_seed(0)
    if shape:
        kind, values = shape
        models = causal(kind(**COMMON | values)), classifier(kind(**COMMON | values))
    else:
        models = causal(), classifier()
    return tuple(add_lora(model, r=4, alpha=8) for model in models) if lora else models


def train(folder, name, lora=False, **changes):
    made = trainer(folder, models=build(name, lora), **{"total_episodes": 16} | changes)
    made.train()
    return made


# --- two updates of each ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", SHAPES)
def test_two_updates_start_at_ratio_one_and_kl_zero(tmp_path, name, lora):
    models = build(name, lora)
    before = [weights(model) for model in models]
    made = trainer(tmp_path, models=models, total_episodes=16)
    made.train()
    first, second = made.rows
    assert first["val/ratio_first"] == 1.0 and first["val/ratio_first_var"] == 0.0
    assert first["objective/kl"] == 0.0 and first["objective/kl_k3"] == 0.0
    # The second update's ratio is of the policy as the first left it; the sampler has computed the same distribution.
    assert second["val/ratio_first"] == 1.0 and second["objective/kl_k3"] > 0
    assert second["val/sampler_gap"] < 1e-5
    for model, start in zip(models, before, strict=True):
        trained = trained_weights(model)
        for key, now in weights(model).items():
            if lora and "lora_" not in key and "score.modules_to_save" not in key:
                assert torch.equal(now, start[key]), key
        moved = [key for key in trained if not torch.equal(start[key], weights(model)[key])]
        assert len(moved) > 0.9 * len(trained)  # the pad token's embedding and the like have no gradient


@pytest.mark.parametrize("name", SHAPES)
def test_lora_sits_at_every_matrix_of_the_blocks(name):
    actor, judge = build(name, lora=True)
    layers = actor.config.num_hidden_layers
    keys = trained_weights(actor)
    assert len(keys) == 2 * MATRICES[name] * layers and all("lora_" in key for key in keys)
    critics = [key for key in trained_weights(judge) if "lora_" not in key]
    assert critics == ["base_model.model.score.modules_to_save.default.weight"]


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_keeps_the_ratio_at_one(tmp_path, name):
    made = train(tmp_path, name, lora=name in ("ours", "llama"), mixed_precision="bf16", total_episodes=8)
    assert made.rows[0]["val/ratio_first"] == 1.0 and made.rows[0]["objective/kl"] == 0.0


# --- what LoRA leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_lora_is_saved_merged_with_the_adapter_beside_it(tmp_path, name):
    actor, judge = build(name)
    actor.save_pretrained(tmp_path / "base")
    models = add_lora(load_policy(str(tmp_path / "base")), r=4, alpha=8), add_lora(judge, r=4, alpha=8)
    made = trainer(tmp_path, models=models, total_episodes=8)
    made.train()
    before = weights(made.models.policy)
    made.save_model(tmp_path / "out")
    assert same(before, weights(made.models.policy))  # merging is done in a copy
    ids = torch.tensor([[3, 6, 7, 9, 10]])
    with torch.no_grad():
        expected, base = made.models.policy(input_ids=ids).logits, actor.eval()(input_ids=ids).logits
        assert (expected - base).abs().max() > 1e-3
        for opened in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(),
            load_policy(str(tmp_path / "out" / "adapter")),
        ):
            torch.testing.assert_close(opened(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
        values = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "critic").eval()
        expected = made.models.critic(input_ids=ids).logits
        torch.testing.assert_close(values(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in key for key in adapter)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("padding", ["none", "left"])  # the second leaves the hand-written halves of a block
def test_products_kept_in_bf16_change_no_bit_under_autocast(kind, padding):
    """Heads of 8: 1/√8, which is no power of two, goes into the queries' matrix before it is cast."""
    torch.manual_seed(0)
    model = GPTForCausalLM(kind(**COMMON, **LLAMA, head_dim=8)).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    ids, mask = torch.randint(2, 16, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    if padding == "left":
        mask[1, :3] = 0
    before = weight_bytes(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, attention_mask=mask).logits
        sampled = generate(model, ids.tolist(), max_new_tokens=5, temperature=0, eos_token_id=[-1], pad_token_id=0)
        keep_products_in_bf16(model)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=0)
        again = generate(model, ids.tolist(), max_new_tokens=5, temperature=0, eos_token_id=[-1], pad_token_id=0)
    assert torch.equal(sampled.logprobs, again.logprobs)
    kept = [p for n, p in model.named_parameters() if p.dtype == torch.bfloat16]
    assert weight_bytes(model) == before - 2 * sum(p.numel() for p in kept)
    blocks = [n for n, p in model.named_parameters() if n.endswith("proj.weight") and p.dtype == torch.float32]
    assert blocks == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]


def test_a_reference_kept_in_bf16_trains_the_same_policy(tmp_path):
    """A copy that PPO makes is kept in bf16, one that is given is not: every figure and weight is the same."""
    made = {}
    for name, reference in (("copy", None), ("given", policy())):
        made[name] = trainer(tmp_path / name, mixed_precision="bf16", reference=reference, total_episodes=16)
        made[name].train()
    assert any(row["objective/kl"] for row in made["copy"].rows)
    copy, given = (
        [{name: value for name, value in row.items() if "/" in name and "time/" not in name} for row in each.rows]
        for each in made.values()
    )
    assert copy == given and len(copy) == 2
    assert same(weights(made["copy"].models.policy), weights(made["given"].models.policy))
    halved = {name: torch.bfloat16 in kinds_of(each.models.reference) for name, each in made.items()}
    assert halved == {"copy": True, "given": False}
    assert kinds_of(made["copy"].models.policy) == {torch.float32}


@pytest.mark.parametrize("changes", [{"mixed_precision": "no"}, {"mixed_precision": "bf16", "ref_sync_updates": 1}])
def test_a_reference_that_is_read_in_fp32_or_renewed_stays_in_fp32(tmp_path, changes):
    assert kinds_of(trainer(tmp_path, **changes).models.reference) == {torch.float32}


def kinds_of(model):
    return {p.dtype for p in model.parameters()}
