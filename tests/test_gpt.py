"""Our GPT as Qwen3: a published shape, classifiers, folders, the loss. All of the family: tests/test_family.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from gpt_tools import PAD, VOCABULARY, assert_close, assert_same_gradients, batch, pair, small_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from pipeline.model import logprobs
from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification


@pytest.mark.slow
def test_a_published_shape_equals_stock():
    """Qwen3-0.6B's config.json, random weights; two of its 28 layers and of its 151,936 tokens the first 4,096."""
    published = Qwen3Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.02,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    ours, stock = GPTForCausalLM(published).train(), Qwen3ForCausalLM(published).train()
    stock.load_state_dict(ours.state_dict())
    for kind in ("left", "right", "packed"):
        inputs = batch(kind)
        ours.zero_grad(), stock.zero_grad()
        ours_out, stock_out = ours(**inputs), stock(**inputs, use_cache=False)
        ours_out.loss.backward()
        stock_out.loss.backward()
        assert_close(ours_out.loss, stock_out.loss, f"{kind}: loss")
        assert_same_gradients(ours, stock)


@pytest.mark.parametrize("kind", ["full", "right", "left"])
@pytest.mark.parametrize("labels", [1, 3])
def test_sequence_classification_equals_stock(kind, labels):
    ours, stock = pair(GPTForSequenceClassification, Qwen3ForSequenceClassification, num_labels=labels)
    inputs = batch(kind) | {"labels": torch.tensor([0, 1, 2]) if labels == 3 else torch.tensor([0.3, -1.0, 2.0])}
    ours_out, stock_out = ours(**inputs), stock(**inputs)
    assert ours_out.logits.shape == (3, labels)
    assert_close(ours_out.logits, stock_out.logits, "scores")
    assert_close(ours_out.loss, stock_out.loss, "loss")
    ours_out.loss.backward()
    stock_out.loss.backward()
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("ours_class", "stock_class", "auto_class"),
    [
        (GPTForCausalLM, Qwen3ForCausalLM, AutoModelForCausalLM),
        (GPTForSequenceClassification, Qwen3ForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_folders_open_both_ways(tmp_path, ours_class, stock_class, auto_class, tied):
    ours, _ = pair(ours_class, stock_class, tie_word_embeddings=tied)
    ids = batch("full")["input_ids"]
    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [stock_class.__name__]
    assert written["model_type"] == "qwen3"
    stock = auto_class.from_pretrained(tmp_path / "ours")
    assert type(stock) is stock_class
    stock.save_pretrained(tmp_path / "stock")
    again = ours_class.from_pretrained(tmp_path / "stock").eval()
    with torch.no_grad():
        expected = ours.eval()(ids).logits
        assert_close(stock(ids).logits, expected, "ours to stock")
        assert torch.equal(again(ids).logits, expected)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    # Tied weights are one tensor, not two equal ones
    if ours_class is GPTForCausalLM:
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_a_later_token_changes_no_earlier_logit():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    ids = batch("full")["input_ids"]
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = ours(ids).logits, ours(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_loss_is_cross_entropy_by_hand():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("right")
    out = ours.eval()(**inputs)
    by_hand, count = 0.0, 0
    logprobs = out.logits.log_softmax(-1)
    for row in range(3):
        for t in range(19):
            label = inputs["labels"][row, t + 1]
            if label != -100:
                by_hand -= logprobs[row, t, label].item()
                count += 1
    assert out.loss.item() == pytest.approx(by_hand / count, rel=1e-5)
    # Trainer's count over an accumulated batch takes the place of our own
    assert ours(**inputs, num_items_in_batch=50).loss.item() == pytest.approx(by_hand / 50, rel=1e-5)


def test_loss_ignores_what_a_left_pad_would_predict():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("left")
    all_labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # first real tokens included
    assert torch.equal(ours(**inputs | {"labels": all_labels}).loss, ours(**inputs).loss)


def test_loss_in_chunks_is_the_loss(monkeypatch):
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("right")

    def loss_and_gradients():
        ours.zero_grad()
        loss = ours(**inputs).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in ours.parameters()]

    whole = loss_and_gradients()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    chunked = loss_and_gradients()
    assert_close(chunked[0], whole[0])
    for a, b in zip(chunked[1], whole[1], strict=True):
        assert_close(a, b)


def test_no_label_gives_a_loss_of_zero_that_can_be_differentiated():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    ids = batch("full")["input_ids"]
    loss = ours(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_gradient_checkpointing_changes_nothing():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("left")
    ours.train()(**inputs).loss.backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours(**inputs).loss.backward()
    assert ours.model.layers[0].gradient_checkpointing
    for parameter, gradient in zip(ours.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)


def test_training_keeps_no_logits_and_evaluation_returns_them():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("full")
    assert ours.train()(**inputs).logits is None
    assert ours(inputs["input_ids"]).logits.shape == (3, 20, VOCABULARY)
    assert ours.eval()(**inputs).logits.shape == (3, 20, VOCABULARY)
    assert ours(inputs["input_ids"], logits_to_keep=2).logits.shape == (3, 2, VOCABULARY)


def test_generate_of_transformers_works_with_its_cache():
    ours, stock = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = {key: value for key, value in batch("left").items() if key != "labels"}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**inputs, **settings))


def test_bf16_autocast_stays_near_fp32():
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM)
    inputs = batch("right")
    expected = ours.train()(**inputs).loss
    expected.backward()
    gradient = ours.model.layers[0].self_attn.q_proj.weight.grad.clone()
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    half = ours.model.layers[0].self_attn.q_proj.weight.grad
    assert F.cosine_similarity(half.flatten(), gradient.flatten(), dim=0) > 0.99


def test_initialisation():
    config = small_config(
        hidden_size=256, intermediate_size=512, vocab_size=512, initializer_range=0.02, num_hidden_layers=2
    )
    model = GPTForCausalLM(config)
    block = model.model.layers[1]
    residual = 0.02 / (2 * 2) ** 0.5
    for weight, std in [
        (model.model.embed_tokens.weight, 0.02),
        (block.self_attn.q_proj.weight, 0.02),
        (block.mlp.gate_proj.weight, 0.02),
        (block.self_attn.o_proj.weight, residual),
        (block.mlp.down_proj.weight, residual),
        (GPTForSequenceClassification(config).score.weight, 257**-0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    assert torch.equal(block.self_attn.q_norm.weight, torch.ones(16))


def test_what_it_cannot_compute_is_refused():
    with pytest.raises(ValueError, match=r"sliding windows.*Auto classes"):
        GPTForCausalLM(small_config(use_sliding_window=True))
    with pytest.raises(ValueError, match=r"rotary positions.*Auto classes"):
        GPTForCausalLM(small_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))


def test_benchmark_runs_and_ends_in_a_json_line(capsys):
    from benchmarks import train

    result = train.main(["--quick", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["ratio"] > 0 and result["benchmark"] == "train"


def test_attention_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (2, 8))
    model = GPTForCausalLM(small_config(attention_dropout=0.5))
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
