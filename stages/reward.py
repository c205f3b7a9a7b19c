"""Train the reward model with TRL: `python -m stages.reward --config configs/stories/reward.yaml`."""

import json

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from pipeline.checkpoint import write_json
from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_critic
from pipeline.rewards import RewardModel
from pipeline.runtime import record as runtime
from pipeline.runtime.arguments import RewardArguments
from pipeline.runtime.hf_trainer import StageCallback, attach, optimizer_kwargs, save_model, train, training_kwargs
from pipeline.text import data
from pipeline.text.tokenizer import check_template, load_tokenizer

CALIBRATION_BINS = 10


def main(args: RewardArguments) -> None:
    """Fit r(prompt, answer) so that σ(r(chosen) − r(rejected)) is the share of people who chose it (Bradley-Terry)."""
    stage = runtime.Stage(args, "reward", {"model": args.model_name_or_path, "dataset": args.dataset})
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_critic(args.model_name_or_path).train()  # the trunk of the SFT model, a new head N(0, 1/(d+1))
    model.config.pad_token_id = tokenizer.pad_token_id
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    rows = data.load_preferences(args.dataset, split="train", seed=args.seed, size=None)
    held_out = data.load_preferences(args.dataset, split="test", seed=args.seed, size=None)
    check_lengths(args, tokenizer, {"train": rows, "test": held_out})

    config = RewardConfig(**training_kwargs(args, stage), max_length=args.max_length)
    names = ["prompt", "chosen", "rejected"]  # the scores that made the labels stay out of sight
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=rows.select_columns(names),
        eval_dataset=held_out.select_columns(names),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_kwargs(args),
    )
    attach(trainer, StageCallback(stage))
    train(trainer, stage)
    save_model(trainer, stage)
    if not stage.is_main:
        return
    center(args, stage, rows)
    stage.finish({**judge(args, stage, held_out), "pairs": rows.num_rows})


def check_lengths(args: RewardArguments, tokenizer: object, splits: dict[str, Dataset]) -> None:
    """Refuse pairs longer than max_length, which RewardTrainer would drop without a word."""
    for split, rows in splits.items():
        if isinstance(rows[0]["prompt"], list):
            check_template(tokenizer)
        for side in ("chosen", "rejected"):
            for first in range(0, rows.num_rows, 1000):
                part = rows[first : first + 1000]
                chats = [
                    tokenizer.apply_chat_template(p + a, tokenize=False) if isinstance(p, list) else p + a
                    for p, a in zip(part["prompt"], part[side], strict=True)
                ]
                for i, ids in enumerate(tokenizer(chats, add_special_tokens=False)["input_ids"]):
                    if len(ids) >= args.max_length:
                        raise UserError(
                            f"reward: row {first + i + 1} of {args.dataset} ({split}, {side}) has {len(ids)} tokens, "
                            f"more than max_length {args.max_length} allows; raise max_length or shorten the row"
                        )


def center(args: RewardArguments, stage: runtime.Stage, rows: Dataset) -> None:
    """Store mean and spread of the reward over answers of the training pairs: there the score is 0 ± 1 (N+ details)."""
    part = rows.select(range(min(rows.num_rows, max(1, args.center_samples // 2))))
    rewards = torch.tensor(_score(args, stage, part, "chosen") + _score(args, stage, part, "rejected"))
    file = stage.output_dir / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"reward_mean": rewards.mean().item(), "reward_std": max(rewards.std().item(), 1e-6)}
    write_json(file, config)


def judge(args: RewardArguments, stage: runtime.Stage, held_out: Dataset) -> dict[str, float]:
    """Accuracy on held-out pairs, against the labels as they are and with the noise taken back, and the calibration."""
    chosen, rejected = (torch.tensor(_score(args, stage, held_out, side)) for side in ("chosen", "rejected"))
    config = json.loads((stage.output_dir / "config.json").read_text(encoding="utf-8"))
    margins = (chosen - rejected) * config["reward_std"]  # back to log-odds
    flipped = torch.tensor(held_out["flipped"] if "flipped" in held_out.column_names else [False] * len(margins))
    write_json(stage.output_dir / "calibration.json", calibration(margins))
    return {
        "accuracy": ((margins > 0) != flipped).float().mean().item(),
        "noisy_accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "reward_mean": config["reward_mean"],
        "reward_std": config["reward_std"],
    }


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


def _score(args: RewardArguments, stage: runtime.Stage, rows: Dataset, side: str) -> list[float]:
    model = RewardModel(str(stage.output_dir), device=stage.device)
    with stage.dtype_autocast():
        return model(rows["prompt"][:], rows[side][:])


if __name__ == "__main__":
    runtime.run(main, RewardArguments)
