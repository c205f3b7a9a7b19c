"""What one update learns from: prompts, sampled answers, scores, log-probabilities and values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.sampler import OwnSampler, Sampler, Samples
from pipeline.ppo.algorithm import length_mask, response_positions
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.inputs import as_rows, check_prompts
from pipeline.text.packing import document_end
from pipeline.text.tokenizer import answer_texts, encode, prompt_ids
from reward_data.formats import answer_to, text_of

Plan = list[list[Tensor]]
"""Mini-batches of micro-batches of row numbers."""
# First numbers of the seeds, so that no two uses draw the same
PROMPT_ORDER, SAMPLING, SHUFFLING, HELD_OUT, PRETRAINING = 1, 2, 3, 4, 5


class Prompts:
    """Prompts as token ids, in a seeded order that starts anew each epoch.

    `rows` has a column `prompt` (text, or a list of messages); the others go to the rewards. It may have any shape that
    `as_rows` takes. Raises UserError for a missing column, an empty set, and a prompt that leaves no room for
    `response_length` tokens in `context`.
    """

    def __init__(self, rows: Any, tokenizer: Any, response_length: int, context: int | None, name: str) -> None:
        rows = as_rows(rows, "prompt", name)
        for column in ("prompts", "completions"):
            if column in rows[0]:
                raise UserError(f"{name}: the column {column!r} has the name of what rewards are given; rename it")
        self.rows = rows
        prompts = [row["prompt"] for row in rows]
        check_prompts(prompts, name)
        self.ids = prompt_ids(tokenizer, prompts)
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

    @property
    def columns(self) -> list[str]:
        """Names of what goes to the rewards beside prompts and completions."""
        return [name for name in self.rows[0] if name != "prompt"]

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
            shuffled = torch.randperm(len(self), generator=seeded(seed, PROMPT_ORDER, epoch)).tolist()
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
    values: Tensor = field(init=False)  # (B, R), where there is a critic
    advantages: Tensor = field(init=False)  # (B, R)
    returns: Tensor = field(init=False)  # (B, R), where there is a critic
    weights: Tensor | None = None  # (B, R) of the policy's loss, where the sampler is corrected for

    @classmethod
    def of(cls, samples: Samples, scores: Tensor) -> "Rollout":
        """Samples with their scores (B,)."""
        lengths = samples.prompt_lengths, samples.response_lengths
        return cls(samples.sequences, *lengths, samples.ended, samples.logprobs, scores)

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
    def per_token(self, forward: Callable[..., Any], plan: Plan, outputs: int = 1) -> list[Tensor]:
        """Run `forward(ids, predicts)` over a plan's micro-batches and lay its (N,) outputs out as (B, R)."""
        tables = [torch.zeros(self.mask.shape, device=self.sequences.device) for _ in range(outputs)]
        for rows in (rows for mini_batch in plan for rows in mini_batch):
            result = forward(*self.inputs(rows))
            mask = length_mask(self.response_lengths[rows], self.mask.shape[1])
            for table, flat in zip(tables, result if outputs > 1 else [result], strict=True):
                table[rows] = torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat.float())
        return tables


@dataclass
class GivenRows:
    """Answers that somebody else sampled and scored, a row each: token ids, the end token of an answer included, and
    the sampler's log-probabilities of the completions' tokens where they are known."""

    prompts: list[list[int]]
    completions: list[list[int]]
    scores: list[float]
    logprobs: list[Any] | None

    def rollout(self, end_tokens: list[int], pad_token: int, device: torch.device) -> Rollout:
        """The rows as a Rollout."""

        def table(rows: list[Any], pad: float, dtype: torch.dtype) -> Tensor:
            return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], True, pad).to(device)

        def vector(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=device)

        rows = [[*p, *c] for p, c in zip(self.prompts, self.completions, strict=True)]
        return Rollout(
            sequences=table(rows, pad_token, torch.long),
            prompt_lengths=vector([len(ids) for ids in self.prompts]),
            response_lengths=vector([len(ids) for ids in self.completions]),
            ended=vector([ids[-1] in end_tokens for ids in self.completions]),
            sampler_logprobs=None if self.logprobs is None else table(self.logprobs, 0.0, torch.float32),
            scores=torch.tensor(self.scores, dtype=torch.float32, device=device),
        )

    def check(self, expected: int, num_generations: int, context: int | None, vocabulary: int) -> None:
        """Raise UserError for rows that `PPOTrainer.step` cannot learn from."""
        for name, rows in vars(self).items():
            if rows is not None and len(rows) != expected:
                raise UserError(f"step: {len(rows)} {name}, but batch_size asks for {expected} on each process")
        for i in range(expected):
            if wrong := self._fault(i, context, vocabulary):
                raise UserError(f"step, row {i}: {wrong}")
            if self.prompts[i] != self.prompts[i - i % num_generations]:
                raise UserError(
                    f"step, row {i}: another prompt than the row before, but num_generations {num_generations} asks "
                    "for as many answers to each prompt, one after the other"
                )

    def _fault(self, i: int, context: int | None, vocabulary: int) -> str | None:
        prompt, completion = self.prompts[i], self.completions[i]
        if not prompt or not completion:
            return "the prompt or the completion is empty; give each at least one token"
        if context is not None and len(prompt) + len(completion) > context:
            return (
                f"a prompt of {len(prompt)} tokens and a completion of {len(completion)} do not fit the model's "
                f"context of {context}; shorten them"
            )
        if not 0 <= min(*prompt, *completion) <= max(*prompt, *completion) < vocabulary:
            return f"a token id lies outside the policy's vocabulary of {vocabulary}"
        if not math.isfinite(self.scores[i]):
            return f"the score is {self.scores[i]}; give a finite number"
        if self.logprobs is None:
            return None
        if len(self.logprobs[i]) != len(completion):
            return f"{len(self.logprobs[i])} logprobs for {len(completion)} tokens of completion; give one each"
        if not all(math.isfinite(value) for value in self.logprobs[i]):
            return "a logprob is not a finite number; give those of the tokens as sampled"
        return None


def as_ids(rows: Sequence[Any], tokenizer: Any, end_token: int | None = None) -> list[list[int]]:
    """Prompts or answers as token ids: each is ids (a list or tensor) already, or text, or a list of messages.

    With `end_token` they are answers: text is encoded as it is and ended by that token.
    """
    ids = []
    for i, row in enumerate(rows):
        if isinstance(row, str) or (isinstance(row, list) and row and isinstance(row[0], dict)):
            if end_token is None:
                ids += prompt_ids(tokenizer, [row])
            else:
                ids.append([*encode(tokenizer, [text_of(row)], add_special_tokens=False)[0], end_token])
        else:
            try:
                ids.append([int(token) for token in row])
            except (TypeError, ValueError):
                raise UserError(f"step, row {i}: give token ids, text or messages, not {row!r:.60}") from None
    return ids


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


@dataclass
class Answerer:
    """Answers prompts with a sampler, at the temperature and length of a run.

    Tokens are those of `processing_class`; `end_tokens` are the ids that end an answer.
    """

    sampler: Sampler
    processing_class: PreTrainedTokenizerBase
    end_tokens: list[int]
    args: PPOConfig
    accelerator: Accelerator

    @property
    def pad_token(self) -> int:
        """Fills rows up; masks come from lengths, so any id will do."""
        pad = self.processing_class.pad_token_id
        return 0 if pad is None else pad

    def sync(self, model: nn.Module) -> None:
        """Answer as `model` from now on, with the weights that it has now."""
        with self.accelerator.autocast():
            self.sampler.sync(model)

    def answer(
        self, batch: PromptBatch, random: torch.Generator, temperature: float | None = None
    ) -> tuple[Samples, list[Any]]:
        """One answer of the synced model to each prompt: token ids; and text, or one assistant message where the
        prompt is a list of messages, without the end token. `temperature`: another one than the run's."""
        with self.accelerator.autocast():
            samples = self.sampler.generate(
                batch.ids,
                max_new_tokens=self.args.response_length,
                temperature=self.args.temperature if temperature is None else temperature,
                eos_token_id=self.end_tokens,
                pad_token_id=self.pad_token,
                generator=random,
            )
        self._check(samples, batch.ids)
        texts = answer_texts(self.processing_class, samples.answers())
        return samples, [answer_to(prompt, text) for prompt, text in zip(batch.prompts, texts, strict=True)]

    def _check(self, samples: Any, prompts: list[list[int]]) -> None:
        """Raise UserError for what a sampler must not return."""
        name = f"the sampler {type(self.sampler).__name__}"
        if not isinstance(samples, Samples) or len(samples.sequences) != len(prompts):
            raise UserError(f"{name} must return Samples with one answer to each of the {len(prompts)} prompts")
        lengths, longest = samples.response_lengths.tolist(), self.args.response_length
        for i, (prompt, row, length) in enumerate(zip(prompts, samples.sequences.tolist(), lengths, strict=True)):
            if row[: len(prompt)] != prompt or not 1 <= length <= longest or len(prompt) + length > len(row):
                raise UserError(
                    f"{name}, row {i}: sequences must hold the prompt, then an answer of 1 to {longest} tokens "
                    "(response_lengths counts the end token), then padding"
                )
        if samples.ended.dtype != torch.bool:
            raise UserError(f"{name}: ended must be a tensor of truth values, not {samples.ended.dtype}")
        logprobs, shape = samples.logprobs, (len(prompts), max(lengths))
        if logprobs is None and self.args.sampler_weight_cap is not None:
            raise UserError(f"sampler_weight_cap is set, but {name} gives no logprobs; set it to none")
        if logprobs is not None and (logprobs.shape != shape or not logprobs.isfinite().all()):
            raise UserError(f"{name}: logprobs must be finite numbers of the shape {shape} (answers, longest answer)")


def check_sampler(sampler: Any, compares: bool) -> None:
    """Raise UserError for what is no sampler, and for one that cannot do what a run asks of it: `compares` if the
    answers of a LoRA policy without its adapter are wanted too."""
    methods = [getattr(sampler, name, None) for name in ("sync", "generate")]
    if isinstance(sampler, type) or not all(map(callable, methods)):
        raise UserError("sampler: pass an object with the methods sync(policy) and generate(prompts, **options)")
    if compares and not isinstance(sampler, OwnSampler):
        raise UserError(
            "a sampler of your own cannot answer as a LoRA policy without its adapter, which the win rate compares "
            "with; pass a reference, or no eval_dataset"
        )


class PretrainingText:
    """Texts as token ids, each after a document's end as in pretraining, cut at `max_length` tokens.

    `rows` are texts, or rows with a column `text`, in any shape that `as_rows` takes. Raises UserError for none, or
    another column.
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int) -> None:
        if rows is None or (hasattr(rows, "__len__") and len(rows) == 0):
            raise UserError("ptx_coef is set but ptx_dataset is missing or has no rows; give it pretraining text")
        texts = [row["text"] for row in as_rows(rows, "text", "ptx_dataset")]
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"ptx_dataset, row {i}: the text is a {type(text).__name__}; give texts")
        begin = document_end(tokenizer)
        # As in pretraining: special tokens that are spelt out in a text are ordinary characters
        encoded = encode(tokenizer, texts, add_special_tokens=False, split_special_tokens=True)
        self.ids = [[begin, *ids[:max_length]] for ids in encoded if ids]
        self.cut = sum(len(ids) > max_length for ids in encoded)
        """How many texts are longer than `max_length`."""
        if not self.ids:
            raise UserError("ptx_dataset has nothing but empty texts; give it pretraining text")

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """ids (count, t) long padded on the right, and predicting places (count, t) bool, of texts drawn at random."""
        rows = [self.ids[i] for i in torch.randint(len(self.ids), (count,), generator=generator).tolist()]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, length_mask(lengths - 1, ids.shape[1])
