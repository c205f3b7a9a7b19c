"""What one update learns from: prompts, sampled answers, scores, log-probabilities and values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.hardware import side_by_side
from pipeline.ppo.algorithm import length_mask, response_positions
from pipeline.text.tokenizer import answer_texts, encode, prompt_ids
from reward_data.formats import answer_to, text_of

Plan = list[list[Tensor]]
"""Mini-batches of micro-batches of row numbers."""


class Prompts:
    """Prompts as token ids, in a seeded order that starts anew each epoch.

    `rows` has a column `prompt` (text, or a list of messages); the others go to the rewards. Raises UserError for a
    missing column, an empty set, and a prompt that leaves no room for `response_length` tokens in `context`.
    """

    def __init__(self, rows: Any, tokenizer: Any, response_length: int, context: int | None, name: str) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise UserError(f"{name} is a {type(rows).__name__}; give a list of rows or a Dataset that is not streamed")
        if len(rows) == 0:
            raise UserError(f"{name} has no rows; give it at least one prompt")
        if "prompt" not in rows[0]:
            raise UserError(f"{name} has no column 'prompt' but {', '.join(map(repr, rows[0]))}; rename the column")
        for column in ("prompts", "completions"):
            if column in rows[0]:
                raise UserError(f"{name}: the column {column!r} has the name of what rewards are given; rename it")
        self.rows = rows
        self.ids = prompt_ids(tokenizer, [row["prompt"] for row in rows])
        for i, ids in enumerate(self.ids):
            if not ids:
                raise UserError(f"{name}, row {i}: the prompt is empty; give it at least one token")
            if context is not None and len(ids) + response_length > context:
                raise UserError(
                    f"{name}, row {i}: a prompt of {len(ids)} tokens and an answer of {response_length} do not fit the "
                    f"model's context of {context}; shorten the prompt or response_length"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> "PromptBatch":
        """The rows of `indices`, with each column as a list."""
        rows = [self.rows[int(i)] for i in indices]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return PromptBatch([self.ids[int(i)] for i in indices], [row["prompt"] for row in rows], columns)

    def order(self, start: int, count: int, seed: int) -> list[int]:
        """Places `start` … `start + count − 1` of the endless sequence of shuffled epochs."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, place = divmod(start + len(chosen), len(self))
            shuffled = torch.randperm(len(self), generator=seeded(seed, 1, epoch)).tolist()
            chosen += shuffled[place : place + count - len(chosen)]
        return chosen


@dataclass
class PromptBatch:
    """Some prompts: token ids, as the data set has them, and the columns beside them."""

    ids: list[list[int]]
    prompts: list[Any]
    columns: dict[str, list]


@dataclass
class Rollout:
    """One process's answers of an update. B answers, T sequence and R response width; rows are padded on the right."""

    sequences: Tensor  # (B, T) long: prompt, response, padding
    prompt_lengths: Tensor  # (B,) long
    response_lengths: Tensor  # (B,) long, the end token counted
    ended: Tensor  # (B,) bool: an end token was sampled
    sampler_logprobs: Tensor | None  # (B, R) as the sampler computed them, where they are known
    scores: Tensor  # (B,) float, the penalty for a missing end token taken off
    logprobs: Tensor = field(init=False)  # (B, R) of the policy that sampled
    ref_logprobs: Tensor = field(init=False)  # (B, R)
    entropy: Tensor = field(init=False)  # (B, R)
    values: Tensor = field(init=False)  # (B, R)
    advantages: Tensor = field(init=False)  # (B, R)
    returns: Tensor = field(init=False)  # (B, R)
    weights: Tensor | None = None  # (B, R) of the policy's loss, where the sampler is corrected for

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def mask(self) -> Tensor:
        """(B, R) bool, True on response tokens."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b, t) and predicting places (b, t) of some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max())
        predicts = response_positions(self.prompt_lengths[rows], self.response_lengths[rows], width)
        return self.sequences[rows, :width], predicts

    def flat(self, values: Tensor, rows: Tensor) -> Tensor:
        """(B, R) → (N,): the real tokens of some rows, laid end to end in the order of the forward passes."""
        mask = length_mask(self.response_lengths[rows], values.shape[1])
        return values[rows][mask]

    @torch.no_grad()
    def per_token(
        self, forward: Callable[..., Any], plan: Plan, outputs: int = 1, at_once: bool = False
    ) -> list[Tensor]:
        """Run `forward(ids, predicts)` over a plan's micro-batches and lay its (N,) outputs out as (B, R); `at_once`:
        two micro-batches at a time, on the threads that they have when policy and critic learn at the same time."""
        found = [torch.zeros(self.mask.shape, device=self.sequences.device) for _ in range(outputs)]

        def fill(micro_batches: list[Tensor]) -> None:
            for rows in micro_batches:
                result = forward(*self.inputs(rows))
                mask = length_mask(self.response_lengths[rows], self.mask.shape[1])
                for table, flat in zip(found, result if outputs > 1 else [result], strict=True):
                    table[rows] = torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat.float())

        micro_batches = [rows for mini_batch in plan for rows in mini_batch]
        side_by_side([partial(fill, micro_batches[i::2]) for i in range(2)], at_once)
        return found


def rollout_of(
    prompts: list[list[int]],
    completions: list[list[int]],
    scores: list[float],
    end_tokens: list[int],
    pad_token: int,
    logprobs: list[Any] | None,
    device: torch.device,
) -> Rollout:
    """Rows that somebody else sampled, as a Rollout: token ids of each, the end token of an answer included."""

    def table(rows: list[Any], pad: float, dtype: torch.dtype) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=dtype, device=device)

    def vector(values: list[Any]) -> Tensor:
        return torch.tensor(values, device=device)

    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    return Rollout(
        table(rows, pad_token, torch.long),
        vector([len(ids) for ids in prompts]),
        vector([len(ids) for ids in completions]),
        vector([ids[-1] in end_tokens for ids in completions]),
        None if logprobs is None else table(logprobs, 0.0, torch.float32),
        torch.tensor(scores, dtype=torch.float32, device=device),
    )


def as_ids(rows: Sequence[Any], tokenizer: Any, end_token: int | None = None) -> list[list[int]]:
    """Prompts or answers as token ids: each is ids (a list or tensor) already, or text, or a list of messages.

    With `end_token` they are answers: text is encoded as it is and ended by that token.
    """
    found = []
    for row in rows:
        if isinstance(row, str) or (isinstance(row, list) and row and isinstance(row[0], dict)):
            if end_token is None:
                found += prompt_ids(tokenizer, [row])
            else:
                found.append([*encode(tokenizer, [text_of(row)], add_special_tokens=False)[0], end_token])
        else:
            found.append([int(token) for token in row])
    return found


def check_rows(
    prompts: list[list[int]],
    completions: list[list[int]],
    scores: list[float],
    logprobs: list[Any] | None,
    expected: int,
    context: int | None,
    vocabulary: int,
) -> None:
    """Raise UserError for rows that `PPOTrainer.step` cannot learn from."""
    given = {"prompts": prompts, "completions": completions, "scores": scores}
    for name, rows in (given | ({"logprobs": logprobs} if logprobs is not None else {})).items():
        if len(rows) != expected:
            raise UserError(f"step: {len(rows)} {name}, but batch_size asks for {expected} on each process")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt or not completion:
            raise UserError(f"step, row {i}: the prompt or the completion is empty; give each at least one token")
        if context is not None and len(prompt) + len(completion) > context:
            raise UserError(
                f"step, row {i}: a prompt of {len(prompt)} tokens and a completion of {len(completion)} do not fit the "
                f"model's context of {context}; shorten them"
            )
        if not 0 <= min(*prompt, *completion) <= max(*prompt, *completion) < vocabulary:
            raise UserError(f"step, row {i}: a token id lies outside the policy's vocabulary of {vocabulary}")
        if not math.isfinite(scores[i]):
            raise UserError(f"step, row {i}: the score is {scores[i]}; give a finite number")
        if logprobs is not None and len(logprobs[i]) != len(completion):
            raise UserError(
                f"step, row {i}: {len(logprobs[i])} logprobs for {len(completion)} tokens of completion; give one each"
            )
        if logprobs is not None and not all(math.isfinite(value) for value in logprobs[i]):
            raise UserError(f"step, row {i}: a logprob is not a finite number; give those of the tokens as sampled")


def plan_epoch(lengths: Tensor, num_mini_batches: int, micro_batch_size: int, generator: torch.Generator) -> Plan:
    """Shuffle rows into mini-batches; within each, sort by length and cut into micro-batches, so short rows cost less.

    The loss is a sum over tokens, so the cut changes speed and memory but not the gradient.
    """
    order = torch.randperm(len(lengths), generator=generator).to(lengths.device)
    plan = []
    for rows in order.chunk(num_mini_batches):
        rows = rows[lengths[rows].argsort(descending=True, stable=True)]
        plan.append(list(rows.split(micro_batch_size)))
    return plan


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for this combination of numbers; nothing has to be saved to draw the same again."""
    state = 0
    for number in numbers:  # splitmix64 over the numbers: neighbouring seeds give unrelated streams
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def decode_completions(samples: Any, prompts: list[Any], tokenizer: Any) -> list[Any]:
    """Answers without their end token, as text, or as one assistant message where the prompt is a list of messages."""
    texts = answer_texts(tokenizer, samples.answers())
    return [answer_to(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
