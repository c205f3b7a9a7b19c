"""Our GPT is stock Qwen3: same logits, same gradients, same folders; and it trains under the stock trainers."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from pipeline import gpt, kernels
from pipeline.gpt import GPTForCausalLM, GPTForSequenceClassification

PAD, VOCABULARY = 0, 96
TOLERANCE = 1e-4  # largest difference over the largest value


def small_config(**changes) -> Qwen3Config:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # large enough that attention is far from uniform
        "num_labels": 1,
    }
    return Qwen3Config(**settings | changes)


def pair(ours_class: type, stock_class: type, **changes):
    """The two classes with the same random weights, norms included."""
    torch.manual_seed(0)
    ours = ours_class(small_config(**changes))
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    stock = stock_class(small_config(**changes))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def assert_close(ours: torch.Tensor, stock: torch.Tensor, what: str = "") -> None:
    difference = (ours - stock).abs().max() / stock.abs().max().clamp(min=1e-12)
    assert difference < TOLERANCE, f"{what}: {difference:.2e}"


def assert_same_gradients(ours, stock) -> None:
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], name)


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Token ids (B, T) and what a collator adds, with labels where there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (3, 20), generator=generator)
    if kind == "packed":
        lengths = [[7, 5, 8], [20], [1, 19]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 6, 13)):
        if kind == "right":
            mask[row, 20 - pads :] = 0
        elif kind == "left":
            mask[row, :pads] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    first = torch.cat((torch.ones(3, 1, dtype=torch.bool), mask[:, :-1] == 0), 1)  # nothing real to predict it from
    labels = ids.masked_fill((mask == 0) | first, -100)
    return {"input_ids": ids, "attention_mask": None if kind == "full" else mask, "labels": labels}


@pytest.mark.parametrize("kind", ["full", "right", "left", "packed"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": False}, {"attention_bias": True}]
)
def test_logits_loss_and_gradients_equal_stock(kind, changes):
    ours, stock = pair(GPTForCausalLM, Qwen3ForCausalLM, **changes)
    inputs = batch(kind)
    ours_out, stock_out = ours.eval()(**inputs), stock.eval()(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else slice(None)
    assert_close(ours_out.logits[real], stock_out.logits[real], "logits")
    assert_close(ours_out.loss, stock_out.loss, "loss")
    ours.train()(**inputs).loss.backward()
    stock_out.loss.backward()
    assert_same_gradients(ours, stock)


def test_a_published_shape_equals_stock():
    """Qwen3-0.6B's config.json, random weights; two of its 28 layers and of its 151,936 tokens the first 4,096."""
    published = Qwen3Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.02, pad_token_id=PAD,
    )  # fmt: skip
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
    monkeypatch.setattr(gpt, "LOGITS_PER_CHUNK", 7 * VOCABULARY)
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


def test_hand_written_norm_equals_autograd():
    torch.manual_seed(0)
    for shape in ((3, 5, 48), (2, 7, 4, 16)):
        x, weight, grad = torch.randn(shape), torch.rand(shape[-1]), torch.randn(shape)
        weight[0] = 0  # nothing may divide by a weight
        x, weight = x.requires_grad_(), weight.requires_grad_()
        expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        ours = kernels.rms_norm(x, weight, 1e-6)
        assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, expected)), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_hand_written_attention_equals_the_formula(tokens):
    """In fp64, so that what remains is an error of the formula."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(4, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    ours, probabilities = kernels.attention_forward(q.detach(), k.detach(), v.detach())
    torch.testing.assert_close(ours, expected)
    gradients = kernels.attention_backward(grad.detach(), q.detach(), k.detach(), v.detach(), probabilities)
    for a, b in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("padding", ["full", "right"])
def test_hand_written_block_equals_the_plain_one(monkeypatch, groups, padding):
    """Every weight's gradient and the loss, hand-written halves against autograd on the formulas."""
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM, num_key_value_heads=groups)
    inputs = batch(padding)
    calls, run = [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda *given: calls.append(1) or run(*given))
    by_hand = ours(**inputs).loss
    by_hand.backward()
    assert len(calls) == 3  # one a layer: the fast way was taken
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    monkeypatch.setattr(kernels, "can_run", lambda *_: False)
    plain = ours(**inputs).loss
    plain.backward()
    assert_close(by_hand, plain)
    for name, parameter in ours.named_parameters():
        assert_close(gradients[name], parameter.grad, name)


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("padding", ["right", "left"])  # the hand-written blocks, and the plain ones
def test_states_at_some_places_are_those_of_all(padding, layers):
    model, _ = pair(GPTForCausalLM, Qwen3ForCausalLM, num_hidden_layers=layers)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    mask = torch.arange(20) < torch.tensor([20, 13, 17])[:, None]
    mask = mask if padding == "right" else mask.flip(1)
    keep = mask & (torch.rand(3, 20) < 0.4)
    found = []
    for asked in (None, keep):
        model.zero_grad()
        states = model.model(ids, mask.long(), keep=asked).last_hidden_state
        states = states[keep] if asked is None else states
        states.square().sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in model.model.parameters())])
    assert found[1][0].shape == (int(keep.sum()), 48)
    for every, some in zip(*found, strict=True):
        assert_close(some, every)


def test_the_hand_written_block_steps_aside_for_what_it_does_not_know():
    x = torch.randn(2, 5, 48)

    def block(**changes):
        return GPTForCausalLM(small_config(**changes)).train().model.layers[0]

    assert kernels.can_run(block(), x)
    assert not kernels.can_run(block(), x.bfloat16())
    assert not kernels.can_run(block(), torch.randn(1, kernels.LONGEST + 1, 48))
    assert not kernels.can_run(block(attention_bias=True), x)
    assert not kernels.can_run(block(attention_dropout=0.1), x)
    assert kernels.can_run(block(attention_dropout=0.1).eval(), x)
    adapted, hooked, unnormed = block(), block(), block()
    adapted.mlp.up_proj = torch.nn.Sequential(adapted.mlp.up_proj)  # as LoRA wraps a projection
    hooked.self_attn.q_proj.register_forward_hook(lambda *_: None)
    unnormed.self_attn.q_norm = torch.nn.Identity()
    assert not any(kernels.can_run(changed, x) for changed in (adapted, hooked, unnormed))


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
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        GPTForCausalLM(small_config(use_sliding_window=True))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        GPTForCausalLM(small_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))


# ----------------------------------------------------------------------------------------------------------------------
# Under the stock trainers


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


CPU = {"use_cpu": True, "bf16": False, "max_steps": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns_and_saves_a_stock_folder(tmp_path, tokenizer, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d e a b"}, {"prompt": "b", "completion": " a"}] * 4)
    config = SFTConfig(
        tmp_path, packing=packing, max_length=16, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_checkpointing=False, **CPU,
    )  # fmt: skip
    trainer = SFTTrainer(GPTForCausalLM(small_config()), config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert "mean_token_accuracy" in trainer.state.log_history[0]
    trainer.save_model(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = batch("full")["input_ids"]
    with torch.no_grad():
        assert_close(trainer.model.eval()(ids).logits, stock(ids).logits)


def test_reward_trainer_learns(tmp_path, tokenizer):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list([{"chosen": "a b c", "rejected": "a b d e"}, {"chosen": "b c", "rejected": "b e e"}] * 4)
    config = RewardConfig(
        tmp_path, max_length=16, per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=False, **CPU
    )
    model = GPTForSequenceClassification(small_config())
    trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    trainer.save_model(tmp_path / "model")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    ids = batch("full")["input_ids"]
    assert_close(trainer.model.eval()(ids).logits, stock(ids).logits)


def test_trainer_of_transformers_accumulates_to_the_same_loss(tmp_path):
    from transformers import Trainer, TrainingArguments

    inputs = batch("right")
    rows = [{key: value[i] for key, value in inputs.items()} for i in (0, 1, 2, 0)]

    def first_loss(size: int) -> float:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            **CPU | {"max_steps": 1},
        )  # fmt: skip
        trainer = Trainer(GPTForCausalLM(small_config()), arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        return trainer.state.log_history[0]["loss"]

    assert first_loss(1) == pytest.approx(first_loss(4), rel=1e-4)


def test_benchmark_runs_and_ends_in_a_json_line(capsys):
    from benchmarks import train

    result = train.main(["--quick", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["ratio"] > 0 and result["benchmark"] == "train"
