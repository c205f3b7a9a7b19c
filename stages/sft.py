"""Supervised fine-tuning with TRL: `python -m stages.sft --config configs/stories/sft.yaml`."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from pipeline.model.load import fit_embeddings, load_policy
from pipeline.runtime import hf_trainer, preview
from pipeline.runtime.arguments import SFTArguments, check_lora
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.runtime.sums import shares, total
from pipeline.runtime.trainer_budget import of_trainer
from pipeline.text import data
from pipeline.text.counts import counted
from pipeline.text.data import Loaded
from pipeline.text.lengths import check_positions, fit_rows
from pipeline.text.packing import IGNORED
from pipeline.text.tokenizer import (
    END_OF_TURN,
    answered_ids,
    is_chat,
    load_tokenizer,
    oddities,
    stop_ids,
    turn_end,
    with_pad_token,
)
from reward_data.formats import text_of

# TRL's output layer leaves out what is not trained on only where it has Triton, as other devices may have to compile
# anew for each number of places. A CPU has not: a step takes 0.8 to 0.9 of the time (LOG.md), its numbers are the same.
_has_triton = trl_utils._use_triton
trl_utils._use_triton = lambda device: device.type == "cpu" or _has_triton(device)


def main(args: SFTArguments) -> None:
    """Teach the model to answer: the loss is on the tokens of the answer and of its end, not on the prompt."""
    stage = Stage(args, "sft", {"model": args.model_name_or_path, "dataset": args.dataset})
    check_lora("sft", args)
    tokenizer, model = load_tokenizer(args.model_name_or_path), load_policy(args.model_name_or_path).train()
    check_positions("sft", "max_length", args.max_length, model, args.model_name_or_path)
    loaded = {
        "training": data.load_instructions(args.dataset, split="train", seed=args.seed, size=args.dataset_size),
        "held-out": data.load_instructions(args.dataset, split="validation", seed=args.seed, size=args.validation_size),
    }
    ends = set_ends(model, tokenizer, chat=is_chat(loaded["training"].rows))
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    trained = hf_trainer.with_lora(args, stage, model)
    training, held_out = (prepare(args, tokenizer, part, f"{name} rows") for name, part in loaded.items())
    held_out.view.notes += data.repeated_prompts(loaded, "rows")
    views, told = [training.view, held_out.view], preview.ends_told(tokenizer, ends)
    if args.show:
        return preview.show(stage, views, told, tokenizer, "trained on is what stands between")
    preview.say(stage, views, told)

    trainer = build_trainer(args, stage, trained, tokenizer, training.rows, held_out.rows)
    if args.dry_run:
        return of_trainer(stage, trainer)
    hf_trainer.train(trainer, hf_trainer.StageCallback(stage))
    eval_loss = trainer.evaluate()["eval_loss"]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    hf_trainer.save_model(trainer, stage)
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    metrics = {"eval_loss": eval_loss, "eval_loss_before": evaluations[0], "rows": training.rows.num_rows}
    stage.finish(metrics, tokens=int(trainer.state.num_input_tokens_seen) or None)


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Ids that end an answer, the one that is trained on first; it becomes the tokenizer's end token.

    That is the token after an assistant's turn in the chat template; for plain text, and where the template has none,
    the tokenizer's end token, of our own tokenizers `<|end|>`. What ended the model's texts before goes on doing so.
    """
    before = stop_ids(model, tokenizer, chat=False)
    own = tokenizer.get_vocab().get(END_OF_TURN)
    end = turn_end(tokenizer) if chat else own
    end = tokenizer.eos_token_id if end is None else end
    ends = [token for token in dict.fromkeys((end, *before, tokenizer.eos_token_id)) if token is not None]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    with_pad_token(tokenizer)
    return ends


@dataclass
class Prepared:
    """A split as the trainer takes it: `input_ids` and `labels`, lists of int, of the rows that are used."""

    rows: Dataset
    view: preview.View


def prepare(args: SFTArguments, tokenizer: PreTrainedTokenizerBase, loaded: Loaded, what: str) -> Prepared:
    """Rows as tokens, the labels of the prompt ignored, held against max_length. Raises UserError for a row that cannot
    be rendered, and as lengths.fit_rows does."""
    answered = answered_ids(tokenizer, loaded.rows["prompt"][:], loaded.rows["completion"][:], loaded.places)
    lengths, starts = [len(row.ids) for row in answered], [row.start for row in answered]
    fit = fit_rows("sft", what, lengths, args.max_length, loaded.places, args.overlong, starts)
    ids = [answered[i].ids[: args.max_length] for i in fit.kept]
    labels = [[IGNORED] * start + row[start:] for start, row in zip((starts[i] for i in fit.kept), ids, strict=True)]
    notes = [*loaded.notes, *notes_on(tokenizer, answered, loaded, what)]

    def parts(number: int) -> list[preview.Part]:
        row, start = answered[number].ids[: args.max_length], starts[number]
        cut = f", cut from {lengths[number]:,}" if lengths[number] > len(row) else ""
        heading = f"{counted(len(row), 'tokens')}{cut}, {len(row) - start:,} of them trained on"
        return [preview.Part(heading, row, [i >= start for i in range(len(row))])]

    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return Prepared(rows, preview.View(fit, loaded.places, parts, notes))


def notes_on(tokenizer: PreTrainedTokenizerBase, answered: list[Any], loaded: Loaded, what: str) -> list[str]:
    """What is odd about the rows as tokens."""
    notes = []
    if is_chat(loaded.rows) and turn_end(tokenizer) is None:
        notes.append(
            f"the chat template puts no token of its own after an answer: {tokenizer.eos_token} is put there, which "
            "ends answers from now on"
        )
    if unlike := [place for row, place in zip(answered, loaded.places, strict=True) if not row.as_sampled]:
        notes.append(
            f"in {len(unlike):,} of {counted(len(answered), what)} (first: {unlike[0]}) the prompt's last tokens are "
            "others than those that answers are sampled after; let prompts end, and answers begin, where a token does"
        )
    end = tokenizer.eos_token or ""
    rows = zip(loaded.rows["prompt"][:], loaded.rows["completion"][:], strict=True)
    texts = [f"{text_of(prompt)}\n{text_of(completion).removesuffix(end)}" for prompt, completion in rows]
    return notes + oddities(tokenizer, texts, [row.ids for row in answered], loaded.places, what)


class ExactSFTTrainer(SFTTrainer):
    """TRL's trainer, with figures that are means over tokens, the same on any number of processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.predicted: list[int] = []
        """Tokens that were trained on in each forward pass since the last line of metrics, over all processes."""

    def evaluation_loop(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> EvalLoopOutput:
        """Mean nats and accuracy of all trained tokens of eval_dataset."""
        model, held_out = cast(Any, self.model).eval(), cast(Dataset, self.eval_dataset)
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for rows, counts in shares(held_out, self.args):
            inputs = self._prepare_inputs(self.data_collator(rows))
            with torch.no_grad():
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            if counts:
                figures = -outputs.log_probs.double().sum(), outputs.is_top1.sum(), outputs.label_mask.sum()
                sums += torch.stack([figure.double() for figure in figures])
        nats, right, tokens = total(self.accelerator, sums)
        metrics = {"loss": nats / tokens, "mean_token_accuracy": right / tokens}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput((np.empty(0),), label_ids=None, metrics=named, num_samples=len(held_out))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss as TRL computes it; notes by how many tokens."""
        predicted = (inputs["labels"][:, 1:] != IGNORED).sum()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.predicted.append(int(self.accelerator.gather(predicted).sum()))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's line, its means of forward passes weighted by their tokens."""
        if cast(Any, self.model).training and self.predicted:
            for name in ("entropy", "mean_token_accuracy"):
                means = self._metrics["train"][name]
                weighted = sum(mean * count for mean, count in zip(means, self.predicted, strict=True))
                self._metrics["train"][name] = [weighted / max(1, sum(self.predicted))]
            self.predicted = []
        super().log(logs, *args, **kwargs)


def build_trainer(
    args: SFTArguments,
    stage: Stage,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    held_out: Dataset,
) -> ExactSFTTrainer:
    """The trainer for rows of `input_ids` and `labels`."""
    config = SFTConfig(
        **hf_trainer.training_kwargs(args, stage),
        max_length=None,  # the rows are cut already
        packing=False,
        completion_only_loss=False,  # the labels say it already
        dataset_num_proc=None,
        include_num_input_tokens_seen="non_padding",
        # Not by trainer.evaluate() before train(): the Trainer then takes the model as prepared, never wraps it in
        # DistributedDataParallel, and two processes train two models.
        eval_on_start=stage.resume_from is None,
    )
    return ExactSFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=hf_trainer.optimizer_kwargs(args),
    )


if __name__ == "__main__":
    run(main, SFTArguments)
