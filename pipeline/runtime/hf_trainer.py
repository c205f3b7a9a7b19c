"""What the three Trainer-based stages (pretrain, sft, reward) share: arguments, callback, exact resume, saving."""

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from pipeline.checkpoint import by_step, seal, set_aside, step_of
from pipeline.errors import UserError
from pipeline.model.hardware import use_bf16
from pipeline.model.lora import add_lora, is_lora, lora_told, save_whole
from pipeline.model.optim import MuonFactory
from pipeline.runtime import longest, signals
from pipeline.runtime.arguments import TrainedLoraFields, TrainingFields
from pipeline.runtime.console import processes
from pipeline.runtime.nan_guard import NanGuard
from pipeline.runtime.record import Stage

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
# What trainers add up between two lines of metrics: the loss and the step of the last line; TRL's figures and tokens;
# the tokens and rewards of our own ones.
SUMS = ("_tr_loss", "_globalstep_last_logged", "_metrics", "_total_train_tokens", "predicted", "logits")


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
        "report_to": [],  # Stage.log reports, under the names of metrics.jsonl (pipeline/trackers.py)
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
    """Progress bar, metrics.jsonl, sealed checkpoints, and the end after a signal.

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
        self.trainer: Any = None  # the Trainer, once it trains
        self.stopping = 0  # number of the signal after which no further step is taken
        self.kept: Path | None = None  # the checkpoint that was saved for it

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
        self.agree = agreement()
        if self.stage.resume_from:
            self._go_on(args, state, control, self.stage.resume_from)

    def _go_on(self, args: Any, state: TrainerState, control: Any, checkpoint: Path) -> None:
        """Put back what the Trainer forgets, so that the next lines are those of a run that was never stopped."""
        state.compute_steps(args, state.max_steps)  # it takes the checkpoint's own save_steps and logging_steps
        self.speeds = load_sums(self.trainer, checkpoint)
        self.last_evaluated = max((int(row["step"]) for row in state.log_history if "eval_loss" in row), default=-1)
        done = state.global_step >= state.max_steps
        # A run that stopped after a step put its evaluation off.
        due = done or state.global_step % state.eval_steps == 0
        args.eval_on_start = due and self.last_evaluated != state.global_step
        if done:
            control.should_training_stop = True
            self.trainer.get_batch_samples = lambda *_: ([], None)  # the Trainer would take one step more
            self.trainer.model.eval()  # so that TRL logs nothing of training

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.advance(1)
        self.stopping = self.agree(signals.asked())
        if self.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it may take long, and can be made up for

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if self.kept:  # the Trainer's farewell
            return
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
        checkpoint = self.stage.checkpoints / f"checkpoint-{state.global_step}"
        save_sums(self.trainer, checkpoint, self.speeds)
        if self.stage.is_main:  # and the others have written all that is theirs
            seal(checkpoint)
        if self.stopping:
            self.kept = checkpoint

    def stop(self, number: int) -> NoReturn:
        """Save the last step, if that was not done, and leave."""
        state, stage = self.trainer.state, self.stage
        done = step_of(stage.resume_from) if stage.resume_from else 0
        with signals.deferred():
            if self.kept is None and state.global_step > done and processes() == 1:
                self.stopping = number
                self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
                self.on_save(self.trainer.args, state, self.trainer.control)
        stage.trackers.finish()
        raise signals.Stopped(number, self.kept)


def save_sums(trainer: Any, checkpoint: Path, tokens_per_s: list[float]) -> None:
    """Add this process's SUMS to a checkpoint, which the Trainer itself leaves out; returns when all processes have."""
    sums = {name: getattr(trainer, name) for name in SUMS if hasattr(trainer, name)}
    if "_metrics" in sums:
        sums["_metrics"] = {mode: dict(figures) for mode, figures in sums["_metrics"].items()}
    torch.save(sums | {"tokens_per_s": tokens_per_s}, sums_file(trainer, checkpoint))
    trainer.accelerator.wait_for_everyone()


def load_sums(trainer: Any, checkpoint: Path) -> list[float]:
    """Put back what save_sums kept; returns its tokens_per_s."""
    if not sums_file(trainer, checkpoint).exists():
        return []
    sums = torch.load(sums_file(trainer, checkpoint), map_location="cpu", weights_only=True)
    for mode, figures in sums.pop("_metrics", {}).items():
        trainer._metrics[mode].update(figures)
    speeds = sums.pop("tokens_per_s")
    for name, value in sums.items():
        setattr(trainer, name, send_to_device(value, trainer.args.device))
    return speeds


def sums_file(trainer: Any, checkpoint: Path) -> Path:
    """The file of this process."""
    return checkpoint / f"sums_{trainer.args.process_index}.pt"


def agreement() -> Callable[[int], int]:
    """A function that gives each process the highest of all processes' numbers; it makes them wait for each other.

    On the CPU, as looking at a number of a GPU would make the CPU wait for all that the GPU has still to do.
    """
    if processes() == 1:
        return lambda number: number
    gloo = torch.distributed.get_backend() == "gloo"
    group = None if gloo else torch.distributed.new_group(backend="gloo")

    def highest(number: int) -> int:
        numbers = torch.tensor(number)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group)
        return int(numbers)

    return highest


def peak_memory_mb() -> int:
    """The most memory so far: of the GPU what tensors took, without one what this process took; 0 where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def train(trainer: Trainer, callback: StageCallback) -> None:
    """Train to the end, from the stage's checkpoint where there is one; else the longest rows are tried first.

    Raises UserError at the first NaN and where memory is full, and after a signal Stopped, when the last step is saved.
    """
    stage, callback.trainer = callback.stage, trainer
    with longest.memory_told(stage, trainer):
        if stage.resume_from is None:
            longest.rehearse(trainer, SUMS)  # before anything is written, so that other settings can follow
        _train(trainer, callback)


def _train(trainer: Trainer, callback: StageCallback) -> None:
    stage = callback.stage
    trainer.remove_callback(PrinterCallback)  # ours shows what it would print
    trainer.add_callback(callback)
    trainer.add_callback(NanGuard(trainer, stage))
    let_evaluations_be_stopped(trainer)
    stage.begin()
    done = step_of(stage.resume_from) if stage.resume_from else 0
    if stage.is_main:
        set_damaged_aside(stage.checkpoints, done)
    with stage.progress(trainer.args.max_steps, stage.name, done) as callback.advance, signals.deferred():
        try:
            trainer.train(resume_from_checkpoint=str(stage.resume_from) if stage.resume_from else None)
        except signals.Stopped as stopped:
            callback.stop(stopped.number)
        if callback.stopping:
            callback.stop(callback.stopping)


def let_evaluations_be_stopped(trainer: Any) -> None:
    """Let a signal break off an evaluation, and let it draw no random number of the training's.

    So the evaluation can be made up for when the run goes on. Several processes finish it: one alone cannot leave it.
    """
    evaluation_loop = trainer.evaluation_loop

    def stoppable(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]), signals.at_once() if processes() == 1 else contextlib.nullcontext():
            return evaluation_loop(*args, **kwargs)

    trainer.evaluation_loop = stoppable


def set_damaged_aside(checkpoints: Path, done: int) -> None:
    """Rename checkpoints of later steps than the run goes on from: they were passed over, and will be written again.

    The Trainer would count them when it makes room, and remove a whole one for them.
    """
    for checkpoint in by_step(checkpoints):
        if step_of(checkpoint) > done:
            set_aside(checkpoint)


def with_lora(args: TrainedLoraFields, stage: Stage, model: PreTrainedModel) -> nn.Module:
    """The model as it is trained, with LoRA where `use_peft` asks for it; says how much of it is trained.

    Raises UserError where another process would hold a part of the weights, which could not be merged at the end.
    """
    if not args.use_peft:
        return model
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            f"{stage.name}: use_peft is not for FSDP or DeepSpeed, as the adapter is merged into whole weights; launch "
            "with configs/accelerate/ddp.yaml, or set use_peft to false"
        )
    adapted = add_lora(model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.lora_dropout).train()
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise UserError(
            f"{stage.name}: lora_target_modules {' '.join(args.lora_target_modules or ())}: the loss is computed from "
            "the weights of the output layer, so an update beside them would learn nothing; leave that layer out"
        )
    stage.say(lora_told(adapted))
    return adapted


def save_model(trainer: Trainer, stage: Stage) -> None:
    """Write the stock folder (weights, config, generation_config, tokenizer), also when the weights are sharded; with
    LoRA merged, and the adapter beside it."""
    model, tokenizer = cast(nn.Module, trainer.model), cast(Any, trainer.processing_class)

    def write(folder: Path) -> None:
        if not is_lora(model):
            trainer.save_model(str(folder))
        elif stage.is_main:
            save_whole(model, folder)
            tokenizer.save_pretrained(folder)
        if stage.is_main:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; stage.json has the settings
        trainer.accelerator.wait_for_everyone()

    stage.write_model(write)
