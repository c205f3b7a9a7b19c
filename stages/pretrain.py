"""Pretrain a GPT from random weights: `python -m stages.pretrain --config configs/stories/pretrain.yaml`."""

import math
from functools import partial

import torch
from transformers import Qwen3Config, Trainer, TrainingArguments

from pipeline import data, runtime
from pipeline.arguments import PretrainArguments
from pipeline.bigram import BigramLanguageModel, bits_per_byte
from pipeline.errors import UserError
from pipeline.gpt import GPTForCausalLM
from pipeline.hf_trainer import StageCallback, attach, optimizer_kwargs, save_model, train, training_kwargs
from pipeline.models import load_policy, parameter_count
from pipeline.tokenizer import check_fits, load_tokenizer


def main(args: PretrainArguments) -> None:
    """Pack documents into rows, train on next tokens, report held-out bits per byte beside a bigram's."""
    inputs = {"tokenizer": args.tokenizer_name_or_path, "model": args.model_name_or_path,
              "dataset": args.dataset}  # fmt: skip
    stage = runtime.Stage(args, "pretrain", inputs)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path)
    model = build_model(args, tokenizer)
    training = _pack(args, tokenizer, "train", args.max_bytes)
    validation = _pack(args, tokenizer, "validation", args.validation_bytes)
    rows, held_out = training.blocks, validation.blocks
    # The mean loss of a token, over all tokens of the text and its bytes.
    to_bpb = partial(bits_per_byte, tokens=validation.tokens, text_bytes=validation.bytes)

    def translate(row: dict) -> dict:
        if "eval_loss" not in row:
            return row
        return {"val_loss": row["eval_loss"], "val_bpb": to_bpb(row["eval_loss"])}

    trainer = Trainer(
        model=model, args=TrainingArguments(**training_kwargs(args, stage)), train_dataset=rows, eval_dataset=held_out,
        data_collator=_collate, optimizer_cls_and_kwargs=optimizer_kwargs(args),
    )  # fmt: skip
    tokens_per_step = _tokens_per_step(args, trainer.args.world_size)
    callback = StageCallback(stage, tokens_per_step, translate)
    stage.say(f"{parameter_count(model):,} parameters, {training.tokens:,} training tokens")
    attach(trainer, callback)
    train(trainer, stage)

    val_loss = trainer.evaluate()["eval_loss"]
    save_model(trainer, stage)
    if stage.is_main:
        tokenizer.save_pretrained(stage.output_dir)
    bigram = BigramLanguageModel(len(tokenizer))
    bigram.fit(rows.with_format("torch")["input_ids"][:])
    metrics = {
        "val_loss": val_loss,
        "val_bpb": to_bpb(val_loss),
        "bigram_bpb": to_bpb(bigram.loss(held_out.with_format("torch")["input_ids"][:])),
        "uniform_bpb": to_bpb(math.log(len(tokenizer))),
        "tokens_per_s": callback.tokens_per_second,
        "parameters": parameter_count(model),
    }
    stage.finish(metrics, tokens=int(args.max_steps * tokens_per_step))


def build_model(args: PretrainArguments, tokenizer: object) -> torch.nn.Module:
    """A GPT with random weights of the configured shape, or the weights of `model_name_or_path`."""
    if args.model_name_or_path:
        model = load_policy(args.model_name_or_path)
        check_fits(tokenizer, model.config.vocab_size, args.model_name_or_path)
        return model.train()
    if args.block_size > args.max_position_embeddings:
        limit = args.max_position_embeddings
        raise UserError(f"block_size {args.block_size} is longer than max_position_embeddings {limit}")
    if args.num_attention_heads % args.num_key_value_heads:
        raise UserError("num_attention_heads must be a multiple of num_key_value_heads")
    shape = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "intermediate_size")  # fmt: skip
    config = Qwen3Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True, use_cache=False, **{name: getattr(args, name) for name in shape},
    )  # fmt: skip
    return GPTForCausalLM(config).train()


def _pack(args: PretrainArguments, tokenizer: object, split: str, max_bytes: int) -> data.Packed:
    texts = data.load_texts(args.dataset, split=split, seed=args.seed, max_bytes=max_bytes)
    return data.pack(texts, tokenizer, args.block_size)


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def _tokens_per_step(args: PretrainArguments, world_size: int) -> int:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    return rows * args.block_size


if __name__ == "__main__":
    runtime.run(main, PretrainArguments)
