"""Make preference pairs: `python -m stages.preferences --config configs/stories/preferences.yaml`."""

import math
import random
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from pipeline.checkpoint import write_jsonl
from pipeline.errors import UserError
from pipeline.judging import Answers, Policy, answer
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.ppo.rollout import seeded
from pipeline.rewards import RewardFunction, checked, load_function, readers_of
from pipeline.runtime import budget, preview
from pipeline.runtime.arguments import PreferencesArguments
from pipeline.runtime.console import run
from pipeline.runtime.parts import Parts
from pipeline.runtime.record import Stage
from pipeline.runtime.sampling_budget import of_sampling
from pipeline.text import data
from pipeline.text.tokenizer import load_tokenizer
from reward_data.formats import answer_to, text_of

PAIR = ("prompt", "chosen", "rejected")


def main(args: PreferencesArguments) -> None:
    """Write train.jsonl and test.jsonl: pairs that people labelled, or the policy's answers labelled by a function."""
    human = args.labeller == "human"
    if not human and args.num_generations < 2:
        raise UserError("num_generations: of one answer to a prompt no pair can be made; set it to 2 or more")
    stage = Stage(args, "preferences", {"dataset": args.dataset, "model": None if human else args.model_name_or_path})
    if not stage.is_main:  # one process does it all: the pairs then do not depend on the number of processes
        return
    splits = labelled_by_people(args, stage) if human else sample_and_label(args, stage)
    if args.show or args.dry_run:
        return
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"preferences: no {split} pairs came out (all answers tied); sample more or hotter")
    stage.begin()
    write_pairs(stage.output_dir, splits)
    stage.table("pairs", [{name: text_of(row[name]) for name in PAIR} for row in splits["train"]])
    metrics: dict[str, float] = {"pairs": len(splits["train"]), "test_pairs": len(splits["test"])}
    if not human:
        rows = splits["train"] + splits["test"]
        metrics["flip_rate"] = sum(row["flipped"] for row in rows) / len(rows)
        metrics["gold_mean"] = sum(row["chosen_score"] + row["rejected_score"] for row in rows) / (2 * len(rows))
    stage.finish(metrics)


def labelled_by_people(args: PreferencesArguments, stage: Stage) -> dict[str, list[dict]]:
    """The data set's own pairs, as train and test."""
    splits = {
        "train": data.load_preferences(args.dataset, split="train", seed=args.seed, size=args.dataset_size),
        "test": data.load_preferences(args.dataset, split="test", seed=args.seed, size=args.test_size),
    }
    preview.of_texts(stage, splits, "pairs")
    if args.dry_run:
        budget.of_reading(stage, "the pairs are copied, no answer is sampled")
    return {name: loaded.rows.to_list() for name, loaded in splits.items()}


def write_pairs(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Write train.jsonl and test.jsonl. Stopped anywhere in here, train.jsonl is not there, or both are of one run."""
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl.partial", rows)
    (folder / "train.jsonl").unlink(missing_ok=True)
    for split in ("test", "train"):
        (folder / f"{split}.jsonl.partial").replace(folder / f"{split}.jsonl")


def sample_and_label(args: PreferencesArguments, stage: Stage) -> dict[str, list[dict]]:
    """Sample answers of the policy and let the labeller choose within pairs of them, with Bradley-Terry noise."""
    label = load_function(args.labeller)
    policy = Policy(load_policy(args.model_name_or_path, stage.device), load_tokenizer(args.model_name_or_path))
    fit_embeddings(policy.model, policy.tokenizer, args.model_name_or_path)
    coin = random.Random(args.seed)
    at_once = max(1, args.batch_size // args.num_generations)  # prompts
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    loaded = {
        "train": data.load_prompts(args.dataset, split="preferences", seed=args.seed, size=args.dataset_size),
        "test": data.load_prompts(args.dataset, split="validation", seed=args.seed, size=args.test_size),
    }
    readers = [policy.reader(f"the policy {args.model_name_or_path}"), *readers_of(label)]
    room = "max_new_tokens", args.max_new_tokens
    prompts = preview.open_prompts(stage, loaded, readers, policy.tokenizer, policy.stops, room, args.overlong)
    if args.show:
        return {}
    if args.dry_run:
        say_budget(args, stage, policy, label, prompts)
        return {}
    total = sum(map(len, prompts.values()))
    parts = Parts(stage, total, "prompts")
    with stage.progress(total, "preferences") as advance:
        for number, (name, rows) in enumerate(prompts.items()):
            for start in range(0, len(rows), at_once):
                some = range(start, min(start + at_once, len(rows)))
                generator = seeded(args.seed, number, start)  # so that no part depends on those before it
                make = partial(ask, args, stage, policy, label, rows, some, generator)
                for prompt, scored in parts.get(make, len(some)):
                    splits[name] += pair_up(prompt, scored, args.label_beta, args.min_score_gap, coin)
                advance(len(some))
    return splits


def say_budget(
    args: PreferencesArguments, stage: Stage, policy: Policy, label: RewardFunction, prompts: dict[str, Dataset]
) -> None:
    """Print what sampling and labelling take."""
    rows = prompts["train"]

    def asked(count: int) -> int:
        chosen = [number % len(rows) for number in range(count)]
        return sum(map(len, ask_for(args, stage, policy, label, rows, chosen, seeded(args.seed))[0].response_ids))

    ids = [row for part in prompts.values() for row in policy.encode(part["prompt"][:])]
    of_sampling(stage, [policy.model], ids, args.num_generations * len(ids), asked)


def ask(
    args: PreferencesArguments,
    stage: Stage,
    policy: Policy,
    label: RewardFunction,
    rows: Dataset,
    some: range,
    generator: torch.Generator,
) -> list[tuple[Any, list[tuple[Any, float]]]]:
    """Each prompt of the rows `some` with its answers, each with the labeller's score."""
    n = args.num_generations
    answers, scored = ask_for(args, stage, policy, label, rows, [i for i in some for _ in range(n)], generator)
    return [(answers.prompts[i], scored[i : i + n]) for i in range(0, len(scored), n)]


def ask_for(
    args: PreferencesArguments,
    stage: Stage,
    policy: Policy,
    label: RewardFunction,
    rows: Dataset,
    numbers: list[int],
    generator: torch.Generator,
) -> tuple[Answers, list[tuple[Any, float]]]:
    """An answer to the prompt of each row in `numbers`; and each answer in the prompt's own form, with its score."""
    columns = rows.select(numbers).to_dict()
    with stage.dtype_autocast():
        answers = answer(
            policy,
            columns.pop("prompt"),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=len(numbers),
            generator=generator,
        )
    completions = [answer_to(*pair) for pair in zip(answers.prompts, answers.texts, strict=True)]
    scores = checked(f"labeller {args.labeller}", label, answers.prompts, completions, columns)
    return answers, list(zip(completions, scores, strict=True))


def pair_up(
    prompt: Any, answers: list[tuple[Any, float]], beta: float, min_gap: float, coin: random.Random
) -> list[dict]:
    """All pairs of answers to one prompt, as InstructGPT's labellers rank them (2203.02155, section 3.5).

    `answers` are (answer, score). P(better is chosen) = σ(β·gap) (Bradley & Terry 1952); gaps up to `min_gap` are ties
    and dropped. `flipped` marks the pairs whose label went against the scores: held-out accuracy is counted with and
    without it.
    """
    rows = []
    for pair in combinations(answers, 2):
        better, worse = sorted(pair, key=lambda scored: -scored[1])
        gap = better[1] - worse[1]
        if gap <= min_gap or better[0] == worse[0]:
            continue
        flipped = coin.random() >= 1 / (1 + math.exp(-min(beta * gap, 700)))
        chosen, rejected = (worse, better) if flipped else (better, worse)
        row = {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}
        rows.append({**row, "chosen_score": chosen[1], "rejected_score": rejected[1], "flipped": flipped})
    return rows


if __name__ == "__main__":
    run(main, PreferencesArguments)
