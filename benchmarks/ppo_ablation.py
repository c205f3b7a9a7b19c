"""What each of PPO's defaults is worth, and gold against √KL:
`python -m benchmarks.ppo_ablation --runs runs/a runs/b …`.

Every contender changes one thing of the preset's PPO and has the same episodes. A run of `--runs` is a folder that has
gone through `make` up to the reward model, one a seed; PPO starts from its SFT model and reward model. Judged is the
gold score of the answers to the same held-out prompts, sampled with the same random numbers before and after, so what a
contender adds to the baseline is paired by seed.

`--curve` draws gold and proxy over √KL (Gao et al., 2210.10760): PPO with and without its KL penalty as it goes, and
best-of-n of the SFT model. Runs that are found in the output folder are not made again.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

BASE = "base"
CHANGES: dict[str, list[str]] = {
    BASE: [],
    # ---- TRL 1.12's way where the preset has another
    "four passes": ["--num_ppo_epochs", "4"],
    "one mini-batch": ["--num_mini_batches", "1"],
    "temperature 0.7": ["--temperature", "0.7"],
    "no gradient clipping": ["--max_grad_norm", "1e9"],
    "fp32": ["--mixed_precision", "no"],
    # ---- what the preset had once, and lost by this table
    "critic warm-up of 4": ["--advantage_estimator", "gae", "--critic_warmup_updates", "4"],
    "critic's λ 1": ["--advantage_estimator", "gae", "--lam_value", "1"],
    "critic's rate 1e-3": ["--advantage_estimator", "gae", "--critic_learning_rate", "1e-3"],
    "value clip 1": ["--advantage_estimator", "gae", "--cliprange_value", "1"],
    "penalty without end 1": ["--missing_eos_penalty", "1"],
    # ---- what the preset has, taken out
    "no KL penalty": ["--kl_coef", "0", "--adaptive_kl_target", "none"],
    "β fixed": ["--adaptive_kl_target", "none"],
    "no pretraining text": ["--ptx_coef", "0", "--ptx_dataset", "none"],
    "one answer a prompt": ["--advantage_estimator", "gae", "--num_generations", "1"],
    # ---- what else one may ask
    "gae, a critic": ["--advantage_estimator", "gae"],
    "critic from the policy": ["--advantage_estimator", "gae", "--critic_name_or_path", "{run_dir}/sft"],
    "shared trunk": ["--advantage_estimator", "gae", "--share_trunk", "True"],
    "clip-higher 0.28": ["--cliprange_high", "0.28"],
    "entropy bonus 0.01": ["--entropy_coef", "0.01"],
    "whitened rewards": ["--advantage_estimator", "gae", "--whiten_rewards", "True"],
    "dual clip 3": ["--dual_clip", "3"],
    "KL early stop at 0.01": ["--target_kl", "0.01"],
    "reference renewed every 8": ["--ref_sync_updates", "8"],
    "importance weights up to 2": ["--sampler_weight_cap", "2"],
    "normalised scores": ["--normalize_scores", "True"],
}
CURVES = (BASE, "no KL penalty")  # looked at every few updates
BEST_OF = (1, 2, 4, 8, 16, 32, 64)


def train(name: str, run: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Held-out figures of one PPO run, the first before its first update; from its record if it has been made."""
    seed = seed_of(run)
    folder = options.output / name.replace(" ", "-").replace("(", "").replace(")", "") / run.name
    record = folder / "stage.json"
    if not record.exists():
        updates = 4 if name in CURVES else 10**6
        command = [
            sys.executable,
            "-m",
            "stages.ppo",
            "--config",
            options.config,
            "--run_dir",
            run,
            "--output_dir",
            folder,
            "--seed",
            seed,
            "--eval_size",
            options.prompts,
            "--eval_steps",
            updates,
            "--best_metric",
            "none",
            *CHANGES[name],
            *(["--total_episodes", options.episodes] if options.episodes else []),
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {name}, {run}: {done.stderr.strip()[-600:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/gold" in row]


def seed_of(run: Path) -> int:
    """The seed that the run's SFT model was trained with."""
    record = run / "sft" / "stage.json"
    if not record.exists():
        sys.exit(f"error: {run} has no SFT model; make it with `make reward RUN={run} SEED=…` first")
    return json.loads(record.read_text())["seed"]


def report(found: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Print the table; one entry a contender: gold at the end by seed, and what it adds to the baseline's."""
    print(f"\n{'':28s}  gold   − base ± s.e.     gain over SFT   KL  length  distinct-2  gold by seed")
    entries = {}
    for name, runs in found.items():
        last = [rows[-1] for rows in runs.values()]
        gold = [row["eval/gold"] for row in last]
        paired = [rows[-1]["eval/gold"] - found[BASE][run][-1]["eval/gold"] for run, rows in runs.items()]
        gain = statistics.mean(rows[-1]["eval/gold"] - rows[0]["eval/gold"] for rows in runs.values())
        error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else 0.0
        means = {key: statistics.mean(row[f"eval/{key}"] for row in last) for key in ("kl", "length", "distinct_2")}
        print(
            f"{name:28s} {statistics.mean(gold):.3f}  {statistics.mean(paired):+.3f} ± {error:.3f}   {gain:+.3f} "
            f"{means['kl']:12.2f} {means['length']:6.1f} {means['distinct_2']:9.2f}    "
            + " ".join(f"{value:.3f}" for value in gold)
        )
        entries[name] = {
            "gold": [round(value, 4) for value in gold],
            "difference": round(statistics.mean(paired), 4),
            "error": round(error, 4),
            "gain": round(gain, 4),
        }
        entries[name] |= {key: round(value, 3) for key, value in means.items()}
    return entries


def expected_best(order_by: list[float], values: list[float], n: int) -> float:
    """Mean of `values` at the highest `order_by` among n drawn without replacement: over all draws, no one drawn.

    The i-th lowest of N is the best of n with probability C(i, n − 1)/C(N, n), i counted from 0.
    """
    ranked = [values[i] for i in sorted(range(len(values)), key=lambda i: order_by[i])]
    return sum(math.comb(i, n - 1) * value for i, value in enumerate(ranked)) / math.comb(len(ranked), n)


def best_of_n(run: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Gold and proxy of the SFT model's best of n answers by the reward model, at the KL that n costs at most."""
    import torch

    from pipeline.judging import Policy, answer, best_of_n_kl
    from pipeline.model.hardware import use_bf16
    from pipeline.model.load import load_policy
    from pipeline.rewards import RewardModel, load_function
    from pipeline.text import data
    from pipeline.text.tokenizer import load_tokenizer

    record = options.output / "best-of-n" / f"{run.name}.json"
    if record.exists():
        return json.loads(record.read_text())
    rows = data.load_prompts("stories", split="validation", seed=seed_of(run), size=options.prompts).rows.to_dict()
    prompts, most = rows.pop("prompt"), max(BEST_OF)
    policy = Policy(load_policy(str(run / "sft")), load_tokenizer(str(run / "sft")))
    proxy, gold = RewardModel(str(run / "reward")), load_function("reward_data.stories:gold")
    asked = [prompt for prompt in prompts for _ in range(most)]
    columns = {name: [value for value in values for _ in range(most)] for name, values in rows.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16("auto")):
        texts = answer(
            policy,
            asked,
            max_new_tokens=64,
            temperature=1.0,
            batch_size=256,
            generator=torch.Generator().manual_seed(seed_of(run)),
        ).texts
    scores = {"proxy": proxy(asked, texts), "gold": gold(asked, texts, **columns)}
    points = []
    for n in BEST_OF:
        point = {"n": n, "eval/kl": best_of_n_kl(n)}
        for name, values in scores.items():
            groups = [(scores["proxy"][i : i + most], values[i : i + most]) for i in range(0, len(asked), most)]
            point[f"eval/{name}"] = statistics.mean(expected_best(*group, n) for group in groups)
        points.append(point)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(points))
    return points


def draw(curves: dict[str, dict[str, list[dict[str, float]]]], file: Path) -> None:
    """Gold and proxy over √KL, a thin line a seed and one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for axis, metric, title in zip(
        axes, ("gold", "proxy"), ("gold: the program", "proxy: the reward model"), strict=True
    ):
        for number, (name, runs) in enumerate(curves.items()):
            for i, points in enumerate(runs.values()):
                places = [math.sqrt(max(0.0, point["eval/kl"])) for point in points]
                axis.plot(
                    places,
                    [point[f"eval/{metric}"] for point in points],
                    color=f"C{number}",
                    linewidth=1.2,
                    alpha=0.8,
                    marker=".",
                    markersize=3,
                    label=None if i else name,
                )
        axis.set(title=title, xlabel="√KL(policy ‖ SFT), KL in nats an answer")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    print(f"→ {file}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders with sft and reward, one a seed")
    parser.add_argument("--only", help="names with commas between them; the baseline is always run")
    parser.add_argument("--config", default="configs/stories/ppo.yaml")
    parser.add_argument("--episodes", type=int, help="of each run instead of the preset's")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--output", type=Path, default=Path("runs/ppo-ablation"))
    parser.add_argument("--curve", type=Path, help="draw gold over √KL into this file (png or svg)")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(CHANGES)
    if unknown := set(wanted) - set(CHANGES):
        parser.error(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(CHANGES)}")
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in dict.fromkeys([BASE, *wanted]):
        for run in options.runs:
            rows = found.setdefault(name, {})[run.name] = train(name, run, options)
            print(
                f"{name:28s} {run.name}  gold {rows[0]['eval/gold']:.3f} → {rows[-1]['eval/gold']:.3f}  "
                f"KL {rows[-1]['eval/kl']:.2f}",
                flush=True,
            )
    line = {"benchmark": "ppo-ablation", "contenders": report(found)}
    base = found[BASE].values()
    line["ratio"] = round(
        statistics.mean(r[-1]["eval/gold"] for r in base) / statistics.mean(r[0]["eval/gold"] for r in base), 3
    )
    if options.curve:
        disable_progress_bars()
        curves = {"PPO" if name == BASE else name: found[name] for name in CURVES if name in found}
        curves["best of n"] = {run.name: best_of_n(run, options) for run in options.runs}
        draw(curves, options.curve)
        line["best_of_n"] = curves["best of n"]
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
