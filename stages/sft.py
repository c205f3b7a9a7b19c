"""Supervised fine-tuning with TRL: `python -m stages.sft --config configs/stories/sft.yaml`."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.runtime import hf_trainer
from pipeline.runtime.arguments import SFTArguments
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.text import data
from pipeline.text.tokenizer import END_OF_TURN, check_template, load_tokenizer


def main(args: SFTArguments) -> None:
    """Teach the model to answer: the loss is on the tokens of the answer and of its end, not on the prompt."""
    stage = Stage(args, "sft", {"model": args.model_name_or_path, "dataset": args.dataset})
    tokenizer, model = load_tokenizer(args.model_name_or_path), load_policy(args.model_name_or_path).train()
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    rows = data.load_instructions(args.dataset, split="train", seed=args.seed, size=args.dataset_size).rows
    held_out = data.load_instructions(args.dataset, split="validation", seed=args.seed, size=args.validation_size).rows
    trainer = build_trainer(args, stage, model, tokenizer, rows, held_out)
    kept = check_kept(args, stage, trainer, {"training": rows.num_rows, "held-out": held_out.num_rows})

    hf_trainer.train(trainer, hf_trainer.StageCallback(stage))
    eval_loss = trainer.evaluate()["eval_loss"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]  # an answer ends where the turn does
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    hf_trainer.save_model(trainer, stage)
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    metrics = {"eval_loss": eval_loss, "eval_loss_before": evaluations[0], "rows": kept}
    stage.finish(metrics, tokens=int(trainer.state.num_input_tokens_seen) or None)


def build_trainer(
    args: SFTArguments,
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    held_out: Dataset,
) -> SFTTrainer:
    """SFTTrainer with the loss on the answer alone, for `messages` as for `prompt` and `completion`."""
    chat = "messages" in rows.column_names
    if chat or isinstance(rows[0]["prompt"], list):
        check_template(tokenizer)
    if END_OF_TURN in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TURN
    config = SFTConfig(
        **hf_trainer.training_kwargs(args, stage),
        max_length=args.max_length,
        packing=False,
        assistant_only_loss=chat,
        completion_only_loss=not chat,
        dataset_num_proc=None,
        include_num_input_tokens_seen=True,
        # Not by trainer.evaluate() before train(): the Trainer then takes the model as prepared, never wraps it in
        # DistributedDataParallel, and two processes train two models.
        eval_on_start=stage.resume_from is None,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=hf_trainer.optimizer_kwargs(args),
    )


def check_kept(args: SFTArguments, stage: Stage, trainer: SFTTrainer, given: dict[str, int]) -> int:
    """Say how many rows TRL left out, as nothing of the answer is within max_length; UserError if none is left.

    Returns the number of training rows that are learned from.
    """
    kept: dict[str, Any] = {"training": trainer.train_dataset, "held-out": trainer.eval_dataset}
    limit = f"max_length {args.max_length}"
    for name, rows in given.items():
        left_out = rows - len(kept[name])
        if left_out == rows:
            raise UserError(
                f"sft: of none of the {rows} {name} rows the answer begins within {limit} tokens; raise max_length"
            )
        if left_out:
            stage.say(f"{left_out} of {rows} {name} rows are left out: their answers begin beyond {limit}")
    return len(kept["training"])


if __name__ == "__main__":
    run(main, SFTArguments)
