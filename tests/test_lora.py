"""LoRA and recomputed blocks: resume, refusals, folders; the models are those of test_load.py."""

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import end_alike, policy, trainer
from safetensors.torch import load_file
from test_load import SHAPES, build, train
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.load import load_critic, load_policy, load_reward
from pipeline.model.lora import add_lora, trained_weights, without_wrapper


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", SHAPES)
def test_recomputed_blocks_change_no_weight(tmp_path, name, lora):
    """Blocks run once more in each backward pass, dropout stays off, and the result is the same to the bit."""
    made, calls = [], []
    for on in (False, True):
        models, with_grad = build(name, lora), []
        block = next(m for m in without_wrapper(models[0]).modules() if isinstance(m, GradientCheckpointingLayer))
        norm = block.ln_1 if name == "gpt2" else block.input_layernorm
        norm.register_forward_hook(lambda *call, with_grad=with_grad: with_grad.append(torch.is_grad_enabled()))
        run = trainer(tmp_path / str(on), models=models, total_episodes=8, gradient_checkpointing=on)
        run.train()
        made.append(run)
        calls.append(sum(with_grad))
    assert calls == [9, 18]  # 2 epochs × 2 mini-batches × 2 micro-batches, and one of the longest rows before
    assert made[1].rows[0]["val/ratio_first"] == 1.0
    assert end_alike(*made)


@pytest.mark.slow
def test_an_interrupted_run_with_lora_ends_with_the_same_weights(tmp_path):
    whole = train(tmp_path / "a", "llama", lora=True, total_episodes=32)
    cut = trainer(tmp_path / "b", models=build("llama", lora=True), save_steps=2)

    def stop(made, metrics):
        if made.state.updates_done == 3:
            raise KeyboardInterrupt

    cut.callbacks.append(stop)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    kept = load_file(tmp_path / "b" / "checkpoints" / "step-00000002" / "policy.safetensors")
    assert kept and all("lora_" in key for key in kept)  # no more than what is trained
    again = train(tmp_path / "b", "llama", lora=True, total_episodes=32, save_steps=2)
    assert [row["step"] for row in again.rows] == [3, 4]
    assert end_alike(whole, again)


def test_a_checkpoint_of_another_lora_is_refused(tmp_path):
    train(tmp_path, "ours", lora=True, save_steps=1, total_episodes=8)
    with pytest.raises(UserError, match=r"other settings: lora: \[4, 8, .*\] → none"):
        train(tmp_path, "ours", save_steps=1, total_episodes=8)


def test_lora_changes_nothing_until_it_is_trained():
    ids = torch.tensor([[3, 6, 7, 9, 10]])
    with torch.no_grad():
        plain = policy().eval()(ids).logits
        wrapped = add_lora(policy())
        torch.testing.assert_close(wrapped(input_ids=ids).logits, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["no_such_matrix"]}, "lora_target_modules: the model has no module no_such_matrix"),
        ({"r": 0}, "LoRA: .*positive"),
    ],
)
def test_impossible_lora_is_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        add_lora(policy(), **options)


def test_lora_takes_the_matrices_it_is_told():
    keys = trained_weights(add_lora(policy(), target_modules=["q_proj", "v_proj"]))
    assert sorted({key.split(".")[-4] for key in keys}) == ["q_proj", "v_proj"] and len(keys) == 4


def test_a_reference_that_follows_the_policy_is_no_switched_off_adapter(tmp_path):
    with pytest.raises(UserError, match="ref_sync_updates: a policy with LoRA cannot hand its weights"):
        trainer(tmp_path, models=build("ours", lora=True), ref_sync_updates=1)


def test_weights_in_bf16_are_refused_where_they_are_trained(tmp_path):
    actor, judge = build("llama")
    with pytest.raises(UserError, match="LlamaForCausalLM: its trained weights are not in fp32"):
        trainer(tmp_path, models=(actor.bfloat16(), judge))


def test_a_frozen_base_in_bf16_takes_lora(tmp_path):
    actor, judge = build("llama")
    made = trainer(tmp_path, models=(add_lora(actor.bfloat16(), r=4), judge), total_episodes=16)
    made.train()
    assert made.rows[0]["val/ratio_first"] == 1.0 and made.rows[0]["objective/kl"] == 0.0
    assert made.rows[1]["objective/kl_k3"] > 0


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_opens_as_policy_critic_and_reward(tmp_path):
    policy().save_pretrained(tmp_path / "lm")
    assert isinstance(load_policy(str(tmp_path / "lm")), GPTForCausalLM)
    torch.manual_seed(5)
    made = load_critic(str(tmp_path / "lm"))
    assert torch.equal(made.model.layers[0].mlp.up_proj.weight, policy().model.layers[0].mlp.up_proj.weight)
    with pytest.raises(UserError, match=r"no trained reward model: it has no weights for score\.weight"):
        load_reward(str(tmp_path / "lm"))
    with pytest.raises(UserError, match="no model folder"):
        load_policy(str(tmp_path))
