"""The `shakespeare` preset in the time of nanoGPT's published CPU recipe: `python -m benchmarks.nanogpt --text FILE`.

That recipe (nanoGPT's README: 4 layers, width 128, rows of 64, 12 a batch, 2,000 iterations, no dropout, AdamW) is
published with a validation loss of 1.88 nats a character. A GPT-2 of its shape from transformers, in fp32, stands in
for it and sets the budget: seconds of its 2,000 iterations (batch, forward, backward, clipping, AdamW), evaluation not
counted. They are run in four quarters, before, between and after our three seeds, so that a slow spell of the machine
hits both sides. Ours is the wall-clock of the whole stage `pretrain`: encoding, evaluations and saving are in it.

Every loss is the mean over the full validation tenth of the text, each character but the first predicted once, in rows
of the length trained on. The last line is a JSON object.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

ITERATIONS, ROWS, LENGTH = 2000, 12, 64  # of the stand-in
TARGET = 1.75  # nats a character to stay below within its time
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parent.parent
QUICK = ["--max_steps", "4", "--hidden_size", "32", "--num_attention_heads", "1", "--num_key_value_heads", "1"]


class StandIn:
    """nanoGPT's CPU recipe with transformers' GPT-2; `train` goes on where it stopped and adds to `seconds`."""

    def __init__(self, text: str) -> None:
        alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
        ids = torch.tensor([alphabet[character] for character in text])
        self.training, self.validation = ids.tensor_split([int(len(ids) * 0.9)])
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(alphabet),
            n_positions=LENGTH,
            n_embd=128,
            n_layer=4,
            n_head=4,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config).train()
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self.done, self.seconds = 0, 0.0

    def train(self, iterations: int) -> None:
        """The next iterations of the 2,000, on the clock."""
        started = time.perf_counter()
        for _ in range(iterations):
            self._step()
        self.seconds += time.perf_counter() - started

    def _step(self) -> None:
        warmup, lowest = 100, 0.1  # nanoGPT's schedule: a cosine to a tenth
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, self.done - warmup) / (ITERATIONS - warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * min((self.done + 1) / warmup, lowest + (1 - lowest) * cosine)
        starts = torch.randint(len(self.training) - LENGTH, (ROWS,)).tolist()
        rows = torch.stack([self.training[i : i + LENGTH + 1] for i in starts])
        self._loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    def _loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.model(rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)

    @torch.no_grad()
    def loss(self) -> float:
        """Nats a character over the whole validation text."""
        text, total = self.validation, 0.0
        whole = (len(text) - 1) // LENGTH * LENGTH
        for rows in (*text[: whole + 1].unfold(0, LENGTH + 1, LENGTH).split(64), text[None, whole:]):
            if rows.shape[1] > 1:
                total += self._loss(rows, "sum").item()
        return total / (len(text) - 1)


def run_stage(stage: str, *words: str) -> None:
    command = [sys.executable, "-m", f"stages.{stage}", "--config", f"configs/shakespeare/{stage}.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="data/tinyshakespeare.txt", help="any text file")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps, for tests; no figure to read")
    options = parser.parse_args(arguments)
    text = Path(options.text).resolve()
    if not text.is_file():
        sys.exit(f"error: there is no text file {text}; name one with --text FILE (make bench-shakespeare TEXT=FILE)")
    part, seeds, extra = (2, SEEDS[:1], QUICK) if options.quick else (ITERATIONS // 4, SEEDS, [])
    stand_in, runs = StandIn(text.read_text(encoding="utf-8-sig")), []
    with tempfile.TemporaryDirectory() as folder:
        common = ["--dataset", str(text), "--run_dir", folder]
        run_stage("tokenizer", *common)
        stand_in.train(part)
        for seed in seeds:
            output = f"{folder}/pretrain-{seed}"
            run_stage("pretrain", *common, "--output_dir", output, "--seed", str(seed), *extra)
            record = json.loads(Path(output, "stage.json").read_text())
            loss = record["metrics"]["val_nats_per_char"]
            runs.append(
                {
                    "seed": seed,
                    "nats_per_char": round(loss, 4),
                    "seconds": record["seconds"],
                    "characters": record["tokens"],
                }
            )
            print(f"seed {seed}: {loss:.4f} nats a character after {record['seconds']:.1f} s", flush=True)
            stand_in.train(part)
    return report(stand_in, runs)


def report(stand_in: StandIn, runs: list[dict]) -> dict:
    """Print both sides and the last line."""
    budget = stand_in.seconds * ITERATIONS / stand_in.done
    passed = all(run["nats_per_char"] < TARGET and run["seconds"] < budget for run in runs)
    print(f"stand-in: {stand_in.loss():.4f} after {stand_in.done:,} iterations; {ITERATIONS:,} take {budget:.1f} s")
    print(f"{'pass' if passed else 'FAIL'}: each seed below {TARGET} within that time")
    line = {
        "benchmark": "nanogpt",
        "ratio": round(budget / statistics.median(run["seconds"] for run in runs), 3),
        "passed": passed,
        "target": TARGET,
        "budget_seconds": round(budget, 1),
        "stand_in_nats_per_char": round(stand_in.loss(), 4),
        "runs": runs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
