"""A small GPT and prompts for it, for the tests of sampler and decoder."""

import torch
from gpt_tools import small_config
from transformers import Qwen3Config

from pipeline.model.gpt import GPTForCausalLM

PAD, END = 0, 1
VOCABULARY = 40


def config(**changes) -> Qwen3Config:
    return small_config(
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": PAD}
        | changes
    )


def gpt(**changes) -> GPTForCausalLM:
    torch.manual_seed(0)
    model = GPTForCausalLM(config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def prompts(count: int = 12, seed: int = 1) -> list[list[int]]:
    """Prompts of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def responses(samples) -> list[list[int]]:
    rows = zip(samples.sequences.tolist(), samples.prompt_lengths, samples.response_lengths, strict=True)
    return [row[p : p + r] for row, p, r in rows]
