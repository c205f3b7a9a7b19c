"""PPO speed of ours against TRL 1.12's PPOTrainer, both in this run: `python -m benchmarks.ppo [--quick]`.

TRL 1.12 was the last with a PPOTrainer; it is installed under .cache/ on the first call. Both sides train policy and
a critic beside it, against a reference and a reward model of the same size, at a shape of ppo_shape.py (`--shape
smollm2`: four networks of SmolLM2-135M's size). No answer ends early, so that both do the same work. Each run is a
process of its own and times `train()` alone; ours and theirs take turns, a ratio is taken within a round, and the
median over the rounds is reported, and so is the ratio of the peaks of memory.

Ours runs once more with policy and critic on one trunk, which is not what TRL does: a figure apart. `--flat` is another
question: whether speed and memory stay what they are over 500 updates of ours.

TRL's mini-batches do not work (its issue 5645): it steps its optimizer at other times than ours, over the same number
of passes. Its bf16 is ignored under transformers 5.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_shape import FLAT, SHAPES, model_config

ROOT = Path(__file__).parent.parent
PEER_VERSION = "1.12.0"
MODES = ("fp32", "bf16")


def install_peer() -> Path:
    """Folder with TRL 1.12 and nothing else; fetched once."""
    folder = ROOT / ".cache" / f"trl-{PEER_VERSION}"
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"trl=={PEER_VERSION}"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: trl {PEER_VERSION} cannot be installed for the comparison: {done.stderr.strip()[-300:]}")
    return folder


def run_peer(mode: str, updates: int, shape: str) -> dict[str, Any]:
    """One timed run of TRL's trainer."""
    script = str(ROOT / "benchmarks" / "peer_trl_ppo.py")
    return _run([script], mode, updates, shape, {"PYTHONPATH": str(install_peer())})


def run_ours(mode: str, updates: int, shape: str) -> dict[str, Any]:
    """One timed run of our trainer."""
    return _run(["-m", "benchmarks.ppo", "--ours"], mode, updates, shape, {})


def run_trunk(mode: str, updates: int, shape: str) -> dict[str, Any]:
    """One timed run of our trainer with policy and critic on one trunk."""
    return _run(["-m", "benchmarks.ppo", "--ours", "--trunk"], mode, updates, shape, {})


def _run(what: list[str], mode: str, updates: int, shape: str, extra: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, *what, "--mode", mode, "--updates", str(updates), "--shape", shape]
    # At the tiny shape two threads only wait for each other
    environment = ({"OMP_NUM_THREADS": "1"} if shape == "quick" else {}) | os.environ | extra
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(mode: str, updates: int, shape: dict[str, Any], trunk: bool = False) -> dict[str, Any]:
    """Train `updates` updates in this process; returns the figures of the run, and seconds and memory by update."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification
    from pipeline.ppo import PPOConfig, PPOTrainer
    from pipeline.rewards import RewardModel

    precision = "bf16" if mode == "bf16" else "no"
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocabulary"])}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.eos_token_id, tokenizer.pad_token_id = None, 0
    policy = GPTForCausalLM(AutoConfig.for_model(**model_config(shape)))
    # For the comparison no token at all: every answer has its full length
    policy.generation_config.eos_token_id = 1 if shape is FLAT else shape["vocabulary"]
    config = AutoConfig.for_model(num_labels=1, **model_config(shape))
    critic, reward = (GPTForSequenceClassification(config) for _ in range(2))
    ids = torch.randint(3, shape["vocabulary"], (updates * shape["batch"], shape["prompt"])).tolist()
    split: dict[str, float] = {}
    updates_seen: list[tuple[float, float]] = []

    def account(trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        updates_seen.append((shape["batch"] / metrics["episodes_per_s"], resident_mb()))
        for name in ("time/sample", "time/score", "time/update"):
            split[name] = split.get(name, 0.0) + metrics[name]

    with tempfile.TemporaryDirectory() as folder:
        reward.save_pretrained(folder)
        del reward  # it is read again: four networks, as the peer has
        tokenizer.save_pretrained(folder)
        args = PPOConfig(
            output_dir=folder,
            mixed_precision=precision,
            total_episodes=updates * shape["batch"],
            batch_size=shape["batch"],
            num_mini_batches=shape["mini_batches"],
            num_ppo_epochs=shape["epochs"],
            per_device_train_batch_size=shape["micro_batch"],
            response_length=shape["response"],
            critic_warmup_updates=0,
            save_steps=0,
            logging_steps=10**6,
            share_trunk=trunk,
        )
        rows = [{"prompt": " ".join(f"w{token}" for token in row)} for row in ids]
        judge = RewardModel(folder, mixed_precision=precision, batch_size=shape["batch"])
        trainer = PPOTrainer(
            policy, judge, args, rows, tokenizer, critic=None if trunk else critic, callbacks=[account]
        )
        final = trainer.train()
    assert shape is FLAT or trainer.state.tokens == updates * shape["batch"] * shape["response"]
    return {
        "who": "ours, one trunk" if trunk else "ours",
        "mode": mode,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "episodes_per_s": final["episodes_per_s"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seconds": {name.removeprefix("time/"): round(value, 2) for name, value in split.items()},
        "updates": [[round(seconds, 4), round(memory, 1)] for seconds, memory in updates_seen],
    }


def resident_mb() -> float:
    """Memory of this process now, where the system tells; else the most so far."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flat(mode: str, updates: int) -> dict[str, Any]:
    """Median seconds of an update and memory in each tenth of a long run; ratios of the last tenth over the second.

    Memory rises a little at first: PyTorch's products keep a kernel for each shape they meet, up to a number.
    """
    seen = ours(mode, updates, FLAT)["updates"]
    size = max(1, len(seen) // 10)
    tenths = [seen[i : i + size] for i in range(0, len(seen), size)][:10]
    seconds = [statistics.median(update for update, _ in part) for part in tenths]
    memory = [statistics.median(megabytes for _, megabytes in part) for part in tenths]
    for number, (update, megabytes) in enumerate(zip(seconds, memory, strict=True), 1):
        print(f"tenth {number:2d}  {update:.3f} s an update  {megabytes:,.0f} MB")
    second = min(1, len(tenths) - 1)  # the first tenth has what is done once
    return {
        "benchmark": "ppo-flat",
        "mode": mode,
        "updates": len(seen),
        "ratio": round(seconds[-1] / seconds[second], 3),
        "memory_ratio": round(memory[-1] / memory[second], 3),
        "seconds": seconds,
        "memory_mb": memory,
    }


def compare(runs: list[dict[tuple[str, str], dict[str, Any]]]) -> dict[str, Any]:
    """Median of the rounds' ratios: like with like, and our faster mode against theirs, in speed and in memory."""
    speeds = {
        key: statistics.median(run[key]["episodes_per_s"] for run in runs) for key in runs[0]
    }  # (who, mode) → episodes/s
    best = {who: max(MODES, key=lambda mode: speeds[who, mode]) for who in dict.fromkeys(who for who, _ in speeds)}

    def ratio(mine: str, theirs: str, who: str = "ours") -> float:
        quotients = (r[who, mine]["episodes_per_s"] / r["trl", theirs]["episodes_per_s"] for r in runs)
        return round(statistics.median(quotients), 3)

    peaks = {who: statistics.median(run[who, best[who]]["peak_memory_mb"] for run in runs) for who in ("ours", "trl")}
    memory = round(peaks["ours"] / peaks["trl"], 3)

    return {
        "benchmark": "ppo",
        "ratio": ratio(best["ours"], best["trl"]),
        **{f"ratio_{mode}": ratio(mode, mode) for mode in MODES},
        "memory_ratio": memory,
        **({"ratio_one_trunk": ratio(best["trunk"], best["trl"], "trunk")} if "trunk" in best else {}),
        **{f"{who}_{mode}_episodes_per_s": round(speed, 2) for (who, mode), speed in speeds.items()},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="smollm2: SmolLM2-135M's networks (an hour)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one round, for tests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="updates of a run; 5 of 64 answers each, smollm2: 2 of 16")
    parser.add_argument("--ours", action="store_true", help="only our side, once, in this process")
    parser.add_argument("--mode", choices=MODES, default="bf16", help="precision for --ours and --flat")
    parser.add_argument("--trunk", action="store_true", help="with --ours: policy and critic on one trunk")
    parser.add_argument("--flat", action="store_true", help="500 updates (or --updates) of ours: do they slow or grow?")
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else options.shape
    updates = options.updates or SHAPES[name]["updates"]
    if options.ours:
        print("\n" + json.dumps(ours(options.mode, updates, SHAPES[name], options.trunk)))
        return None
    if options.flat:
        line = flat(options.mode, options.updates or FLAT["updates"])
        print("\n" + json.dumps(line))
        return line

    runs: list[dict[tuple[str, str], dict[str, Any]]] = []
    for number in range(1 if options.quick else options.rounds):
        found = {}
        for mode in MODES:
            order = [("ours", run_ours), *([] if options.quick else [("trunk", run_trunk)]), ("trl", run_peer)]
            for who, run in order if number % 2 == 0 else order[::-1]:
                found[who, mode] = run(mode, updates, name)
                line = found[who, mode]
                print(
                    f"round {number + 1}  {line['who']:15s} {mode}  {line['episodes_per_s']:6.2f} episodes/s  "
                    f"peak {line['peak_memory_mb']:,} MB",
                    flush=True,
                )
        runs.append(found)

    print("\nwhere our time goes")
    for mode in MODES:
        seconds = runs[-1]["ours", mode]["seconds"]
        shares = "  ".join(f"{name} {value / sum(seconds.values()):.0%}" for name, value in seconds.items())
        print(f"  {mode}  {shares}")
    line = compare(runs) | {
        "shape": name,
        "peak_memory_mb": {f"{who}_{mode}": runs[-1][who, mode]["peak_memory_mb"] for who, mode in runs[-1]},
        "parameters": runs[-1]["ours", "fp32"]["parameters"],
        "rounds": len(runs),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
