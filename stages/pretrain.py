"""Pretrain a GPT from random weights: `python -m stages.pretrain --config configs/stories/pretrain.yaml`."""

import math
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from pipeline.errors import UserError
from pipeline.judging import held_out_nats
from pipeline.model.bigram import BigramLanguageModel, bits_per_byte
from pipeline.model.flops import flops_per_token, matmul_peak
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.load import fit_embeddings, load_policy, parameter_count
from pipeline.runtime import hf_trainer, preview
from pipeline.runtime.arguments import GPTShape, PretrainArguments
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.runtime.trainer_budget import of_trainer
from pipeline.text import data
from pipeline.text.counts import agreeing, counted
from pipeline.text.lengths import Fit, check_positions
from pipeline.text.packing import Packed, StreamedRows, collate, document_end, pack
from pipeline.text.tokenizer import load_tokenizer

BIGRAM_VOCABULARY = 8192  # at most: the bigram's table is the square of it
BIGRAM_ROWS = 20_000  # of a stream, to fit the bigram on


def main(args: PretrainArguments) -> None:
    """Pack documents into rows, train on next tokens, report held-out bits per byte beside a bigram's."""
    inputs = {"tokenizer": args.tokenizer_name_or_path, "model": args.model_name_or_path, "dataset": args.dataset}
    stage = Stage(args, "pretrain", inputs)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path)
    model = build_model(args, tokenizer)
    check_positions("pretrain", "block_size", args.block_size, model, args.model_name_or_path or "the model")
    training, held_out = load(args, tokenizer)
    views, told = views_of(args, training, held_out, tokenizer)
    if args.show:
        return preview.show(stage, views, told, tokenizer, "trained on is what stands between")
    preview.say(stage, views, told)
    trainer = PretrainTrainer(
        model=model,
        train_dataset=training if isinstance(training, StreamedRows) else training.rows,
        eval_dataset=held_out.rows,
        args=training_arguments(args, stage),
        data_collator=collate,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=hf_trainer.optimizer_kwargs(args),
    )
    if args.dry_run:
        return of_trainer(stage, trainer)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.args.world_size
    tokens_per_step = rows_per_step * (args.block_size - 1)
    tokens = tokens_per_step * args.max_steps
    seen = "read as a stream" if args.streaming else f"each seen {tokens / training.tokens:.2g} times"
    stage.say(f"{parameter_count(model):,} parameters, {tokens:,} training tokens, {seen}")
    translate = partial(with_bits_per_byte, training=training, held_out=held_out)
    callback = hf_trainer.StageCallback(stage, tokens_per_step, translate, peak_tokens_per_s(args, trainer))
    hf_trainer.train(trainer, callback)
    if isinstance(training, StreamedRows):
        texts: Any = training.texts
        if texts.documents:  # none where all steps had been done before
            read = f"{counted(texts.documents, 'documents')} {agreeing(texts.documents, 'was', 'were')} read"
            held_out_too = f", {texts.held_out:,} held out and not trained on" if texts.held_out else ""
            stage.say(f"{read}, {texts.duplicates:,} of them duplicates{held_out_too}")

    val_loss = trainer.evaluate()["eval_loss"]
    hf_trainer.save_model(trainer, stage)
    metrics = {
        **held_out_figures(val_loss, held_out),
        "bigram_bpb": bigram_bpb(training, held_out, len(tokenizer)) if stage.is_main else None,
        "uniform_bpb": bits_per_byte(math.log(len(tokenizer)), held_out.tokens, held_out.bytes),
        "tokens_per_s": callback.tokens_per_second,
        "mfu": callback.mfu,
        "memory_mb": hf_trainer.peak_memory_mb(),
        "parameters": parameter_count(model),
    }
    stage.finish({name: figure for name, figure in metrics.items() if figure is not None}, tokens=tokens)


class PretrainTrainer(Trainer):
    """The Trainer with an exact held-out loss, which its own mean of batches is not."""

    def evaluation_loop(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> EvalLoopOutput:
        """Mean nats of all predicted tokens of eval_dataset, over all processes."""
        model, rows, settings = cast(PreTrainedModel, self.model).eval(), cast(Dataset, self.eval_dataset), self.args
        share = settings.per_device_eval_batch_size, settings.process_index, settings.world_size
        sums = torch.tensor(held_out_nats(model, rows, *share), dtype=torch.float64)
        nats, tokens = self.accelerator.reduce(sums.to(settings.device)).tolist()
        metrics = {f"{metric_key_prefix}_loss": nats / tokens}
        return EvalLoopOutput((np.empty(0),), label_ids=None, metrics=metrics, num_samples=len(rows))


def load(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Packed | StreamedRows, Packed]:
    """Training and held-out text in rows of tokens; no held-out document is in the training text."""
    where: dict[str, Any] = {"seed": args.seed, "text_column": args.text_column}
    texts = data.load_texts(
        args.dataset, split="validation", max_bytes=args.validation_bytes, streaming=args.streaming, **where
    )
    held_out = pack(texts, tokenizer, args.block_size)
    where |= {"split": "train", "max_bytes": args.max_bytes, "without": {data.document_key(text) for text in texts}}
    if args.streaming:
        stream = data.TextStream(args.dataset, buffer_size=args.shuffle_buffer_size, **where)
        return StreamedRows(stream, tokenizer, args.block_size), held_out
    return pack(data.load_texts(args.dataset, **where), tokenizer, args.block_size), held_out


def views_of(
    args: PretrainArguments, training: Packed | StreamedRows, held_out: Packed, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[preview.View], str]:
    """What is trained on, and a sentence on it. The lengths are those of documents, of a stream the held-out ones'."""
    end = document_end(tokenizer)
    told = f"rows of {args.block_size} tokens, of which the first is trained on in the row before"
    told += f"; a document ends with {tokenizer.convert_ids_to_tokens(end)}"
    if isinstance(training, StreamedRows):
        rows: Any = list(islice(training, args.show))
        fits, told = [fit_of(held_out, end, "held-out documents")], f"training text is read as a stream; {told}"
    else:
        rows = training.rows
        fits = [fit_of(training, end, "training documents"), fit_of(held_out, end, "held-out documents")]

    def parts(number: int) -> list[preview.Part]:
        ids = rows[number]["input_ids"]
        return [preview.Part(counted(len(ids), "tokens"), ids, [place > 0 for place in range(len(ids))])]

    shown = range(len(rows))
    places = [f"row {number + 1}" for number in range(min(args.show, len(rows)))]
    return [preview.View(fit, places, parts, shown=shown) for fit in fits], told


def fit_of(packed: Packed, end: int, what: str) -> Fit:
    """The lengths of documents, their ends included; all are used, whatever their length."""
    ends = np.flatnonzero(packed.ids == end)
    lengths = np.diff([-1, *ends, len(packed.ids)])
    lengths = lengths[lengths > 0].tolist()
    return Fit(what, lengths, None, "", list(range(len(lengths))))


def build_model(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT with random weights of the configured shape, or the weights of `model_name_or_path`."""
    if args.model_name_or_path:
        model = load_policy(args.model_name_or_path)
        fit_embeddings(model, tokenizer, args.model_name_or_path)
        return model.train()
    if args.num_attention_heads % args.num_key_value_heads:
        raise UserError("num_attention_heads must be a multiple of num_key_value_heads")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        use_cache=False,
        **{field.name: getattr(args, field.name) for field in fields(GPTShape)},
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
    )
    return GPTForCausalLM(config).train()


def training_arguments(args: PretrainArguments, stage: Stage) -> TrainingArguments:
    """The Trainer's settings; where torch.compile does not work, that is said and it stays off."""
    reason = hf_trainer.why_not_compile() if args.torch_compile else None
    if reason:
        stage.say(f"torch.compile does not work here ({reason}): training goes on without it")
    return TrainingArguments(
        **hf_trainer.training_kwargs(args, stage),
        remove_unused_columns=False,  # the guard wants the rows' numbers
        torch_compile=args.torch_compile and not reason,
    )


def with_bits_per_byte(row: dict, training: Packed | StreamedRows, held_out: Packed) -> dict:
    """What the Trainer logs, with the loss in bits per byte beside it."""
    if "eval_loss" in row:
        return held_out_figures(row["eval_loss"], held_out)
    if "loss" in row and training.bytes:  # of several processes, only the main one reads a stream
        return {"loss": row["loss"], "bpb": bits_per_byte(row["loss"], training.tokens, training.bytes), **row}
    return row


def held_out_figures(loss: float, held_out: Packed) -> dict[str, float]:
    """`loss` in nats a token, in bits a byte and in nats a character."""
    return {
        "val_loss": loss,
        "val_bpb": bits_per_byte(loss, held_out.tokens, held_out.bytes),
        "val_nats_per_char": loss * held_out.tokens / held_out.characters,
    }


def peak_tokens_per_s(args: PretrainArguments, trainer: Trainer) -> float | None:
    """Tokens a second at which the model would use all that the machine can do; None for a model that is not ours."""
    if not isinstance(trainer.model, GPTForCausalLM):
        return None
    peak = matmul_peak(trainer.args.device, torch.bfloat16 if trainer.args.bf16 else torch.float32)
    return trainer.args.world_size * peak / flops_per_token(trainer.model.config, args.block_size)


def bigram_bpb(training: Packed | StreamedRows, held_out: Packed, vocab_size: int) -> float | None:
    """Held-out bits per byte of the bigram model; None where its table would not fit."""
    if vocab_size > BIGRAM_VOCABULARY:
        return None
    bigram = BigramLanguageModel(vocab_size)
    if isinstance(training, StreamedRows):
        bigram.fit(torch.tensor([row["input_ids"] for row in islice(training, BIGRAM_ROWS)]))
    else:
        bigram.fit(torch.from_numpy(training.ids).long()[None])
    pairs = torch.from_numpy(held_out.ids).long().unfold(0, 2, 1)  # (tokens, 2)
    return bits_per_byte(bigram.loss(pairs, batch_size=8192), held_out.tokens, held_out.bytes)


if __name__ == "__main__":
    run(main, PretrainArguments)
