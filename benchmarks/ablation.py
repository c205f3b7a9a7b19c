"""Optimizer, schedule, architecture, vocabulary and batch, one change at a time, at equal time:
`python -m benchmarks.ablation [--only name,…] [--large] [--seeds 0 1 2] [--seconds S] [--quick]`.

Every contender trains on the `stories` corpus for the same CPU time of one thread (set OMP_NUM_THREADS=1) and is judged
by held-out bits per byte on the same text. Beside other work even CPU time varies by a fifth between two runs of the
same steps. So the time of a step is measured first, the contenders taking turns, as the median of its ratios to the
baseline's, and each gets budget / time-of-its-step steps: runs repeat to the step, and schedules end with the budget.
Data and evaluation are not counted. A seed sets the weights and the order of the rows, for all contenders the same.

Results are appended to ablation.jsonl in the output folder as each run ends; runs found there are not made again.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import disable_progress_bars
from torch import Tensor, nn
from transformers import Qwen3Config

from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.hardware import use_bf16
from pipeline.model.optim import MuonWithAdamW, parameter_groups
from pipeline.text.data import load_texts
from pipeline.text.packing import Packed, pack
from pipeline.text.tokenizer import train_tokenizer

TOKENS_PER_ROW = 128
TOKENIZER_BYTES, HELD_OUT_BYTES = 2_000_000, 200_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One contender; the defaults are the `stories` preset's as it was when the table in LOG.md was made."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    head: int = 32
    tied: bool = True
    qk_norm: bool = True
    optimizer: str = "muon"  # with AdamW for embedding, head and norms; or "adamw" for all
    muon_lr: float = 0.02
    lr: float = 3e-3
    schedule: str = "cosine"  # or "wsd"
    rows: int = 16
    seconds: float = 45.0


BASE, LARGE = Recipe(), Recipe(width=384, layers=6, head=64, seconds=140.0)  # 1M and 11M parameters
# What each contender changes; the first of each size is its baseline
CHANGES = {
    "base": {},
    "adamw-1.5e-3": {"optimizer": "adamw", "lr": 1.5e-3},
    "adamw-3e-3": {"optimizer": "adamw"},
    "adamw-6e-3": {"optimizer": "adamw", "lr": 6e-3},
    "muon-0.01": {"muon_lr": 0.01},
    "muon-0.04": {"muon_lr": 0.04},
    "wsd": {"schedule": "wsd"},
    "wsd-muon-0.01": {"schedule": "wsd", "muon_lr": 0.01},
    "no-qk-norm": {"qk_norm": False},
    "untied": {"tied": False},
    "vocabulary-512": {"vocabulary": 512},
    "vocabulary-1024": {"vocabulary": 1024},
    "vocabulary-4096": {"vocabulary": 4096},
    "rows-8": {"rows": 8},
    "rows-32": {"rows": 32},
    "rows-64": {"rows": 64},
    "wsd-adamw-3e-3": {"schedule": "wsd", "optimizer": "adamw"},
}
LARGE_CHANGES = {
    "10M-base": {},
    "10M-adamw-3e-4": {"optimizer": "adamw", "lr": 3e-4},
    "10M-adamw-1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "10M-adamw-3e-3": {"optimizer": "adamw"},
    "10M-muon-0.01": {"muon_lr": 0.01},
    "10M-wsd": {"schedule": "wsd"},
}
TINY = {"vocabulary": 300, "width": 32, "layers": 1, "head": 16, "rows": 4, "seconds": 0.2}
QUICK = ("base", "adamw-3e-3", "no-qk-norm", "untied")


# ---- one contender ---------------------------------------------------------------------------------------------------


class NoNorm(nn.Module):
    """Leaves queries or keys as they are, in fp32 as RMSNorm returns them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def build(recipe: Recipe, seed: int) -> GPTForCausalLM:
    """The GPT of `recipe` with random weights."""
    torch.manual_seed(seed)
    model = GPTForCausalLM(
        Qwen3Config(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            head_dim=recipe.head,
            num_attention_heads=recipe.width // recipe.head,
            num_key_value_heads=recipe.width // recipe.head,
            intermediate_size=32 * math.ceil(recipe.width * 8 / 3 / 32),
            max_position_embeddings=2 * TOKENS_PER_ROW,
            tie_word_embeddings=recipe.tied,
            pad_token_id=0,
            use_cache=False,
        )
    )
    if not recipe.qk_norm:
        for block in model.model.layers:
            block.self_attn.q_norm, block.self_attn.k_norm = NoNorm(), NoNorm()
    return model.train()


def make_optimizer(recipe: Recipe, model: nn.Module) -> MuonWithAdamW:
    groups = parameter_groups(model, recipe.muon_lr, recipe.lr, weight_decay=0.01, adam_beta2=0.95)
    if recipe.optimizer == "adamw":
        groups[0] |= {"use_muon": False, "lr": recipe.lr, "betas": groups[1]["betas"]}
    return MuonWithAdamW(groups)


def lr_factor(schedule: str, progress: float, warmup: float = 0.04, decay: float = 0.25) -> float:
    """Factor of the learning rate at `progress` (0 to 1) of the budget.

    Linear warm-up; then half a cosine to 0, or constant until the last quarter, which falls by 1 − √ (2405.18392).
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "wsd":
        return 1 - math.sqrt(max(0.0, (progress - (1 - decay)) / decay))
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def stepper(recipe: Recipe, model: nn.Module, rows: Tensor) -> Callable[[int, int], None]:
    """A function that makes step number `step` of `steps` on its share of `rows` (N, T) of tokens."""
    optimizer = make_optimizer(recipe, model)
    highest = [group["lr"] for group in optimizer.param_groups]

    def run(step: int, steps: int) -> None:
        batch = rows[step * recipe.rows : (step + 1) * recipe.rows]
        if len(batch) < recipe.rows:
            raise SystemExit("error: the corpus is too short for this budget, and no row is seen twice; raise --bytes")
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * lr_factor(recipe.schedule, (step + 0.5) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
            loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


# ---- the comparison --------------------------------------------------------------------------------------------------


class Text:
    """The corpus and the held-out text in tokens, made once for each vocabulary."""

    def __init__(self, corpus_bytes: int) -> None:
        sizes = {"train": corpus_bytes, "validation": HELD_OUT_BYTES}
        self.texts = {split: load_texts("stories", split=split, max_bytes=size) for split, size in sizes.items()}
        self.packed: dict[int, dict[str, Packed]] = {}

    def __call__(self, vocabulary: int, split: str) -> Packed:
        """The texts of a split in tokens."""
        if vocabulary not in self.packed:
            some = load_texts("stories", split="train", max_bytes=TOKENIZER_BYTES)
            tokenizer = train_tokenizer(some, vocabulary)
            self.packed[vocabulary] = {s: pack(texts, tokenizer, TOKENS_PER_ROW) for s, texts in self.texts.items()}
        return self.packed[vocabulary][split]

    def rows(self, vocabulary: int, seed: int) -> Tensor:
        """The corpus as (N, TOKENS_PER_ROW) ids in an order set by `seed`; a shorter last row is left out."""
        ids = torch.from_numpy(self(vocabulary, "train").ids).long()
        count = len(ids) // TOKENS_PER_ROW
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return ids[: count * TOKENS_PER_ROW].view(count, TOKENS_PER_ROW)[order]


def work(recipe: Recipe) -> str:
    """What the time of a step depends on; recipes that agree in it get the same number of steps.

    QK-norm is not in it: a few per cent of a step, which the kernels have built in, and do not run without.
    """
    return json.dumps(dataclasses.asdict(recipe) | {"qk_norm": 0, "muon_lr": 0, "lr": 0, "schedule": 0, "seconds": 0})


def step_times(recipes: list[Recipe], text: Text, known: dict[str, float], rounds: int = 5) -> dict[str, float]:
    """CPU seconds of a step by `work`; those not `known` by the median over the rounds of their ratio to the first."""
    first, new = work(recipes[0]), {work(r): r for r in reversed(recipes) if work(r) not in known}
    if not new:
        return known
    timed = {first: recipes[0]} | new
    runs = {w: stepper(r, build(r, 0), text.rows(r.vocabulary, 0)) for w, r in timed.items()}
    seconds: dict[str, list[float]] = {w: [] for w in runs}
    for turn in range(rounds):
        order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for w in order:
            for step in range(2):  # until cache and allocator have forgotten the one before
                runs[w](step, 10**6)
            start = time.process_time()
            for step in range(2, 8):
                runs[w](step, 10**6)
            seconds[w].append((time.process_time() - start) / 6)
    unit = known.get(first) or statistics.median(seconds[first])
    ratios = {w: statistics.median(a / b for a, b in zip(seconds[w], seconds[first], strict=True)) for w in new}
    return known | {w: unit * ratio for w, ratio in ratios.items()}


@torch.no_grad()
def held_out(model: nn.Module, text: Text, vocabulary: int) -> float:
    """Bits per byte of the held-out text."""
    packed, nats = text(vocabulary, "validation"), 0.0
    model.eval()
    rows = [torch.tensor(row)[None] for row in packed.rows["input_ids"]]
    for batch in [*torch.cat(rows[:-1]).split(16), rows[-1]]:  # the last row may be shorter
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
            nats += model(batch, labels=batch).loss.item() * batch[:, 1:].numel()
    return nats / math.log(2) / packed.bytes


def train(recipe: Recipe, seed: int, steps: int, text: Text) -> dict:
    """Train for `steps` steps; what ablation.jsonl says of the run."""
    model = build(recipe, seed)
    run, start = stepper(recipe, model, text.rows(recipe.vocabulary, seed)), time.process_time()
    for step in range(steps):
        run(step, steps)
    seconds = time.process_time() - start
    bpb = held_out(model, text, recipe.vocabulary)
    size = {"tokens": steps * recipe.rows * TOKENS_PER_ROW, "parameters": sum(p.numel() for p in model.parameters())}
    return {"bpb": bpb, "steps": steps, "cpu_seconds": seconds} | size


def compare(recipes: dict[str, Recipe], seeds: list[int], text: Text, folder: Path) -> dict[str, dict[int, dict]]:
    """Rows of ablation.jsonl by name and seed: every contender with the first seed, then with the second, …"""
    folder.mkdir(parents=True, exist_ok=True)
    record, times = folder / "ablation.jsonl", folder / "step_times.json"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    known = step_times(list(recipes.values()), text, json.loads(times.read_text()) if times.exists() else {})
    times.write_text(json.dumps(known, indent=1))
    found: dict[str, dict[int, dict]] = {name: {} for name in recipes}
    for seed in seeds:
        for name, recipe in recipes.items():
            key = {"name": name, "seed": seed, **dataclasses.asdict(recipe)}
            row = next((row for row in done if key.items() <= row.items()), None)
            if row is None:
                row = key | train(recipe, seed, max(1, round(recipe.seconds / known[work(recipe)])), text)
                with record.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(f"{name:16s} seed {seed}  {row['bpb']:.4f} bits/byte, {row['tokens']:,} tokens", flush=True)
            found[name][seed] = row
    return found


def report(found: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """Print the table; one entry a contender: bits per byte by seed, and what it adds to the baseline's."""
    base = next(iter(found.values()))
    print(f"\n{'':16s} bits/byte    - base ± s.e.      tokens  parameters  seeds")
    entries = {}
    for name, rows in found.items():
        bpb = [row["bpb"] for row in rows.values()]
        paired = [row["bpb"] - base[seed]["bpb"] for seed, row in rows.items()]  # same weights to begin with, same rows
        error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else 0.0
        mean, difference = statistics.mean(bpb), statistics.mean(paired)
        tokens, parameters = (next(iter(rows.values()))[key] for key in ("tokens", "parameters"))
        shown = " ".join(f"{b:.4f}" for b in bpb)
        print(f"{name:16s} {mean:9.4f}  {difference:+8.4f} {error:6.4f} {tokens:11,d} {parameters:11,d}  {shown}")
        entries[name] = {
            "bpb": round(mean, 4),
            "seeds": [round(b, 4) for b in bpb],
            "difference": round(difference, 4),
            "error": round(error, 4),
            "tokens": tokens,
        }
    return entries


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names with commas between them; the baseline is always run")
    parser.add_argument("--large", action="store_true", help="the contrasts at 11M parameters instead of 1M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="CPU seconds of training a run")
    parser.add_argument("--bytes", type=int, default=12_000_000, help="of the corpus; no row is seen twice")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    changes, base = (LARGE_CHANGES, LARGE) if options.large else (CHANGES, BASE)
    baseline = next(iter(changes))
    wanted = QUICK if options.quick else options.only.split(",") if options.only else changes
    if unknown := set(wanted) - set(changes):
        parser.error(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(changes)}")
    fixed = (TINY if options.quick else {}) | ({"seconds": options.seconds} if options.seconds else {})
    names = dict.fromkeys([baseline, *wanted])
    recipes = {name: dataclasses.replace(base, **(changes[name] | fixed)) for name in names}
    entries = report(compare(recipes, options.seeds, Text(options.bytes), options.output))
    adamw = [entry["bpb"] for name, entry in entries.items() if recipes[name].optimizer == "adamw"]
    line = {
        "benchmark": "ablation",
        # Bits per byte of the best AdamW over those of the baseline, which has Muon: above 1, Muon is better
        "ratio": round(min(adamw) / entries[baseline]["bpb"], 4) if adamw else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "contenders": entries,
    }
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
