"""The models of a "build GPT from scratch" course, each trained alike: `python -m benchmarks.course`.

Every step adds one thing to the model before it, out of pipeline/model/gpt.py, on the default preset's stories, with
the same batches, optimizer and number of steps; docs/course.md explains each. The figure is the held-out loss in bits
per byte, so that it can be set beside the pretraining stage's. Attention without its mask is the step that fails: it
reads the very token that it is asked for, and its figure says nothing about text.

Two peers follow. GPT-2 of transformers learns the same documents. The encoder-decoder learns the preset's instructions
with the stories that answer them, beside a GPT that reads both as one text: the same tokens for both, cut at the mark
where the story begins, and the loss is that of the story alone.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config

from pipeline.model.bigram import BigramLanguageModel, bits_per_byte
from pipeline.model.encoder_decoder import EncoderDecoder
from pipeline.model.gpt import IGNORED, GPTForCausalLM
from pipeline.model.hardware import use_bf16
from pipeline.model.optim import MuonWithAdamW, parameter_groups
from pipeline.text.data import load_instructions, load_texts
from pipeline.text.packing import Packed, pack
from pipeline.text.tokenizer import END_OF_TURN, prompt_ids, train_tokenizer

TOKENS, ROWS, VOCABULARY, WIDTH, HEAD = 128, 16, 2048, 128, 32
PAD = 0


# ---- the models ------------------------------------------------------------------------------------------------------


def shape(layers: int, heads: int = 4, intermediate_size: int = 352) -> Qwen3Config:
    """The default preset's width."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        head_dim=HEAD,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD,
    )


def gpt(layers: int, heads: int = 4, mlp: bool = True) -> GPTForCausalLM:
    """Our GPT; without `mlp` its MLPs add nothing and learn nothing."""
    model = GPTForCausalLM(shape(layers, heads))
    for block in () if mlp else model.model.layers:
        block.mlp.requires_grad_(False)
        nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of the GPT's width, depth and vocabulary: LayerNorm, learned positions, GELU, biases, a tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=4,
        n_head=WIDTH // HEAD,
        n_positions=2 * TOKENS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers finds none for this class, and warns
    return model


def encoder_decoder() -> EncoderDecoder:
    """Two blocks of encoder and two of decoder; a narrower MLP pays for the cross-attention."""
    return EncoderDecoder(shape(layers=2, intermediate_size=272))


# ---- the data --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One instruction and its story, as token ids."""

    instruction: Tensor
    story: Tensor
    """It begins with the mark of the assistant's turn, and ends with the end of the turn."""


class Data(NamedTuple):
    """What a model trains on and is judged by: rows of packed documents, (N, TOKENS) ids, or pairs."""

    train: Tensor | Sequence[Pair]
    held_out: Tensor | Sequence[Pair]
    tokens: int
    """Tokens that are predicted in the held-out text."""
    bytes: int
    """UTF-8 bytes of the same."""
    batch_size: int
    """Examples a step: about ROWS * TOKENS tokens."""

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A loss on the held-out text, in bits per byte of it."""
        return bits_per_byte(nats_per_token, self.tokens, self.bytes)


def documents(tokenizer: PreTrainedTokenizerFast, texts: list[str], held_out_texts: list[str]) -> Data:
    """Documents packed into rows, without what is left over at the end."""

    def rows(packed: Packed) -> Tensor:
        count = len(packed.ids) // TOKENS
        return torch.from_numpy(packed.ids[: count * TOKENS]).long().view(count, TOKENS)

    held_out = pack(held_out_texts, tokenizer, TOKENS)
    return Data(rows(pack(texts, tokenizer, TOKENS)), rows(held_out), held_out.tokens, held_out.bytes, ROWS)


def instructions(tokenizer: PreTrainedTokenizerFast, size: int, held_out_size: int) -> Data:
    """The preset's instructions and stories, as SFT has them."""
    end = tokenizer.convert_tokens_to_ids([END_OF_TURN])

    def pairs(split: str, size: int) -> tuple[list[Pair], int]:
        rows = load_instructions("stories", split=split, size=size).rows
        stories = [completion[0]["content"] for completion in rows["completion"]]
        ids = zip(prompt_ids(tokenizer, list(rows["prompt"])), tokenizer(stories)["input_ids"], strict=True)
        # A prompt ends with the mark of the assistant's turn, which the decoder begins with
        found = [Pair(torch.tensor(prompt[:-1]), torch.tensor(prompt[-1:] + story + end)) for prompt, story in ids]
        return found, sum(len(story.encode()) for story in stories)

    train, _ = pairs("train", size)
    held_out, text_bytes = pairs("validation", held_out_size)
    length = statistics.fmean(len(pair.instruction) + len(pair.story) for pair in train)
    tokens = sum(len(pair.story) - 1 for pair in held_out)
    return Data(train, held_out, tokens, text_bytes, round(ROWS * TOKENS / length))


# From examples to the arguments of a model's forward; each predicts labels[:, t + 1] at t


def masked(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of documents, for a model that sees what came before."""
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "labels": ids}


def unmasked(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same, for a model that sees all of the row."""
    return masked(rows) | {"attention_mask": torch.zeros(1, 1, TOKENS, TOKENS)}


def one_text(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Instruction and story one after the other, for a decoder alone; the loss is on the story."""
    ids = [torch.cat(pair) for pair in pairs]
    labels = [torch.cat((torch.full_like(i, IGNORED), _labels(s))) for i, s in pairs]
    return {"input_ids": _padded(ids, PAD), "labels": _padded(labels, IGNORED)}


def two_texts(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The instruction for the encoder, the story for the decoder."""
    sources = _padded([pair.instruction for pair in pairs], PAD)
    return {
        "input_ids": sources,
        "attention_mask": sources != PAD,
        "decoder_input_ids": _padded([pair.story for pair in pairs], PAD),
        "labels": _padded([_labels(pair.story) for pair in pairs], IGNORED),
    }


def _labels(story: Tensor) -> Tensor:
    """The story without its first token, the mark, which is given and not predicted."""
    return torch.cat((story.new_full((1,), IGNORED), story[1:]))


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


# ---- the steps -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One model of the course, what it adds, and the form in which it reads its data."""

    new: str
    build: Callable[[], nn.Module]
    batch: Callable[[Sequence], dict[str, Tensor]] = masked


STEPS = {
    "embedding and head": Step("the last token by gradient descent", lambda: gpt(0)),
    "self-attention, one head, no mask": Step("it reads the answer", lambda: gpt(1, 1, mlp=False), unmasked),
    "masked self-attention, one head": Step("the causal mask", lambda: gpt(1, 1, mlp=False)),
    "masked multi-head self-attention": Step("four heads", lambda: gpt(1, mlp=False)),
    "block: attention and MLP": Step("the MLP", lambda: gpt(1)),
    "GPT: four blocks": Step("depth", lambda: gpt(4)),
    "GPT-2 of transformers": Step("peer: LayerNorm, positions, GELU", gpt2),
}
INSTRUCTION_STEPS = {
    "GPT, instruction and story": Step("the loss is on the story", lambda: gpt(4), one_text),
    "encoder-decoder": Step("cross-attention", encoder_decoder, two_texts),
}


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    """The preset's optimizer, for the parameters that learn; a table of positions (GPT-2's) is AdamW's."""
    hidden, tables, vectors = parameter_groups(model, 0.02, 3e-3, weight_decay=0.01, adam_beta2=0.95)
    positions = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables["params"] = list({id(p): p for p in [*tables["params"], *positions]}.values())
    known = {id(p) for p in tables["params"]}
    hidden["params"] = [p for p in hidden["params"] if p.requires_grad and id(p) not in known]
    return MuonWithAdamW([group for group in (hidden, tables, vectors) if group["params"]])


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean nats a predicted token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
        return model(**batch).loss


def train(step: Step, data: Data, steps: int, seed: int) -> tuple[float, int]:
    """Train for `steps` steps; the held-out nats a token, and the number of parameters that learned."""
    torch.manual_seed(seed)
    model = step.build().train()
    optimizer, warmup = optimizer_of(model), max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (data.batch_size,), generator=order)
        loss_of(model, step.batch([data.train[i] for i in chosen])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return held_out_loss(model, step, data), sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def held_out_loss(model: nn.Module, step: Step, data: Data, batch_size: int = 64) -> float:
    """Mean nats over all predicted tokens of the held-out text."""
    model.eval()
    nats, tokens = 0.0, 0
    for start in range(0, len(data.held_out), batch_size):
        batch = step.batch(data.held_out[start : start + batch_size])
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        nats += loss_of(model, batch).item() * count
        tokens += count
    return nats / tokens


class Result(NamedTuple):
    """One line of the table."""

    name: str
    new: str
    parameters: int
    bits_per_byte: list[float]
    """One for each seed."""


def counted(data: Data) -> list[Result]:
    """What needs no gradient descent: nothing learned, and the bigram's counts."""
    bigram = BigramLanguageModel(VOCABULARY)
    bigram.fit(data.train)
    found = {"uniform": ("every token alike", 0, math.log(VOCABULARY))}
    found["bigram, counted"] = ("the last token", bigram.table.weight.numel(), bigram.loss(data.held_out))
    return [Result(name, new, size, [data.bits_per_byte(nats)]) for name, (new, size, nats) in found.items()]


def trained(steps: dict[str, Step], data: Data, number: int, seeds: list[int]) -> list[Result]:
    """Every model, trained `number` steps with each seed."""
    results = []
    for name, step in steps.items():
        nats, parameters = zip(*(train(step, data, number, seed) for seed in seeds), strict=True)
        results.append(Result(name, step.new, parameters[0], [data.bits_per_byte(n) for n in nats]))
    return results


def show(results: list[Result], title: str) -> None:
    """The table; a line is drawn before the models that learn instructions."""
    table = Table(title=title)
    for heading in ("step", "what is new"):
        table.add_column(heading)
    for heading in ("parameters", "bits per byte", "of each seed"):
        table.add_column(heading, justify="right")
    for result in results:
        figures = " ".join(f"{figure:.3f}" for figure in result.bits_per_byte)
        last = result.name == "GPT-2 of transformers"
        mean = f"{statistics.fmean(result.bits_per_byte):.3f}"
        table.add_row(result.name, result.new, f"{result.parameters:,}", mean, figures, end_section=last)
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of about 2,048 tokens each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="8 steps on little text, for tests")
    options = parser.parse_args(arguments)
    steps, seeds, size = (8, [0], 60_000) if options.quick else (options.steps, options.seeds, 6_000_000)
    texts = load_texts("stories", split="train", max_bytes=size)
    tokenizer = train_tokenizer(texts[: max(1, len(texts) // 4)], VOCABULARY)
    packed = documents(tokenizer, texts, load_texts("stories", split="validation", max_bytes=size // 30))
    paired = instructions(tokenizer, size // 300, max(50, size // 6000))
    results = counted(packed) + trained(STEPS, packed, steps, seeds) + trained(INSTRUCTION_STEPS, paired, steps, seeds)
    show(
        results, f"{steps} steps of {ROWS * TOKENS:,} tokens, seeds {seeds}; held-out loss, below the line of the story"
    )
    figures = {result.name: result.bits_per_byte for result in results}
    best, simplest = (statistics.fmean(figures[name]) for name in ("GPT: four blocks", "bigram, counted"))
    line = {
        "benchmark": "course",
        "ratio": round(simplest / best, 3),
        "steps": steps,
        "parameters": {result.name: result.parameters for result in results},
        "bits_per_byte": figures,
    }
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
