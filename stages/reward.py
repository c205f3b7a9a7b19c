"""Train the reward model with TRL: `python -m stages.reward --config configs/stories/reward.yaml`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardConfig, RewardTrainer

from pipeline.checkpoint import write_json
from pipeline.judging import wilson_interval
from pipeline.model.load import fit_embeddings, load_critic
from pipeline.rewards import RewardModel
from pipeline.runtime import hf_trainer, preview
from pipeline.runtime.arguments import RewardArguments, check_lora
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.runtime.sums import shares, total
from pipeline.runtime.trainer_budget import of_trainer
from pipeline.text import data
from pipeline.text.counts import counted
from pipeline.text.data import Loaded
from pipeline.text.lengths import check_positions, fit_rows
from pipeline.text.tokenizer import load_tokenizer, oddities, scored_ids
from reward_data.formats import text_of

CALIBRATION_BINS = 10
SIDES = ("chosen", "rejected")


def main(args: RewardArguments) -> None:
    """Fit r(prompt, answer) so that σ(r(chosen) − r(rejected)) is the share of people who chose it (Bradley-Terry)."""
    stage = Stage(args, "reward", {"model": args.model_name_or_path, "dataset": args.dataset})
    check_lora("reward", args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_critic(args.model_name_or_path).train()  # the trunk of the SFT model, a new head N(0, 1/(d+1))
    model.config.pad_token_id = tokenizer.pad_token_id
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    check_positions("reward", "max_length", args.max_length, model, args.model_name_or_path)
    trained = hf_trainer.with_lora(args, stage, model)
    loaded = {
        "train": data.load_preferences(args.dataset, split="train", seed=args.seed),
        "test": data.load_preferences(args.dataset, split="test", seed=args.seed),
    }
    training, held_out = (prepare(args, tokenizer, part, f"{name} pairs") for name, part in loaded.items())
    held_out.view.notes += data.repeated_prompts(loaded, "pairs")
    views, told = [training.view, held_out.view], "both sides are read whole"
    if args.show:
        return preview.show(stage, views, told, tokenizer, "the score is read at the token between")
    preview.say(stage, views, told)

    trainer = build_trainer(args, stage, trained, tokenizer, training.tokens, held_out.tokens)
    if args.dry_run:
        return of_trainer(stage, trainer, head=False)
    hf_trainer.train(trainer, hf_trainer.StageCallback(stage))
    hf_trainer.save_model(trainer, stage)
    if not stage.is_main:
        return
    rows, reward = training.rows, RewardModel(args.output_dir, stage.device, args.mixed_precision)
    centering = rows.select(range(min(rows.num_rows, max(1, args.center_samples // 2))))
    metrics = accuracies(reward, held_out.rows, stage.output_dir) | center(reward, centering, stage.output_dir)
    stage.say(accuracy_sentence(metrics))
    stage.finish({**metrics, "pairs": rows.num_rows})


@dataclass
class Prepared:
    """A split's pairs that are used: as they were read, and as the trainer takes them."""

    rows: Dataset
    tokens: Dataset
    """Columns `chosen_ids` and `rejected_ids`, lists of int: the very ids that RewardModel scores."""
    view: preview.View


def prepare(args: RewardArguments, tokenizer: PreTrainedTokenizerBase, loaded: Loaded, what: str) -> Prepared:
    """Pairs as tokens, held against max_length. Raises UserError for a row that cannot be rendered, and as
    lengths.fit_rows does."""
    prompts, answers = loaded.rows["prompt"][:], {side: loaded.rows[side][:] for side in SIDES}
    sides = {side: scored_ids(tokenizer, prompts, answers[side], loaded.places) for side in SIDES}
    lengths = [max(map(len, pair)) for pair in zip(*sides.values(), strict=True)]
    ends = tokenizer.eos_token or ""
    rows = zip(prompts, *answers.values(), strict=True)
    texts = ["\n".join(text_of(text).removesuffix(ends) for text in row) for row in rows]
    both = [chosen + rejected for chosen, rejected in zip(*sides.values(), strict=True)]
    notes = [*loaded.notes, *oddities(tokenizer, texts, both, loaded.places, what)]
    fit = fit_rows("reward", what, lengths, args.max_length, loaded.places, args.overlong)

    def parts(number: int) -> list[preview.Part]:
        rows = {side: ids[number] for side, ids in sides.items()}
        return [
            preview.Part(f"{side}: {counted(len(ids), 'tokens')}", ids, [False] * (len(ids) - 1) + [True])
            for side, ids in rows.items()
        ]

    tokens = Dataset.from_dict({f"{side}_ids": [ids[i] for i in fit.kept] for side, ids in sides.items()})
    return Prepared(loaded.rows.select(fit.kept), tokens, preview.View(fit, loaded.places, parts, notes))


class ExactRewardTrainer(RewardTrainer):
    """TRL's trainer, with figures over all pairs, the same on any number of processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logits: list[torch.Tensor] = []
        """Rewards (2, B) of chosen and rejected answers in each forward pass since the last line of metrics."""

    def evaluation_loop(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> EvalLoopOutput:
        """Loss, accuracy, margin and rewards of all pairs of eval_dataset."""
        model, held_out = cast(Any, self.model).eval(), cast(Dataset, self.eval_dataset)
        logits = []
        for rows, counts in shares(held_out, self.args):
            inputs = self._prepare_inputs(self.data_collator(rows))
            with torch.no_grad():
                pairs = model(**inputs, use_cache=False).logits.view(2, -1)
            if counts:
                logits.append(pairs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._figures(logits).items()}
        return EvalLoopOutput((np.empty(0),), label_ids=None, metrics=metrics, num_samples=len(held_out))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss as TRL computes it; notes the rewards."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.logits.append(outputs.logits.detach().view(2, -1))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's line, its means of forward passes replaced by those of pairs."""
        if cast(Any, self.model).training and self.logits:
            figures = self._figures(self.logits)
            self._metrics["train"].clear()
            self._metrics["train"] |= {name: [value] for name, value in figures.items() if name != "loss"}
            self.logits = []
        super().log(logs, *args, **kwargs)

    def _figures(self, logits: list[torch.Tensor]) -> dict[str, float]:
        """Means over the pairs of all processes, of which this one has `logits`; equal rewards count as wrong."""
        pairs = torch.cat([torch.zeros(2, 0, device=self.args.device), *logits], dim=1).double()
        margins = pairs[0] - pairs[1]
        parts = F.softplus(-margins), margins > 0, margins, pairs.mean(0), torch.ones_like(margins)
        sums = torch.stack([part.double().sum() for part in parts])
        loss, right, margin, reward, count = total(self.accelerator, sums)
        named = {"loss": loss, "accuracy": right, "margin": margin, "mean_reward": reward}
        return {name: figure / count for name, figure in named.items()}


def build_trainer(
    args: RewardArguments,
    stage: Stage,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    held_out: Dataset,
) -> ExactRewardTrainer:
    """The trainer for rows of `chosen_ids` and `rejected_ids`."""
    return ExactRewardTrainer(
        model=model,
        args=RewardConfig(**hf_trainer.training_kwargs(args, stage), max_length=None),  # the rows fit already
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=hf_trainer.optimizer_kwargs(args),
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
    if high < 0.5:
        return f"warning: {said}: worse than guessing; see whether chosen and rejected are exchanged"
    return (
        f"warning: {said}: this cannot be told from guessing; give more held-out pairs, or see whether the labels fit "
        "the answers"
    )


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
