"""Text out of a model: batched sampling with a KV cache, and the log-probability of every token that was sampled.

`generate` answers a batch of prompts, `stream` one prompt token by token. Our own GPT runs through a lean decode loop
(`Decoder`); any other causal model runs through transformers' `generate`, with the same sampling code and the same
result. Why a loop of our own: at a few million parameters a decode step is bound by the overhead of each call, and
here a step makes about fifteen calls a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pipeline.errors import UserError
from pipeline.gpt import GPTForCausalLM


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


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Filters are applied in transformers' order: top-k, top-p, min-p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
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
    with torch.inference_mode():
        if isinstance(model, GPTForCausalLM):
            decoder = Decoder(model, rows=1, slots=len(prompt) + max_new_tokens, starts=tokens.new_zeros(1))
        else:
            cache = DynamicCache(config=model.config)
    for u in uniform.to(model.device):
        with torch.inference_mode():  # inside the loop: the caller's code runs between two tokens
            if isinstance(model, GPTForCausalLM):
                logits = decoder.forward(tokens)
            else:
                logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
            token, _ = sampling.draw(logits, u)
            tokens = token[:, None]
        yield int(token)
        if int(token) in ends:
            return


# ----------------------------------------------------------------------------------------------------------------------
# The decode loop for our GPT


class Decoder:
    """A GPTForCausalLM made ready for decoding: fused weights, key/value tensors of fixed size, no autograd.

    rows B, slots S: the cache holds S tokens a row. starts (B,) is the slot of each row's first real token: rows are
    padded on the left, so that all of them write the same slot at the same step.
    """

    def __init__(self, model: GPTForCausalLM, rows: int, slots: int, starts: Tensor):
        config, device = model.config, model.device
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps, self.embedding = config.rms_norm_eps, model.model.embed_tokens.weight
        # Detached: F.rms_norm takes a slow composed form for a weight with a gradient, even in inference mode
        self.norm = model.model.norm.weight.detach().float()
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else self.embedding.dtype
        self.head = model.lm_head.weight.to(self.dtype)
        self.layers = [self._fuse(block) for block in model.model.layers]
        cache = (len(self.layers), rows, self.groups, slots, self.size)
        # fp32 on CPU, where attention is faster in it
        cache_dtype = torch.float32 if device.type == "cpu" else self.dtype
        self.keys = torch.empty(cache, dtype=cache_dtype, device=device)
        self.values = torch.empty(cache, dtype=cache_dtype, device=device)
        self.filled = 0
        self.starts = starts
        self.padded = bool((starts > 0).any())
        exponents = torch.arange(0, self.size, 2, device=device, dtype=torch.float32) / self.size
        angles = torch.arange(slots, device=device)[:, None] * config.rope_parameters["rope_theta"] ** -exponents
        self.turns = torch.polar(torch.ones_like(angles), angles)  # (S, K/2): e^{i·position·θ^(−2j/K)}
        slot = torch.arange(slots, device=device)
        # Added to the scores: a row does not see the slots before its start. (B, 1, 1, S)
        self.bias = torch.zeros(rows, slots, device=device).masked_fill_(slot < starts[:, None], float("-inf"))
        self.bias = self.bias[:, None, None]

    def _fuse(self, block) -> dict[str, Tensor]:
        attention, mlp, size = block.self_attn, block.mlp, self.size
        # Rotary pairs (i, i + K/2) are moved side by side, in queries and keys alike, which changes no score: then one
        # complex product turns them all
        pairs = torch.arange(size, device=attention.q_proj.weight.device).view(2, -1).T.flatten()
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear.weight.unflatten(0, (-1, size)) for linear in linears)
        fused = {
            "qkv": torch.cat((q[:, pairs], k[:, pairs], v)).flatten(0, 1),
            "out": attention.o_proj.weight,
            "gate_up": torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            "down": mlp.down_proj.weight,
        }
        if attention.q_proj.bias is not None:
            q, k, v = (linear.bias.unflatten(0, (-1, size)) for linear in linears)
            fused["qkv_bias"] = torch.cat((q[:, pairs], k[:, pairs], v)).flatten()
            fused["out_bias"] = attention.o_proj.bias
        fused = {name: weight.to(self.dtype).contiguous() for name, weight in fused.items()}
        # 1/√K goes into the queries' norm weight
        q_norm, k_norm = attention.q_norm.weight[pairs] * size**-0.5, attention.k_norm.weight[pairs]
        return fused | {
            "qk_norm": torch.cat((q_norm.expand(self.heads, -1), k_norm.expand(self.groups, -1))).float(),
            "norm_1": block.input_layernorm.weight.detach().float(),
            "norm_2": block.post_attention_layernorm.weight.detach().float(),
        }

    def forward(self, tokens: Tensor) -> Tensor:
        """The next T tokens of each row, (B, T) long → fp32 logits after the last of them, (B, V)."""
        count, start = tokens.shape[1], self.filled
        self.filled = end = start + count
        slots = torch.arange(start, end, device=tokens.device)
        positions = (slots - self.starts[:, None]).clamp_(min=0)
        turns = self.turns[positions][:, :, None]  # (B, T, 1, K/2)
        with torch.autocast(tokens.device.type, enabled=False):
            x = F.embedding(tokens, self.embedding).float()  # the residual stream stays in fp32
            for layer, weights in enumerate(self.layers):
                attended = self._attend(layer, weights, x, turns, start, end)
                x = x + F.linear(attended.to(self.dtype), weights["out"], weights.get("out_bias")).float()
                h = F.rms_norm(x, x.shape[-1:], weights["norm_2"], self.eps).to(self.dtype)
                gate, up = F.linear(h, weights["gate_up"]).chunk(2, dim=-1)
                x = x + F.linear(F.silu(gate).mul_(up), weights["down"]).float()
            x = F.rms_norm(x[:, -1], x.shape[-1:], self.norm, self.eps)
            return F.linear(x.to(self.dtype), self.head).float()

    def _attend(self, layer: int, weights: dict[str, Tensor], x: Tensor, turns: Tensor, start: int, end: int) -> Tensor:
        """x (B, T, D) → what the heads read, (B, T, H·K) fp32; slots [start, end) of the cache are written."""
        h = F.rms_norm(x, x.shape[-1:], weights["norm_1"], self.eps).to(self.dtype)
        qkv = F.linear(h, weights["qkv"], weights.get("qkv_bias")).unflatten(-1, (-1, self.size))  # (B, T, H + 2G, K)
        qk, v = qkv.split((self.heads + self.groups, self.groups), dim=2)
        qk = F.rms_norm(qk.float(), (self.size,), None, self.eps) * weights["qk_norm"]
        qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        q, k = qk.transpose(1, 2).split((self.heads, self.groups), dim=1)  # (B, H, T, K), (B, G, T, K)
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, start:] = k
        values[:, :, start:] = v.transpose(1, 2)
        if end - start == 1:
            # The H/G queries that share a key head are the rows of one small matrix product
            q = q.reshape(len(x), self.groups, -1, self.size).to(keys.dtype)  # (B, G, H/G, K)
            scores = q @ keys.transpose(2, 3)  # (B, G, H/G, slots)
            if self.padded:
                scores += self.bias[..., :end]
            return (scores.softmax(-1) @ values).flatten(1)[:, None]
        mask = None
        if self.padded or start > 0:
            slots = torch.arange(end, device=x.device)
            mask = slots <= slots[start:, None]  # (T, slots)
            mask = (mask & (slots >= self.starts[:, None, None])) | (slots == slots[start:, None])
            mask = mask[:, None]
        grouped = self.heads != self.groups
        out = F.scaled_dot_product_attention(
            q.to(keys.dtype), keys, values, attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(2)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.starts, self.bias = self.starts[rows], self.bias[rows]


def _respond(
    model: GPTForCausalLM, prompts: Tensor, starts: Tensor, uniform: Tensor, sampling: Sampling, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Left-padded prompts (B, P), their first real slots (B,), uniform (R, B) → tokens (B, R), logprobs (B, R).

    What stands after an end token is of no meaning.
    """
    steps, rows = uniform.shape
    tokens = torch.zeros(rows, steps, dtype=torch.long, device=prompts.device)
    logprobs = torch.zeros(rows, steps, device=prompts.device)
    ends = torch.tensor(ends, device=prompts.device)
    decoder = Decoder(model, rows, prompts.shape[1] + steps, starts)
    active = torch.arange(rows, device=prompts.device)  # the rows still in the decoder
    running = torch.ones(rows, dtype=torch.bool, device=prompts.device)  # of these, the ones that have not ended
    given = prompts
    for step in range(steps):
        token, logprob = sampling.draw(decoder.forward(given), uniform[step, active])
        tokens[active, step], logprobs[active, step] = token, logprob
        running = running & ~torch.isin(token, ends)
        left = int(running.sum())
        if left == 0:
            break
        if left <= len(active) // 2:  # finished rows leave when half of them have: each time the cache is copied once
            decoder.keep(running)
            active, token, running = active[running], token[running], running[running]
        given = token[:, None]
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
