"""Text out of a model: batched sampling with a KV cache, and the log-probability of every token that was sampled.

`generate` answers a batch of prompts, `stream` one prompt token by token. Our own GPT runs through a lean decode loop
(decoder.py); any other causal model runs through transformers' `generate`, with the same sampling code and the same
result.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.errors import UserError
from pipeline.model.decoder import Decoder, Fused, borrowed, captures, fuse
from pipeline.model.gpt import MLP, Attention, Block, GPTForCausalLM, GPTModel, RMSNorm
from pipeline.model.lora import without_wrapper
from pipeline.text.lengths import positions_of

# What the decoder knows
PARTS = {GPTModel, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList}
LOOK = 16  # steps on CUDA from one look at which rows have ended to the next: each makes the host wait for the device


@dataclass
class Samples:
    """Prompts and their sampled responses. N rows, R tokens in the longest response, T in the longest row.

    sequences (N, T) long: row i is prompt_i, then response_i, then padding on the right.
    prompt_lengths, response_lengths (N,) long; a response's length counts its end token.
    ended (N,) bool: an end token was sampled; False means cut at max_new_tokens.
    logprobs (N, R) fp32: log-probability of each response token after temperature and before top-k, top-p and min-p
    (temperature 0: at temperature 1); 0 after the end. None where a sampler of one's own does not know them.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    ended: Tensor
    logprobs: Tensor | None

    def answers(self, with_end: bool = False) -> list[list[int]]:
        """Each response as token ids, with its end token where it has one or without."""
        ends = self.prompt_lengths + self.response_lengths - (0 if with_end else self.ended.long())
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
        warpers: list[Any] = [TopKLogitsWarper(self.top_k)] if self.top_k > 0 else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        warpers += [MinPLogitsWarper(self.min_p)] if self.min_p > 0 else []
        for warper in warpers:
            logprobs = warper(None, logprobs)  # none of them looks at the tokens so far
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
    rounding. Under bf16 autocast the matrix products run in bf16, the logits and softmax in fp32; those of a single
    prompt on CPU run in the weights' precision, which is no slower. Raises UserError for an empty prompt, one too long
    for the model's positions, or impossible sampling parameters.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    _check_lengths(model, prompts, max_new_tokens)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    # Drawn at once and in the prompts' order, so that neither batching nor rows that finish early change a sample
    uniform = _uniform(max_new_tokens, len(prompts), generator)
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)
    logprobs = torch.zeros(len(prompts), max_new_tokens)
    lengths, device = torch.tensor([len(prompt) for prompt in prompts]), model.device
    batches = lengths.argsort(stable=True).split(batch_size or len(prompts))  # like lengths together: least padding
    with torch.inference_mode():
        fused = fuse(model, len(batches[0])) if _is_ours(model) and not captures(device) else None
        for rows in batches:
            padded = pad_sequence([torch.tensor(prompts[row]) for row in rows], True, pad_token_id, "left")
            starts, random = padded.shape[1] - lengths[rows], uniform[:, rows.to(uniform.device)]
            drawn = _respond(model, padded.to(device), starts.to(device), random.to(device), sampling, ends, fused)
            tokens[rows], logprobs[rows] = (part.cpu() for part in drawn)
    return _pack(prompts, tokens, logprobs, ends, pad_token_id, device)


class Sampler(Protocol):
    """What answers prompts during PPO: this module's OwnSampler, or an engine of the user's own."""

    def sync(self, policy: nn.Module) -> None:
        """Take over the present weights of `policy`; called before each round of `generate`: an update's answers, or
        those to all held-out prompts, policy's and reference's apart."""

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
    token, slots = tokens[0, -1:], len(prompt) + max_new_tokens
    lent: AbstractContextManager[Decoder | _CachedForward] = (
        borrowed(model, 1, slots) if _is_ours(model) else nullcontext(_CachedForward(model))
    )
    with lent as decoder:
        for step, u in enumerate(uniform.to(model.device)):
            with torch.inference_mode():  # inside the loop: the caller's code runs between two tokens
                logits = decoder.step(token) if step else decoder.prefill(tokens, tokens.new_zeros(1))
                token, _ = sampling.draw(logits, u)
            yield int(token)
            if int(token) in ends:
                return


# ----------------------------------------------------------------------------------------------------------------------
# Our GPT


def _is_ours(model: nn.Module) -> TypeGuard[GPTForCausalLM]:
    """Whether the decoder computes what the model's forward pass does: for our GPT, not for one that changes it."""
    if not isinstance(model, GPTForCausalLM) or getattr(model.forward, "__func__", None) is not GPTForCausalLM.forward:
        return False
    return all(type(part) in PARTS for part in model.modules() if part is not model)


def _respond(
    model: PreTrainedModel,
    prompts: Tensor,
    starts: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    ends: list[int],
    fused: Fused | None,
) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P), their first real slots (B,), uniform (R, B) → tokens (B, R), logprobs (B, R).

    What stands after an end token is of no meaning. On CPU rows that have ended leave the batch; on CUDA, where a step
    takes as long for a few rows as for many, the captured step keeps its shape until all have.
    """
    if not _is_ours(model):
        return _respond_with_transformers(model, prompts, starts, uniform, sampling, ends)
    steps, rows = uniform.shape
    tokens = torch.zeros(rows, steps, dtype=torch.long, device=prompts.device)
    logprobs = torch.zeros(rows, steps, device=prompts.device)
    end_tokens = torch.tensor(ends, device=prompts.device)
    active = torch.arange(rows, device=prompts.device)  # the rows still in the decoder
    running = torch.ones(rows, dtype=torch.bool, device=prompts.device)  # of these, the ones that have not ended
    with borrowed(model, rows, prompts.shape[1] + steps, fused) as decoder:
        logits = decoder.prefill(prompts, starts)
        for step in range(steps):
            token, logprob = sampling.draw(logits, uniform[step, active])
            tokens[active, step], logprobs[active, step] = token, logprob
            running = running & ~torch.isin(token, end_tokens)
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


class _CachedForward:
    """One row's tokens through a model's own forward and cache, by the names of Decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)

    def prefill(self, prompts: Tensor, starts: Tensor) -> Tensor:
        return self.model(prompts, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """The model's own generation_config set aside: transformers fills in from it what a call leaves open, and bans,
    penalties and least lengths would sample from another distribution than the one whose log-probabilities we give."""
    inner = without_wrapper(model)
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _respond_with_transformers(
    model: Any, prompts: Tensor, starts: Tensor, uniform: Tensor, sampling: Sampling, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """As _respond, for any model that transformers can generate with."""
    draw = _Draw(sampling, uniform)
    # Greedy by default; after the end nothing is read, so any id pads
    config = GenerationConfig(max_new_tokens=len(uniform), eos_token_id=ends, pad_token_id=ends[0])
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
    limit = positions_of(model)
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
    texts = [torch.cat((torch.tensor(prompt), row)) for prompt, row in zip(prompts, tokens, strict=True)]
    sequences = pad_sequence(texts, True, pad_token_id)
    logprobs = logprobs[:, :longest].masked_fill(~inside, 0.0)
    return Samples(*(part.to(device) for part in (sequences, prompt_lengths, lengths, ended, logprobs)))
