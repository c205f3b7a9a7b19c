"""Stops training at the first loss or gradient that is not a finite number, and says which batch it was."""

import math
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from pipeline.checkpoint import latest_checkpoint
from pipeline.errors import UserError
from pipeline.runtime.record import Stage

SHOWN_ROWS, SHOWN_TOKENS, SHOWN_CHARACTERS = 8, 64, 100


class Number(NamedTuple):
    """A loss, or the norm of a step's gradient."""

    name: str
    value: torch.Tensor
    """(), on the model's device."""
    step: int
    batches: list[dict[str, Any]]
    """Inputs of the forward passes that it came from; `row` (B,) are the rows' numbers, where they are known."""


def looks_at_once(device: torch.device) -> bool:
    """Whether reading a number off `device` costs nothing."""
    return device.type == "cpu"


class NanGuard(TrainerCallback):
    """Watches a Trainer's losses and gradient norms.

    On a CPU each step is checked before the weights are changed. A GPU would have to wait for that: there the numbers
    are looked at with each line of metrics, and before each evaluation, each checkpoint and the end, so that what a NaN
    made of the weights is never saved. Raises UserError.
    """

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self.stage, self.trainer = stage, trainer
        self.at_once = looks_at_once(trainer.args.device)
        self.batches: list[dict[str, Any]] = []  # of this step
        self.numbers: list[Number] = []  # since the last check, as they came
        # The Trainer shows a callback neither loss nor norm of each step: look where they are made.
        self.train, self.clip = trainer.training_step, trainer.accelerator.clip_grad_norm_
        trainer.training_step = self._training_step  # type: ignore[method-assign]
        trainer.accelerator.clip_grad_norm_ = self._clip

    def _training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        self.batches.append(dict(inputs))
        inputs.pop("row", None)  # the model knows no such argument
        loss = self.train(model, inputs, num_items_in_batch)
        self.numbers.append(Number("loss", loss, self.trainer.state.global_step + 1, self.batches[-1:]))
        return loss

    def _clip(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        norm = self.clip(*args, **kwargs)
        if norm is not None:
            step = self.trainer.state.global_step + 1
            self.numbers.append(Number("norm of the gradient", norm, step, self.batches))
        self.batches = []
        if self.at_once:
            self.check()
        return norm

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if last or control.should_log or control.should_save or control.should_evaluate:
            self.check()

    def check(self) -> None:
        """Look at what came since the last check. Raises UserError."""
        for number in self.numbers:
            if not math.isfinite(float(number.value)):
                raise UserError(self._sentence(number))
        self.numbers = []

    def _sentence(self, number: Number) -> str:
        parts = [f"{self.stage.name}: the {number.name} is {float(number.value)} at step {number.step}"]
        if rows := [row for batch in number.batches if "row" in batch for row in batch["row"].tolist()]:
            more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
            parts.append(f"in the batch of the training rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{more}")
        tokenizer: Any = self.trainer.processing_class
        if "input_ids" in number.batches[0] and tokenizer is not None:
            text = tokenizer.decode(number.batches[0]["input_ids"][0, :SHOWN_TOKENS].tolist())
            parts.append(f"its first row begins {text[:SHOWN_CHARACTERS]!r}")
        sentence, kept = ", ".join(parts), latest_checkpoint(self.stage.checkpoints, self.stage.say)
        if kept is None:
            return f"{sentence}; there is no checkpoint before it: lower learning_rate and start again"
        return (
            f"{sentence}; the last good checkpoint is {kept}: to go on from it, lower learning_rate and give it as "
            "model_name_or_path, with another output_dir"
        )
