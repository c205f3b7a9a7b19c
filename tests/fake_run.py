"""A run folder with plausible records of every stage, for the tests of the report: no model, no training."""

import json
import math
import random
from pathlib import Path
from typing import Any

PROMPTS = [
    "Write a story about Ben. Use: kite, fox. Ending: happy.",
    "Write a story about Mia. Use: lamp, boat. Ending: sad.",
    "Write a story about Tom & Ann. Use: <b>drum</b>. Ending: happy.",
    "Write a story about Zoe. Use: cup. Ending: happy.",
]
ANSWERS = {
    "pretrain": "Sue went to the market. The dog was in the garden and the dog was in the house. Sue said",
    "sft": "Ben had a red kite. He ran up the hill with it. A fox sat by the gate. She gave Ben the lamp. Ben was sad.",
    "best_of_16": "Ben had a red kite. A fox sat by the gate and looked at it. Ben smiled. Ben was happy.",
    "ppo": 'Ben had a red kite. On the hill he met a fox. "Can I hold it?" asked the fox. Ben gave the kite to the '
    "fox, and they ran up the hill together. Ben was happy.",
}
FINAL = {
    "tokenizer": {"vocab_size": 2048, "bytes_per_token": 4.43},
    "pretrain": {
        "val_loss": 2.41,
        "val_bpb": 0.787,
        "bigram_bpb": 1.312,
        "uniform_bpb": 2.48,
        "tokens_per_s": 16_900.0,
        "parameters": 2_170_000,
    },
    "sft": {"eval_loss": 1.734, "rows": 12_800, "eval_loss_before": 3.1},
    "preferences": {"pairs": 2_713, "test_pairs": 551, "flip_rate": 0.081, "gold_mean": 0.54},
    "reward": {
        "accuracy": 0.871,
        "accuracy_ci95": [0.8405, 0.8963],
        "accuracy_n": 551,
        "noisy_accuracy": 0.812,
        "margin": 2.1,
        "reward_mean": 0.3,
        "reward_std": 2.2,
        "pairs": 2_713,
    },
    "ppo": {"episodes": 3_072, "episodes_per_s": 14.2, "kl": 9.8, "scores": 1.61},
}
SECONDS = {
    "tokenizer": 4.1,
    "pretrain": 152.3,
    "sft": 58.0,
    "preferences": 21.4,
    "reward": 66.5,
    "ppo": 216.3,
    "evaluate": 41.2,
}
TOKENS = {"pretrain": 2_457_600, "sft": 1_310_720}
POLICIES = {
    "pretrain": {
        "gold": 0.11,
        "proxy": -2.9,
        "kl": 48.0,
        "length": 61.2,
        "distinct_2": 0.31,
        "gold_ci95": [0.09, 0.13],
        "bpb_under_pretrained": 0.71,
        "without_eos": 0.83,
    },
    "sft": {
        "gold": 0.53,
        "proxy": 0.02,
        "kl": 0.0,
        "length": 44.9,
        "distinct_2": 0.36,
        "gold_ci95": [0.49, 0.57],
        "bpb_under_pretrained": 0.92,
        "without_eos": 0.02,
    },
    "best_of_16": {
        "gold": 0.76,
        "proxy": 1.44,
        "kl": 1.835,
        "length": 46.1,
        "distinct_2": 0.35,
        "gold_ci95": [0.73, 0.79],
        "bpb_under_pretrained": 0.91,
        "without_eos": 0.0,
    },
    "ppo": {
        "gold": 0.82,
        "proxy": 1.71,
        "kl": 9.8,
        "length": 49.3,
        "distinct_2": 0.29,
        "gold_ci95": [0.79, 0.85],
        "bpb_under_pretrained": 0.95,
        "without_eos": 0.0,
    },
}
WIN_RATE = {"ppo_vs_sft": {"mean": 0.81, "ci95": [0.77, 0.85], "n": 256}}


def write_run(folder: Path, stages: tuple[str, ...] = tuple(SECONDS)) -> Path:
    """Write the records of `stages` into `folder` and return it."""
    random.seed(0)
    for name in stages:
        (folder / name).mkdir(parents=True)
        metrics = FINAL.get(name, {"policies": POLICIES, "win_rate": WIN_RATE})
        record = {
            "stage": name,
            "preset": "stories",
            "seed": 0,
            "config": {"seed": 0, "num_prompts": 256},
            "command": f"python -m stages.{name} --config configs/stories/{name}.yaml",
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
            "git_commit": "0123456789abcdef-dirty",
            "inputs": {"model": {"path": f"runs/stories/{name}-input", "sha256": "ab" * 32}},
            "started": "2026-11-23T10:00:00+00:00",
            "seconds": SECONDS[name],
            "tokens": TOKENS.get(name),
            "metrics": metrics,
            "device": "x86_64 CPU, 2 threads",
            "processes": 1,
        }
        (folder / name / "stage.json").write_text(json.dumps(record))
        lines(folder / name / "metrics.jsonl", METRICS.get(name, list)())
    if "reward" in stages:
        bins = [
            {"predicted": p, "observed": p + random.uniform(-0.05, 0.03), "n": n}
            for p, n in ((0.55, 80), (0.65, 92), (0.75, 101), (0.85, 120), (0.95, 158))
        ]
        (folder / "reward" / "calibration.json").write_text(json.dumps({"bins": bins, "margins": [0.1, -0.2]}))
    if "evaluate" in stages:
        scores = {"policies": POLICIES, "win_rate": WIN_RATE, "gold": "reward_data.stories:gold", "num_prompts": 256}
        (folder / "evaluate" / "scores.json").write_text(json.dumps(scores))
        lines(
            folder / "evaluate" / "samples.jsonl",
            [
                {
                    "index": i,
                    "prompt": prompt,
                    "policy": policy,
                    "completion": text,
                    "gold": POLICIES[policy]["gold"],
                    "proxy": POLICIES[policy]["proxy"],
                    "ended": policy != "pretrain",
                }
                for i, prompt in enumerate(PROMPTS)
                for policy, text in ANSWERS.items()
            ],
        )
    return folder


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _falling(step: int, start: float, end: float, scale: float, noise: float = 0.02) -> float:
    return end + (start - end) * math.exp(-step / scale) + random.gauss(0, noise)


def _pretrain() -> list[dict[str, Any]]:
    rows = [{"step": s, "loss": _falling(s, 7.6, 2.4, 90), "tokens_per_s": 16_900} for s in range(20, 601, 20)]
    evals = (
        {"step": s, "val_loss": _falling(s, 7.6, 2.38, 95, 0), "val_bpb": _falling(s, 2.48, 0.77, 95, 0)}
        for s in range(100, 601, 100)
    )
    return rows + list(evals)


def _sft() -> list[dict[str, Any]]:
    rows = [{"step": s, "loss": _falling(s, 3.1, 1.7, 60)} for s in range(20, 401, 20)]
    return rows + [{"step": s, "eval_loss": _falling(s, 3.1, 1.73, 60, 0)} for s in range(0, 401, 100)]


def _reward() -> list[dict[str, Any]]:
    rows = [
        {"step": s, "loss": _falling(s, 0.72, 0.38, 50), "accuracy": _falling(s, 0.5, 0.84, 50)}
        for s in range(10, 181, 10)
    ]
    evals = [
        {"step": s, "eval_loss": _falling(s, 0.72, 0.43, 50, 0), "eval_accuracy": _falling(s, 0.5, 0.81, 50, 0)}
        for s in range(60, 181, 60)
    ]
    return rows + evals


def _ppo() -> list[dict[str, Any]]:
    rows = []
    for step in range(1, 49):
        kl = max(0.0, _falling(step, 0, 10, 15, 0.6))
        score = _falling(step, 0, 1.7, 14, 0.15)
        rows.append(
            {
                "step": step,
                "episode": 64 * step,
                "objective/kl": kl,
                "objective/scores": score,
                "objective/rlhf_reward": score - 0.03 * kl,
                "response/length": _falling(step, 45, 49, 20, 1.2),
                "response/without_eos": 0.01,
            }
        )
    for step in range(0, 49, 8):
        rows.append(
            {
                "step": step,
                "episode": 64 * step,
                "eval/proxy": _falling(step, 0, 1.7, 14, 0),
                "eval/gold": _falling(step, 0.53, 0.83, 14, 0.01),
                "eval/kl": _falling(step, 0, 10, 15, 0),
                "eval/length": _falling(step, 45, 49, 20, 0.2),
            }
        )
    return rows


METRICS = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo}
