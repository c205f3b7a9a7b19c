"""Text out of a model: batched sampling with a KV cache, and the log-probability of every token that was sampled.

`generate` answers a batch of prompts, `stream` one prompt token by token. Our own GPT runs through a lean decode loop
(decoder.py); any other causal model runs through transformers' `generate`, with the same sampling code and the same
result.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.decoder import borrowed
from pipeline.model.gpt import GPTForCausalLM

LOOK = 16  # steps on CUDA from one look at which rows have ended to the next: each makes the host wait for the device


@dataclass
class Samples:
    """Prompts and their sampled responses. N rows, P the longest prompt, R the longest response.

    sequences (N, P + R) long: row i is prompt_i, then response_i, then padding, all on the right.
    prompt_lengths, response_lengths (N,) long; a response's length counts its end token.
    ended (N,) bool: an end token was sampled; False means cut at max_new_tokens.
    logprobs (N, R) fp32: log-probability of each response token after temperature and before top-k, top-p and min-p
    (temperature 0: at temperature 1); 0 after the end.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    ended: Tensor
    logprobs: Tensor

    def answers(self) -> list[list[int]]:
        """Each response as token ids, without its end token."""
        ends = self.prompt_lengths + self.response_lengths - self.ended.long()
        spans = zip(self.sequences.tolist(), self.prompt_lengths.tolist(), ends.tolist(), strict=True)
        return [row[start:end] for row, start, end in spans]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Filters are applied in transformers' order: top-k, top-p, min-p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                f"{self} is not a way to sample: temperature and top_k must be at least 0, top_p in (0, 1], "
                "min_p in [0, 1]"
            )

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V), uniform (B,) in [0, 1) → token (B,) long, its log-probability before the filters (B,) fp32."""
        logits = logits.float() / (self.temperature or 1.0)
        logprobs = logits.log_softmax(-1)
        if self.temperature == 0:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            # Inverse transform: the first token whose cumulative probability exceeds u; a token of probability 0 never
            cumulative = self.filter(logprobs).exp().cumsum(-1)
            total = cumulative[:, -1:]
            below_total = torch.nextafter(total, torch.zeros_like(total))  # u·total may round up to total
            token = torch.searchsorted(cumulative, torch.minimum(uniform[:, None] * total, below_total), right=True)
        return token[:, 0], logprobs.gather(1, token)[:, 0]

    def filter(self, logprobs: Tensor) -> Tensor:
        """−inf for the tokens that top-k, top-p (nucleus, 1904.09751) and min-p (2407.01082) leave out; (B, V)."""
        if 0 < self.top_k < logprobs.shape[-1]:
            smallest = logprobs.topk(self.top_k, dim=-1).values[:, -1:]
            logprobs = logprobs.masked_fill(logprobs < smallest, float("-inf"))
        if self.top_p < 1:
            ordered, order = logprobs.sort(descending=True, dim=-1)
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens: 0 for the first
            left_out = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= self.top_p)
            logprobs = logprobs.masked_fill(left_out, float("-inf"))
        if self.min_p > 0:
            floor = logprobs.amax(-1, keepdim=True) + torch.tensor(self.min_p).log()
            logprobs = logprobs.masked_fill(logprobs < floor, float("-inf"))
        return logprobs


@torch.inference_mode(False)  # the caller's inference mode would leave tensors that autograd refuses
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | list[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Samples:
    """Sample a response to each prompt (lists of token ids of any lengths); temperature 0 is greedy.

    The same generator state gives the same result whatever `batch_size` (rows at a time, all at once if None), up to
    rounding. Under bf16 autocast on CPU the matrix products run in bf16, the logits and softmax in fp32. Raises
    UserError for an empty prompt, one too long for the model's positions, or impossible sampling parameters.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    _check_lengths(model, prompts, max_new_tokens)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    # Drawn at once and in the prompts' order, so that neither batching nor rows that finish early change a sample
    uniform = _uniform(max_new_tokens, len(prompts), generator)
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)
    logprobs = torch.zeros(len(prompts), max_new_tokens)
    # Prompts of like lengths together: least padding
    by_length = torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)
    respond = _respond if isinstance(model, GPTForCausalLM) else _respond_with_transformers
    with torch.inference_mode():
        for rows in by_length.split(batch_size or len(prompts)):
            padded, starts = _left_pad([prompts[row] for row in rows], pad_token_id)
            given = (part.to(model.device) for part in (padded, starts, uniform[:, rows.to(uniform.device)]))
            tokens[rows], logprobs[rows] = (part.cpu() for part in respond(model, *given, sampling, ends))
    return _pack(prompts, tokens, logprobs, ends, pad_token_id, model.device)


class Sampler(Protocol):
    """What answers prompts during PPO: this module's OwnSampler, or an engine of the user's own."""

    def sync(self, policy: nn.Module) -> None:
        """Take over the present weights of `policy`; called before each `generate`."""

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: list[int],
        pad_token_id: int,
        generator: torch.Generator,
    ) -> Samples:
        """One response to each prompt (token ids), drawn at `temperature` from the whole distribution; `generator` is a
        source of reproducible numbers."""
        ...


class OwnSampler:
    """The function `generate` with the synced model itself: no copy of its weights stays between two calls."""

    def sync(self, policy: nn.Module) -> None:
        """Remember which model answers."""
        self.policy = policy

    def generate(self, prompts: list[list[int]], **options: Any) -> Samples:
        """As Sampler.generate."""
        return generate(cast(PreTrainedModel, self.policy), prompts, **options)


def stream(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | list[int],
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the response to one prompt token by token, the end token included and last. Parameters as in `generate`."""
    sampling = Sampling(temperature, top_k, top_p, min_p)
    _check_lengths(model, [prompt], max_new_tokens)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    uniform = _uniform(max_new_tokens, 1, generator)
    tokens = torch.tensor([prompt], device=model.device)
    ours = isinstance(model, GPTForCausalLM)
    with borrowed(model, 1, len(prompt) + max_new_tokens) if ours else nullcontext() as decoder:
        cache = None if ours else DynamicCache(config=model.config)
        for step, u in enumerate(uniform.to(model.device)):
            with torch.inference_mode():  # inside the loop: the caller's code runs between two tokens
                if not ours:
                    logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
                elif step == 0:
                    logits = decoder.prefill(tokens, starts=tokens.new_zeros(1))
                else:
                    logits = decoder.step(tokens[:, 0])
                token, _ = sampling.draw(logits, u)
                tokens = token[:, None]
            yield int(token)
            if int(token) in ends:
                return


# ----------------------------------------------------------------------------------------------------------------------
# Our GPT


def _respond(
    model: GPTForCausalLM, prompts: Tensor, starts: Tensor, uniform: Tensor, sampling: Sampling, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P), their first real slots (B,), uniform (R, B) → tokens (B, R), logprobs (B, R).

    What stands after an end token is of no meaning. On CPU rows that have ended leave the batch; on CUDA, where a step
    takes as long for a few rows as for many, the captured step keeps its shape until all have.
    """
    steps, rows = uniform.shape
    tokens = torch.zeros(rows, steps, dtype=torch.long, device=prompts.device)
    logprobs = torch.zeros(rows, steps, device=prompts.device)
    ends = torch.tensor(ends, device=prompts.device)
    active = torch.arange(rows, device=prompts.device)  # the rows still in the decoder
    running = torch.ones(rows, dtype=torch.bool, device=prompts.device)  # of these, the ones that have not ended
    with borrowed(model, rows, prompts.shape[1] + steps) as decoder:
        logits = decoder.prefill(prompts, starts)
        for step in range(steps):
            token, logprob = sampling.draw(logits, uniform[step, active])
            tokens[active, step], logprobs[active, step] = token, logprob
            running = running & ~torch.isin(token, ends)
            if step == steps - 1:
                break
            if not decoder.fixed or step % LOOK == 0:
                left = int(running.sum())
                if left == 0:
                    break
                # Finished rows leave when half of them have: each time the cache is copied once
                if left <= len(active) // 2 and not decoder.fixed:
                    decoder.keep(running)
                    active, token, running = active[running], token[running], running[running]
            logits = decoder.step(token)
    return tokens, logprobs


# ----------------------------------------------------------------------------------------------------------------------
# Any other causal model


class _Draw(LogitsProcessor):
    """Our sampling inside transformers' greedy search: all but the drawn token get −inf."""

    def __init__(self, sampling: Sampling, uniform: Tensor):
        self.sampling, self.uniform = sampling, uniform
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logprob = self.sampling.draw(scores, self.uniform[len(self.tokens)])
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """The model's own generation_config set aside: transformers fills in from it what a call leaves open, and bans,
    penalties and least lengths would sample from another distribution than the one whose log-probabilities we give."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _respond_with_transformers(
    model: PreTrainedModel, prompts: Tensor, starts: Tensor, uniform: Tensor, sampling: Sampling, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """As _respond, for any model that transformers can generate with."""
    draw = _Draw(sampling, uniform)
    config = GenerationConfig(
        max_new_tokens=len(uniform),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=ends[0],  # after the end nothing is read
    )
    training = model.training
    model.eval()
    try:
        mask = (torch.arange(prompts.shape[1], device=prompts.device) >= starts[:, None]).long()
        with _without_defaults(model):
            model.generate(
                prompts, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([draw])
            )
    finally:
        model.train(training)
    tokens, logprobs = torch.stack(draw.tokens, 1), torch.stack(draw.logprobs, 1)
    missing = len(uniform) - tokens.shape[1]  # all rows ended early
    return F.pad(tokens, (0, missing)), F.pad(logprobs, (0, missing))


# ----------------------------------------------------------------------------------------------------------------------
# In and out


def _check_lengths(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1 or not prompts:
        raise UserError(f"nothing to sample: max_new_tokens is {max_new_tokens}" if prompts else "no prompts to answer")
    limit = getattr(model.config, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens; a prompt needs at least one")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, which with {max_new_tokens} new ones is more than the "
                f"model's {limit} positions; shorten the prompt or the response"
            )


def _uniform(steps: int, rows: int, generator: torch.Generator | None) -> Tensor:
    """(steps, rows) numbers in [0, 1), made where the generator lives."""
    return torch.rand(steps, rows, generator=generator, device="cpu" if generator is None else generator.device)


def _left_pad(prompts: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """→ (B, P) long, padded on the left, and the slot where each row starts (B,)."""
    longest = max(map(len, prompts))
    padded = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(padded), torch.tensor([longest - len(prompt) for prompt in prompts])


def _pack(
    prompts: list[list[int]], tokens: Tensor, logprobs: Tensor, ends: list[int], pad_token_id: int, device: torch.device
) -> Samples:
    """Put prompts and what was drawn for them into Samples; whatever follows an end token is dropped."""
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_end = torch.isin(tokens, torch.tensor(ends))
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
    longest = int(lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    tokens = tokens[:, :longest].masked_fill(~inside, pad_token_id)
    sequences = torch.full((len(prompts), int(prompt_lengths.max()) + longest), pad_token_id)
    for row, prompt in enumerate(prompts):
        sequences[row, : len(prompt)] = torch.tensor(prompt)
        sequences[row, len(prompt) : len(prompt) + longest] = tokens[row]
    logprobs = logprobs[:, :longest].masked_fill(~inside, 0.0)
    return Samples(*(part.to(device) for part in (sequences, prompt_lengths, lengths, ended, logprobs)))
