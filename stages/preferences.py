"""Make preference pairs: `python -m stages.preferences --config configs/stories/preferences.yaml`."""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.model.sampler import generate
from pipeline.rewards import checked, load_function
from pipeline.runtime import record as runtime
from pipeline.runtime.arguments import PreferencesArguments
from pipeline.text import data
from pipeline.text.tokenizer import answer_texts, load_tokenizer, prompt_ids, stop_ids
from reward_data.formats import answer_to


def main(args: PreferencesArguments) -> None:
    """Write train.jsonl and test.jsonl: pairs that people labelled, or the policy's answers labelled by a function."""
    human = args.labeller == "human"
    inputs = {"dataset": args.dataset} | ({} if human else {"model": args.model_name_or_path})
    stage = runtime.Stage(args, "preferences", inputs)
    if not stage.is_main:  # one process does it all: the pairs then do not depend on the number of processes
        return
    if human:
        splits = {
            split: data.load_preferences(args.dataset, split=split, seed=args.seed, size=size).to_list()
            for split, size in (("train", args.dataset_size), ("test", args.test_size))
        }
    else:
        splits = sample_and_label(args, stage)
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"preferences: no {split} pairs came out (all answers tied); sample more or hotter")
    stage.begin()
    for split, rows in splits.items():
        write_jsonl(stage.output_dir / f"{split}.jsonl", rows)
    metrics = {"pairs": len(splits["train"]), "test_pairs": len(splits["test"])}
    if not human:
        rows = splits["train"] + splits["test"]
        metrics["flip_rate"] = sum(row["flipped"] for row in rows) / len(rows)
        metrics["gold_mean"] = sum(row["chosen_score"] + row["rejected_score"] for row in rows) / (2 * len(rows))
    stage.finish(metrics)


def sample_and_label(args: PreferencesArguments, stage: runtime.Stage) -> dict[str, list[dict]]:
    """Sample answers of the policy and let the labeller choose within pairs of them, with Bradley-Terry noise."""
    label = load_function(args.labeller)
    tokenizer, policy = load_tokenizer(args.model_name_or_path), load_policy(args.model_name_or_path, stage.device)
    fit_embeddings(policy, tokenizer, args.model_name_or_path)
    generator = torch.Generator(stage.device).manual_seed(args.seed)
    coin = random.Random(args.seed)
    splits: dict[str, list[dict]] = {}
    plan = (("train", "preferences", args.dataset_size), ("test", "validation", args.test_size))
    with stage.progress(args.dataset_size + args.test_size, "preferences") as advance:
        for name, split, size in plan:
            columns = data.load_prompts(args.dataset, split=split, seed=args.seed, size=size).to_dict()
            prompts = columns.pop("prompt")
            rows = splits[name] = []
            group = max(1, args.batch_size // args.num_generations)
            for start in range(0, len(prompts), group):
                indices = [
                    i for i in range(start, min(start + group, len(prompts))) for _ in range(args.num_generations)
                ]
                batch = [prompts[i] for i in indices]
                with stage.dtype_autocast():
                    samples = generate(
                        policy,
                        prompt_ids(tokenizer, batch),
                        max_new_tokens=args.max_new_tokens,
                        temperature=args.temperature,
                        eos_token_id=stop_ids(policy, tokenizer),
                        pad_token_id=tokenizer.pad_token_id,
                        generator=generator,
                    )
                texts = answer_texts(tokenizer, samples.answers())
                answers = [answer_to(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
                beside = {name: [values[i] for i in indices] for name, values in columns.items()}
                scores = checked(f"labeller {args.labeller}", label, batch, answers, beside)
                rows += pair_up(batch, texts, scores, args.num_generations, args.label_beta, args.min_score_gap, coin)
                advance(len(batch) // args.num_generations)
    return splits


def pair_up(
    prompts: list,
    texts: list[str],
    scores: list[float],
    num_generations: int,
    beta: float,
    min_gap: float,
    coin: random.Random,
) -> list[dict]:
    """All pairs of answers to one prompt, as InstructGPT's labellers rank them (2203.02155, section 3.5).

    P(better is chosen) = σ(β·gap) (Bradley & Terry 1952); gaps up to `min_gap` are ties and dropped.
    `flipped` marks the pairs whose label went against the scores: held-out accuracy is counted with and without it.
    """
    rows = []
    for first in range(0, len(prompts), num_generations):
        for a, b in combinations(range(first, first + num_generations), 2):
            better, worse = (a, b) if scores[a] >= scores[b] else (b, a)
            gap = scores[better] - scores[worse]
            if gap <= min_gap or texts[better] == texts[worse]:
                continue
            flipped = coin.random() >= 1 / (1 + math.exp(-min(beta * gap, 700)))
            chosen, rejected = (worse, better) if flipped else (better, worse)
            rows.append(
                {
                    "prompt": prompts[a],
                    "chosen": answer_to(prompts[a], texts[chosen]),
                    "rejected": answer_to(prompts[a], texts[rejected]),
                    "chosen_score": scores[chosen],
                    "rejected_score": scores[rejected],
                    "flipped": flipped,
                }
            )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    runtime.run(main, PreferencesArguments)
