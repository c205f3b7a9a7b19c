"""Train the reward model with TRL: `python -m stages.reward --config configs/stories/reward.yaml`."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from pipeline.checkpoint import write_json
from pipeline.errors import UserError
from pipeline.judging import wilson_interval
from pipeline.model.load import fit_embeddings, load_critic
from pipeline.rewards import RewardModel
from pipeline.runtime import hf_trainer
from pipeline.runtime.arguments import RewardArguments
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.text import data
from pipeline.text.tokenizer import check_template, load_tokenizer

CALIBRATION_BINS = 10


def main(args: RewardArguments) -> None:
    """Fit r(prompt, answer) so that σ(r(chosen) − r(rejected)) is the share of people who chose it (Bradley-Terry)."""
    stage = Stage(args, "reward", {"model": args.model_name_or_path, "dataset": args.dataset})
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_critic(args.model_name_or_path).train()  # the trunk of the SFT model, a new head N(0, 1/(d+1))
    model.config.pad_token_id = tokenizer.pad_token_id
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    rows = data.load_preferences(args.dataset, split="train", seed=args.seed, size=None).rows
    held_out = data.load_preferences(args.dataset, split="test", seed=args.seed, size=None).rows
    check_lengths(args, tokenizer, {"train": rows, "test": held_out})

    names = ["prompt", "chosen", "rejected"]  # the scores that made the labels stay out of sight
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**hf_trainer.training_kwargs(args, stage), max_length=args.max_length),
        train_dataset=rows.select_columns(names),
        eval_dataset=held_out.select_columns(names),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=hf_trainer.optimizer_kwargs(args),
    )
    hf_trainer.train(trainer, hf_trainer.StageCallback(stage))
    hf_trainer.save_model(trainer, stage)
    if not stage.is_main:
        return
    reward = RewardModel(args.output_dir, stage.device, args.mixed_precision)
    centering = rows.select(range(min(rows.num_rows, max(1, args.center_samples // 2))))
    metrics = accuracies(reward, held_out, stage.output_dir) | center(reward, centering, stage.output_dir)
    stage.say(accuracy_sentence(metrics))
    stage.finish({**metrics, "pairs": rows.num_rows})


def check_lengths(args: RewardArguments, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]) -> None:
    """Refuse pairs longer than max_length, which RewardTrainer would drop without a word."""
    for split, rows in splits.items():
        if isinstance(rows[0]["prompt"], list):
            check_template(tokenizer)
        for i, row in enumerate(rows):
            for side in ("chosen", "rejected"):
                whole = row["prompt"] + row[side]
                text = whole if isinstance(whole, str) else tokenizer.apply_chat_template(whole, tokenize=False)
                length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                if length >= args.max_length:
                    raise UserError(
                        f"reward: row {i + 1} of {args.dataset} ({split}, {side}) has {length} tokens, "
                        f"more than max_length {args.max_length} allows; raise max_length or shorten the row"
                    )


def rewards_of(reward: RewardModel, rows: Dataset) -> dict[str, torch.Tensor]:
    """Rewards of both answers to each prompt: `chosen` and `rejected`, (N,) fp32."""
    return {side: torch.tensor(reward(rows["prompt"][:], rows[side][:])) for side in ("chosen", "rejected")}


def center(reward: RewardModel, rows: Dataset, folder: Path) -> dict[str, float]:
    """Store mean and spread of the reward over answers of the training pairs: there the score is 0 ± 1 (N+ details)."""
    rewards = torch.cat(list(rewards_of(reward, rows).values()))
    figures = {"reward_mean": rewards.mean().item(), "reward_std": max(rewards.std().item(), 1e-6)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | figures)
    return figures


def accuracies(reward: RewardModel, held_out: Dataset, folder: Path) -> dict[str, Any]:
    """Accuracy on held-out pairs, against the labels as they are and with the noise taken back, and the calibration."""
    rewards = rewards_of(reward, held_out)
    margins = rewards["chosen"] - rewards["rejected"]  # log-odds
    flipped = torch.tensor(held_out["flipped"] if "flipped" in held_out.column_names else [False] * len(margins))
    write_json(folder / "calibration.json", calibration(margins))
    accuracy = ((margins > 0) != flipped).float().mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_ci95": list(wilson_interval(accuracy, len(margins))),
        "accuracy_n": len(margins),
        "noisy_accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
    }


def accuracy_sentence(metrics: dict[str, Any]) -> str:
    """The held-out accuracy with its interval, and a warning where guessing would do as well."""
    low, high = metrics["accuracy_ci95"]
    said = (
        f"held-out accuracy {metrics['accuracy']:.3f}, 95% interval {low:.3f} to {high:.3f}, n {metrics['accuracy_n']}"
    )
    if low > 0.5:
        return said
    return f"warning: {said}: no better than guessing; see whether the labels fit the answers, or give more pairs"


def calibration(margins: torch.Tensor) -> dict[str, list]:
    """Reliability diagram: predicted σ(|margin|) in bins against the share of pairs in which the prediction was right.

    margins (N,): r(chosen) − r(rejected) on held-out pairs, in nats.
    """
    predicted, right = torch.sigmoid(margins.abs()), (margins > 0).float()
    edges = torch.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    which = torch.bucketize(predicted, edges[1:-1])
    bins = []
    for b in range(CALIBRATION_BINS):
        inside = which == b
        if n := int(inside.sum()):
            bins.append({"predicted": predicted[inside].mean().item(), "observed": right[inside].mean().item(), "n": n})
    return {"bins": bins, "margins": [round(m, 4) for m in margins.tolist()]}


if __name__ == "__main__":
    run(main, RewardArguments)
