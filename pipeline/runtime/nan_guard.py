"""Stops training at the first loss or gradient that is not a finite number, and says which batch it was."""

import math
from typing import NamedTuple

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.checkpoint import latest_checkpoint
from pipeline.errors import UserError
from pipeline.runtime.record import Stage

SHOWN_ROWS, SHOWN_TOKENS, SHOWN_CHARACTERS = 8, 64, 100


class Batch(NamedTuple):
    """One forward pass."""

    step: int
    loss: torch.Tensor
    """(), on the model's device."""
    rows: torch.Tensor | None
    """(B,): numbers of the rows in the training data, where they are known."""
    ids: torch.Tensor | None
    """(at most SHOWN_TOKENS,): how the first row begins."""


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
        self.batches: list[Batch] = []
        self.norms: list[tuple[int, torch.Tensor]] = []
        # The Trainer shows a callback neither loss nor norm of each step: look where they are made.
        self.training_step, self.clip = trainer.training_step, trainer.accelerator.clip_grad_norm_
        trainer.training_step, trainer.accelerator.clip_grad_norm_ = self._training_step, self._clip

    def _training_step(self, model: torch.nn.Module, inputs: dict, *rest: object) -> torch.Tensor:
        rows, ids = inputs.pop("row", None), inputs.get("input_ids")
        loss = self.training_step(model, inputs, *rest)
        begin = None if ids is None else ids[0, :SHOWN_TOKENS].clone()
        self.batches.append(Batch(self.trainer.state.global_step + 1, loss, rows, begin))
        return loss

    def _clip(self, *args: object, **kwargs: object) -> torch.Tensor | None:
        norm = self.clip(*args, **kwargs)
        if norm is not None:
            self.norms.append((self.trainer.state.global_step + 1, norm))
        if self.at_once:
            self.check()
        return norm

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        last = state.global_step >= state.max_steps
        if last or control.should_log or control.should_save or control.should_evaluate:
            self.check()

    def check(self) -> None:
        """Look at what came since the last check. Raises UserError."""
        bad = [batch for batch in self.batches if not math.isfinite(float(batch.loss))]
        bad_norms = [(step, float(norm)) for step, norm in self.norms if not math.isfinite(float(norm))]
        if bad and (not bad_norms or bad[0].step <= bad_norms[0][0]):
            raise UserError(self._sentence(f"the loss is {float(bad[0].loss)}", bad[0]))
        if bad_norms:
            step, norm = bad_norms[0]
            raise UserError(self._sentence(f"the norm of the gradient is {norm}", *self._of(step)))
        self.batches, self.norms = [], []

    def _of(self, step: int) -> list[Batch]:
        return [batch for batch in self.batches if batch.step == step]

    def _sentence(self, what: str, *batches: Batch) -> str:
        """`batches` are the ones to blame: one with a bad loss, or all that the gradient was summed over."""
        step, known = batches[0].step, [batch.rows for batch in batches if batch.rows is not None]
        parts = [f"{self.stage.name}: {what} at step {step}"]
        if known:
            numbers = torch.cat(known).tolist()
            more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
            parts.append(f"in the batch of the training rows {', '.join(map(str, numbers[:SHOWN_ROWS]))}{more}")
        if batches[0].ids is not None and self.trainer.processing_class is not None:
            text = self.trainer.processing_class.decode(batches[0].ids.tolist())
            parts.append(f"its first row begins {text[:SHOWN_CHARACTERS]!r}")
        kept = latest_checkpoint(self.stage.checkpoints, self.stage.say)
        sentence = ", ".join(parts)
        if kept is None:
            return f"{sentence}; there is no checkpoint before it: lower learning_rate and start again"
        return (
            f"{sentence}; the last good checkpoint is {kept}: to go on from it, lower learning_rate and give it as "
            "model_name_or_path, with another output_dir"
        )
