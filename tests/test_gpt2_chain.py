"""A stock GPT-2, whose tokenizer has one special token for everything and no padding, through SFT, reward and PPO."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

WORDS = ["the cat sat on the mat", "the dog ran to the barn", "a fox hid in the den", "the bird sang a song"]


def stock_gpt2(folder: Path) -> str:
    """A folder as GPT-2's on the hub: byte-level BPE, `<|endoftext|>` as bos, eos and unk, no pad token."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=299, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end, unk_token=end)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id == len(tokenizer) - 1
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_pad_token_is_new_and_its_logit_ordinary(tmp_path: Path) -> None:
    path = stock_gpt2(tmp_path)
    tokenizer, model = load_tokenizer(path), load_policy(path)
    size, ids = len(tokenizer) - 1, torch.arange(20)[None]
    before = model(ids).logits
    fit_embeddings(model, tokenizer, path)
    after = model(ids).logits
    assert tokenizer.pad_token_id == size != tokenizer.eos_token_id
    assert after.shape[-1] == size + 1 and torch.equal(after[..., :size], before)
    assert (before.min() < after[..., size]).all() and (after[..., size] < before.max()).all()
    tokenizer.add_tokens(["one more"])
    with pytest.raises(UserError, match="entries but"):
        fit_embeddings(model, tokenizer, path)


def test_sft_reward_and_ppo_on_it(tmp_path: Path) -> None:
    base, run = stock_gpt2(tmp_path / "gpt2"), tmp_path / "run"
    files = {
        "sft": [{"prompt": f"Say {i}:", "completion": f" {WORDS[i % 4]}"} for i in range(40)],
        "pairs": [
            {"prompt": f"Say {i}:", "chosen": f" {WORDS[i % 2]}", "rejected": f" {WORDS[2 + i % 2]}"} for i in range(60)
        ],
        "text": [{"text": f"{WORDS[i % 4]} {i}"} for i in range(40)],
        "prompts": [{"prompt": f"Say {i}:"} for i in range(40)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stage(name: str, *options: str) -> None:
        command = [sys.executable, "-m", f"stages.{name}", "--run_dir", str(run), "--mixed_precision", "no", *options]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-1500:]

    small = ("--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "64")
    stage("sft", "--model_name_or_path", base, "--dataset", str(tmp_path / "sft.jsonl"), *small)
    stage("reward", "--dataset", str(tmp_path / "pairs.jsonl"), *small)
    stage(
        "ppo",
        "--dataset",
        str(tmp_path / "prompts.jsonl"),
        "--total_episodes",
        "24",
        "--batch_size",
        "8",
        "--num_mini_batches",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--response_length",
        "8",
        "--critic_warmup_updates",
        "1",
        "--eval_size",
        "4",
        "--ptx_coef",
        "0.5",
        "--ptx_max_length",
        "16",
        "--ptx_dataset",
        str(tmp_path / "text.jsonl"),
    )
    last = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/ratio_first"] == 1.0 and last["objective/kl_k3"] >= 0
    assert 0 < last["loss/ptx_avg"] < 8
    assert load_tokenizer(str(run / "ppo")).pad_token == "<|pad|>"
