"""SFT: what the loss is on, token by token, as the trainer's own batches have it."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Qwen3Config

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForCausalLM
from pipeline.runtime.arguments import SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.record import Stage
from pipeline.text.tokenizer import train_tokenizer
from stages.sft import build_trainer, check_kept

USER, ANSWER = {"role": "user", "content": "Write about Ben."}, {"role": "assistant", "content": "Ben ran home."}
OTHER = {"role": "assistant", "content": "Ben found a kite near the river."}


@pytest.mark.parametrize("form", ["prompt and completion", "messages", "text"])
def test_the_loss_is_on_the_answer_and_its_end(tmp_path: Path, form: str) -> None:
    tokenizer = train_tokenizer(["Write about Ben. Ben ran home. Ben found a kite near the river."] * 9, 300)
    rows = {
        "prompt and completion": [{"prompt": [USER], "completion": [a]} for a in (ANSWER, OTHER)],
        "messages": [{"messages": [USER, a]} for a in (ANSWER, OTHER)],
        "text": [{"prompt": "Write:", "completion": " " + a["content"]} for a in (ANSWER, OTHER)],
    }[form]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
    )
    args = resolve(SFTArguments(run_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1))
    data = Dataset.from_list(rows)
    trainer = build_trainer(args, Stage(args, "sft", {}), GPTForCausalLM(config).train(), tokenizer, data, data)
    (batch,) = trainer.get_train_dataloader()
    learned = {tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert {s.strip() for s in learned} == {"Ben ran home.<|end|>", "Ben found a kite near the river.<|end|>"}
    shown = {tokenizer.decode(row[row != 0]) for row in batch["input_ids"]}
    start = "Write:" if form == "text" else "<|user|>Write about Ben.<|end|><|assistant|>"
    assert shown == {start + text for text in learned}


def test_rows_that_trl_leaves_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """TRL cuts at max_length and drops, without a word, what has nothing left to learn from."""
    tokenizer = train_tokenizer(["Write about Ben. Ben ran home."] * 9, 300)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
    )
    long, short = {"prompt": "Write " * 50, "completion": " x"}, {"prompt": "Write:", "completion": " Ben ran"}
    args = resolve(SFTArguments(run_dir=str(tmp_path), max_length=20))
    stage = Stage(args, "sft", {})

    def kept(rows: list[dict], held_out: list[dict]) -> int:
        parts = [Dataset.from_list(part) for part in (rows, held_out)]
        trainer = build_trainer(args, stage, GPTForCausalLM(config).train(), tokenizer, *parts)
        return check_kept(args, stage, trainer, {"training": len(rows), "held-out": len(held_out)})

    assert kept([short, long, short], [short]) == 2
    assert "1 of 3 training rows are left out: their answers begin beyond max_length 20" in capsys.readouterr().out
    with pytest.raises(UserError, match="of none of the 2 training rows the answer begins within max_length 20"):
        kept([long, long], [short])
    with pytest.raises(UserError, match="of none of the 1 held-out rows"):
        kept([short], [long])
