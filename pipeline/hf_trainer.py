"""What the three Trainer-based stages (pretrain, sft, reward) share: arguments, callback, exact resume, saving."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as HFTrainingArguments

from pipeline.arguments import TrainingFields
from pipeline.checkpoint import seal
from pipeline.errors import UserError
from pipeline.optim import MuonFactory
from pipeline.runtime import Stage, use_bf16


def training_kwargs(args: TrainingFields, stage: Stage) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments, and so of TRL's SFTConfig and RewardConfig."""
    on_cpu = not torch.cuda.is_available()
    same = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm",
            "gradient_checkpointing", "logging_steps", "eval_steps", "save_steps", "seed")  # fmt: skip
    return {
        **{name: getattr(args, name) for name in same},
        "output_dir": str(stage.checkpoints),
        "data_seed": args.seed,
        "per_device_eval_batch_size": 2 * args.per_device_train_batch_size,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "bf16": use_bf16(args.mixed_precision),
        "use_cpu": on_cpu,
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
        "report_to": [],
        "logging_nan_inf_filter": False,  # a loss that is no number must be seen, not filtered
        "dataloader_pin_memory": not on_cpu,
    }


def optimizer_kwargs(args: TrainingFields) -> tuple[type, dict[str, float]] | None:
    """The Trainer's `optimizer_cls_and_kwargs`; None is its own AdamW, set by training_kwargs."""
    if args.optimizer == "adamw":
        return None
    names = ("muon_learning_rate", "learning_rate", "weight_decay", "adam_beta2")
    return MuonFactory, {name: getattr(args, name) for name in names}


class StageCallback(TrainerCallback):
    """Progress bar, metrics.jsonl, sealed checkpoints, and a stop on a loss that is no number."""

    def __init__(self, stage: Stage, tokens_per_step: float | None = None,
                 translate: Callable[[dict], dict] = lambda row: row) -> None:  # fmt: skip
        self.stage, self.tokens_per_step, self.translate = stage, tokens_per_step, translate
        self.speeds: list[float] = []
        self.last_evaluated = -1
        self.clock, self.clock_step, self.paused = time.perf_counter(), 0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed over the logged intervals, evaluations and checkpoints apart."""
        return round(statistics.median(self.speeds)) if self.speeds else None

    def on_train_begin(self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = self.stage.progress(state.max_steps, self.stage.name, done=state.global_step)
        self.advance = self.bar.__enter__()
        self.clock, self.clock_step, self.paused = time.perf_counter(), state.global_step, 0.0

    def on_step_end(self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(1)

    def on_train_end(self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.__exit__(None, None, None)

    def on_log(
        self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        skip = ("runtime", "per_second", "epoch", "total_flos", "train_loss", "entropy", "num_", "preparation")
        row = self.translate({k: v for k, v in logs.items() if not any(s in k for s in skip)})
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise UserError(
                f"{self.stage.name}: the loss or its gradient is not a number at step {state.global_step}; lower "
                f"learning_rate (checkpoints before it are kept in {self.stage.checkpoints})"
            )
        if "loss" in logs:
            seconds = time.perf_counter() - self.clock - self.paused
            if self.tokens_per_step and state.global_step > self.clock_step:
                self.speeds.append((state.global_step - self.clock_step) * self.tokens_per_step / seconds)
                row["tokens_per_s"] = round(self.speeds[-1])
            self.clock, self.clock_step, self.paused = time.perf_counter(), state.global_step, 0.0
        # The evaluation after training stands in the log already where the last step was evaluated too.
        if row and not (self.last_evaluated == state.global_step and "loss" not in logs):
            self.stage.log({"step": state.global_step, **row})
        if "eval_loss" in logs:
            self.last_evaluated = state.global_step

    def on_evaluate(self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict,
                    **_: Any) -> None:  # fmt: skip
        self.paused += metrics.get("eval_runtime", 0.0)

    def on_save(self, args: HFTrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stage.is_main:
            seal(self.stage.checkpoints / f"checkpoint-{state.global_step}")


def attach(trainer: Trainer, callback: StageCallback) -> None:
    """Let our callback show what the Trainer would print."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)


def train(trainer: Trainer, stage: Stage) -> None:
    """Train to the end, from the stage's checkpoint where there is one."""
    trainer.train(resume_from_checkpoint=str(stage.resume_from) if stage.resume_from else None)


def save_model(trainer: Trainer, stage: Stage) -> None:
    """Write the stock folder (weights, config, generation_config, tokenizer), also when the weights are sharded."""
    trainer.save_model(str(stage.output_dir))
    if stage.is_main:
        (stage.output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; stage.json has the settings
    trainer.accelerator.wait_for_everyone()
