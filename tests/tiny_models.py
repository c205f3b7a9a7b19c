"""Model folders as the stages leave them, with random weights of a size that makes a test take no time."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config

from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification
from pipeline.text.tokenizer import train_tokenizer

TEXTS = ["Ben found a kite near the river. He was happy.", "Ann lost the fox. She was sad."] * 20
END_OF_TEXT, END_OF_TURN = 1, 5


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def tiny_config(**changes: object) -> Qwen3Config:
    settings = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,
        "num_labels": 1,
    }
    return Qwen3Config(**settings | changes)


def tiny_policy(seed: int, stops: int | list[int] = END_OF_TEXT, **changes: object) -> GPTForCausalLM:
    torch.manual_seed(seed)
    model = GPTForCausalLM(tiny_config(**changes)).eval()
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = 0
    return model


def write_models(run: Path) -> Path:
    """pretrain, sft, ppo (the same weights as sft) and reward under `run`."""
    for name, seed in (("pretrain", 0), ("sft", 1), ("ppo", 1), ("reward", 2)):
        tokenizer = tiny_tokenizer()
        if name == "pretrain":
            model = tiny_policy(seed)
        elif name == "reward":
            torch.manual_seed(seed)
            model = GPTForSequenceClassification(tiny_config())
        else:
            model, tokenizer.eos_token = tiny_policy(seed, [END_OF_TURN, END_OF_TEXT]), "<|end|>"
        model.save_pretrained(run / name)
        tokenizer.save_pretrained(run / name)
    return run
