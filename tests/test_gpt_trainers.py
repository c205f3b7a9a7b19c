"""Our GPT trains under the stock trainers of TRL and transformers."""

import pytest
import torch
from gpt_tools import assert_close, batch, small_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification


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
        tmp_path,
        packing=packing,
        max_length=16,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        **CPU,
    )
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
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **CPU | {"max_steps": 1}
        )
        trainer = Trainer(GPTForCausalLM(small_config()), arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        return trainer.state.log_history[0]["loss"]

    assert first_loss(1) == pytest.approx(first_loss(4), rel=1e-4)
