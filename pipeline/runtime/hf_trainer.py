"""What the three Trainer-based stages (pretrain, sft, reward) share: arguments, callback, exact resume, saving."""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from pipeline.checkpoint import seal, step_of
from pipeline.model.hardware import use_bf16
from pipeline.model.optim import MuonFactory
from pipeline.runtime.arguments import TrainingFields
from pipeline.runtime.nan_guard import NanGuard
from pipeline.runtime.record import Stage

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def training_kwargs(args: TrainingFields, stage: Stage) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments, and so of TRL's SFTConfig and RewardConfig."""
    on_cpu, bf16 = not torch.cuda.is_available(), use_bf16(args.mixed_precision)
    # What `accelerate launch --mixed_precision` leaves here would win over bf16=False
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    # Fields of the same name mean the same.
    ours, theirs = ({field.name for field in dataclasses.fields(kind)} for kind in (TrainingFields, TrainingArguments))
    return {
        **{name: getattr(args, name) for name in ours & theirs},
        "lr_scheduler_kwargs": schedule_kwargs(args),
        "output_dir": str(stage.checkpoints),
        "data_seed": args.seed,
        "per_device_eval_batch_size": 2 * args.per_device_train_batch_size,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "bf16": bf16,
        "use_cpu": on_cpu,
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
        "report_to": [],
        "logging_nan_inf_filter": False,  # a loss that is no number must be seen, not filtered
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,  # there are none, and looking for them at each step takes time
    }


def schedule_kwargs(args: TrainingFields) -> dict[str, Any] | None:
    """What warmup_stable_decay needs to know beside the warm-up; None for the other schedules."""
    if args.lr_scheduler_type != "warmup_stable_decay":
        return None
    steps = min(round(args.decay_share * args.max_steps), args.max_steps - args.warmup_steps)
    return {"num_decay_steps": max(1, steps), "decay_type": "1-sqrt"}


def optimizer_kwargs(args: TrainingFields) -> tuple[type, dict[str, float]] | None:
    """The Trainer's `optimizer_cls_and_kwargs`; None is its own AdamW, set by training_kwargs."""
    if args.optimizer == "adamw":
        return None
    names = ("muon_learning_rate", "learning_rate", "weight_decay", "adam_beta2")
    return MuonFactory, {name: getattr(args, name) for name in names}


def why_not_compile() -> str | None:
    """Why torch.compile does not work here (no C++ compiler, no Triton, …), by trying it; None if it does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, training goes on without
        return str(error).split(": ", 1)[-1].split("\n")[0][:200]
    return None


class StageCallback(TrainerCallback):
    """Progress bar, metrics.jsonl, sealed checkpoints.

    `tokens_per_step` over all processes gives tokens_per_s, and with `peak_tokens_per_s`, the speed at which the model
    would use all of the machine, mfu. `translate` renames or adds to what the Trainer logs.
    """

    def __init__(
        self,
        stage: Stage,
        tokens_per_step: float | None = None,
        translate: Callable[[dict], dict] = lambda row: row,
        peak_tokens_per_s: float | None = None,
    ) -> None:
        self.stage, self.translate = stage, translate
        self.tokens_per_step, self.peak_tokens_per_s = tokens_per_step, peak_tokens_per_s
        self.speeds: list[float] = []
        self.last_evaluated = -1
        self.advance: Callable[..., None] = lambda n: None

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed over the logged intervals, evaluations and checkpoints apart."""
        return round(statistics.median(self.speeds)) if self.speeds else None

    @property
    def mfu(self) -> float | None:
        """Median share of the peak."""
        speed, peak = self.tokens_per_second, self.peak_tokens_per_s
        return round(speed / peak, 4) if speed and peak else None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.began = self.clock = time.perf_counter()
        self.first_step = self.clock_step = state.global_step
        self.paused = 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        skip = ("runtime", "per_second", "epoch", "total_flos", "train_loss", "entropy", "num_", "preparation")
        kept = {k: v for k, v in logs.items() if not any(s in k for s in skip)}
        row = self.translate({k.replace("mean_token_accuracy", "token_accuracy"): v for k, v in kept.items()})
        if "loss" in logs:
            row |= self._speed(state)
        # The evaluation after training stands in the log already where the last step was evaluated too.
        if row and not (self.last_evaluated == state.global_step and "loss" not in logs):
            self.stage.log({"step": state.global_step, **row})
        if "eval_loss" in logs:
            self.last_evaluated = state.global_step

    def _speed(self, state: TrainerState) -> dict[str, float]:
        """Speed since the last line, memory, and the time left at the pace so far, evaluations included."""
        now = time.perf_counter()
        figures: dict[str, float] = {}
        if self.tokens_per_step and state.global_step > self.clock_step:
            seconds = now - self.clock - self.paused
            self.speeds.append((state.global_step - self.clock_step) * self.tokens_per_step / seconds)
            figures["tokens_per_s"] = round(self.speeds[-1])
            if self.peak_tokens_per_s:
                figures["mfu"] = round(self.speeds[-1] / self.peak_tokens_per_s, 4)
        self.clock, self.clock_step, self.paused = now, state.global_step, 0.0
        pace = (now - self.began) / max(1, state.global_step - self.first_step)
        left = pace * (state.max_steps - state.global_step)
        return {**figures, "memory_mb": peak_memory_mb(), "seconds_left": round(left, 2)}

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **_: Any) -> None:
        self.paused += metrics.get("eval_runtime", 0.0)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a file of its own
        if self.stage.is_main:
            seal(self.stage.checkpoints / f"checkpoint-{state.global_step}")


def peak_memory_mb() -> int:
    """The most memory so far: of the GPU what tensors took, without one what this process took; 0 where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def train(trainer: Trainer, callback: StageCallback) -> None:
    """Train to the end, from the stage's checkpoint where there is one. Raises UserError at the first NaN."""
    stage = callback.stage
    trainer.remove_callback(PrinterCallback)  # ours shows what it would print
    trainer.add_callback(callback)
    trainer.add_callback(NanGuard(trainer, stage))
    stage.begin()
    done = step_of(stage.resume_from) if stage.resume_from else 0
    with stage.progress(trainer.args.max_steps, stage.name, done) as callback.advance:
        trainer.train(resume_from_checkpoint=str(stage.resume_from) if stage.resume_from else None)


def save_model(trainer: Trainer, stage: Stage) -> None:
    """Write the stock folder (weights, config, generation_config, tokenizer), also when the weights are sharded."""
    trainer.save_model(str(stage.output_dir))
    if stage.is_main:
        (stage.output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; stage.json has the settings
    trainer.accelerator.wait_for_everyone()
