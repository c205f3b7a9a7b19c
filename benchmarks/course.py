"""The models of a "build GPT from scratch" course, each trained alike: `python -m benchmarks.course`.

Every step adds one thing to the model before it, all out of pipeline/model/gpt.py, on the default preset's stories,
with the same batches, optimizer and number of steps. The figure is the held-out loss in bits per byte, so that it can
be set beside the pretraining stage's. Attention without its mask is the step that fails: it reads the very token that
it is asked for, and its figure says nothing about text.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3Config

from pipeline.model.bigram import BigramLanguageModel, bits_per_byte
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.hardware import use_bf16
from pipeline.model.optim import MuonWithAdamW, parameter_groups
from pipeline.text.data import load_texts
from pipeline.text.packing import Packed, pack
from pipeline.text.tokenizer import train_tokenizer

TOKENS, ROWS, VOCABULARY, WIDTH, HEAD = 128, 16, 2048, 128, 32


def gpt(layers: int, heads: int = 4, mlp: bool = True) -> GPTForCausalLM:
    """A GPT of the default preset's width; without `mlp` its MLPs add nothing and learn nothing."""
    model = GPTForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=352,
            num_hidden_layers=layers,
            head_dim=HEAD,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2 * TOKENS,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=0,
        )
    )
    for block in () if mlp else model.model.layers:
        block.mlp.requires_grad_(False)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return model


# name: (how to build it, whether attention is masked)
MODELS: dict[str, tuple[Callable[[], GPTForCausalLM], bool]] = {
    "embedding and head": (lambda: gpt(0), True),
    "self-attention, one head, no mask": (lambda: gpt(1, heads=1, mlp=False), False),
    "masked self-attention, one head": (lambda: gpt(1, heads=1, mlp=False), True),
    "masked multi-head self-attention": (lambda: gpt(1, mlp=False), True),
    "block: attention and MLP": (lambda: gpt(1), True),
    "GPT: four blocks": (lambda: gpt(4), True),
}


def loss_of(model: GPTForCausalLM, ids: Tensor, masked: bool) -> Tensor:
    """Mean nats a token of ids (B, T)."""
    everything = None if masked else torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
        return model(input_ids=ids, labels=ids, attention_mask=everything).loss


def train(model: GPTForCausalLM, rows: Tensor, held_out: Tensor, masked: bool, steps: int, seed: int) -> float:
    """Train `steps` steps on rows (N, T) with the preset's optimizer; returns the held-out nats a token."""
    groups = parameter_groups(model, 0.02, 3e-3, weight_decay=0.01, adam_beta2=0.95)
    groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    optimizer = MuonWithAdamW([group for group in groups if group["params"]])
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss_of(model, rows[torch.randint(len(rows), (ROWS,), generator=order)], masked).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        parts = [loss_of(model.eval(), part, masked).item() * len(part) for part in held_out.split(64)]
    return sum(parts) / len(held_out)


def whole_rows(packed: Packed) -> Tensor:
    """The text as rows of TOKENS tokens, (N, TOKENS), without what is left over at the end."""
    count = len(packed.ids) // TOKENS
    return torch.from_numpy(packed.ids[: count * TOKENS]).long().view(count, TOKENS)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of 2,048 tokens each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="8 steps on little text, for tests")
    options = parser.parse_args(arguments)
    steps, seeds, size = (8, [0], 60_000) if options.quick else (options.steps, options.seeds, 6_000_000)
    texts = load_texts("stories", split="train", max_bytes=size)
    tokenizer = train_tokenizer(texts[: max(1, len(texts) // 4)], VOCABULARY)
    held_out_texts = load_texts("stories", split="validation", max_bytes=size // 30)
    held_out = pack(held_out_texts, tokenizer, TOKENS)
    rows, unseen = whole_rows(pack(texts, tokenizer, TOKENS)), whole_rows(held_out)

    def to_bpb(nats: float) -> float:
        return bits_per_byte(nats, held_out.tokens, held_out.bytes)

    bigram = BigramLanguageModel(VOCABULARY)
    bigram.fit(rows)
    results = {"uniform": [to_bpb(math.log(VOCABULARY))], "bigram, counted": [to_bpb(bigram.loss(unseen))]}
    for name, (build, masked) in MODELS.items():
        results[name] = []
        for seed in seeds:
            torch.manual_seed(seed)
            results[name].append(to_bpb(train(build(), rows, unseen, masked, steps, seed)))
    print(f"\nheld-out bits per byte after {steps} steps of {ROWS * TOKENS:,} tokens, seeds {seeds}")
    for name, figures in results.items():
        print(f"  {name:36s} {statistics.fmean(figures):.3f}   ({', '.join(f'{figure:.3f}' for figure in figures)})")
    best, simplest = (statistics.fmean(results[name]) for name in ("GPT: four blocks", "bigram, counted"))
    line = {"benchmark": "course", "ratio": round(simplest / best, 3), "steps": steps, "bits_per_byte": results}
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
