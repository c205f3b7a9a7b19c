"""Decoding with our own GPT: keys and values of earlier tokens are kept, so that a step computes one token a row.

At a few million parameters a decode step is bound by the overhead of each call and by reading the kept keys and values,
so the weights that read the same input are fused, and a step makes about twenty calls a layer, all of them on plain
tensors. A step's shapes do not change from token to token: it reads every slot of the cache, and a bias of −inf hides
the slots that are empty or padding. On CUDA it is therefore captured once as a graph and replayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.family import head_size
from pipeline.model.fast_cpu import pair_up
from pipeline.model.gpt import Block, GPTForCausalLM, RMSNorm, rotary_angles

BLOCK = 32  # slots that the cache on CPU grows by: fewer are copied too often, more are read while empty
ROWS = 64  # that packed weights are laid out for; any other number multiplies, too
KEPT = 4  # decoders that stay with a model on CUDA: each shape of (rows, slots) that comes again and again needs one

Weights = dict[str, Tensor]
Fused = tuple[list[Weights], Weights]


class Decoder:
    """A GPTForCausalLM made ready for decoding: fused weights, kept keys and values, no autograd.

    B rows, up to `slots` tokens a row. First `prefill`, then `step` by `step`. Rows are padded on the left, so that all
    of them write the same slot at the same step. Call it in inference mode. `fused` are the model's weights as `fuse`
    returns them, where several decoders share them.
    """

    def __init__(self, model: GPTForCausalLM, rows: int, slots: int, fused: Fused | None = None):
        config, device = model.config, model.device
        self.heads, self.size = config.num_attention_heads, head_size(config)
        self.groups = config.num_key_value_heads or self.heads
        self.layers, self.ends = fused or fuse(model, rows)
        self.eps, self.device, self.dtype = config.rms_norm_eps, device, self.ends["head"].dtype
        # fp32 on CPU, where attention is faster in it
        self.cache_dtype = torch.float32 if device.type == "cpu" else self.dtype
        angles = rotary_angles(torch.arange(slots, device=device)[None], config)
        self.turns = torch.complex(*angles)[0, :, 0]  # (slots, K/2): e^{i·position·θ^(−2j/K)}
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)  # the slot of each row's first real token
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # the next one to write; `filled` for the device
        self.filled = 0
        # (B·G, S, K) for each layer. A CUDA graph needs fixed memory. On CPU S grows with the text: leaving the empty
        # slots out of a larger tensor's products would leave gaps between one row's keys and the next row's, and a
        # batched product over memory with gaps takes up to twice the time.
        empty = torch.zeros(rows * self.groups, 0, self.size, dtype=self.cache_dtype, device=device)
        self.keys, self.values = [empty] * len(self.layers), [empty] * len(self.layers)
        self.bias = torch.zeros(rows, 1, 0, device=device)  # (B, 1, S), added to the scores
        self.graph: torch.cuda.CUDAGraph | None = None
        self.fixed = captures(device)
        if self.fixed:
            self._make_room(slots)

    def load(self, model: GPTForCausalLM) -> None:
        """Take over the model's present weights, in place: a captured graph reads them where they were."""
        layers, ends = fuse(model, len(self.starts))
        for own, present in zip([*self.layers, self.ends], [*layers, ends], strict=True):
            for name in own:
                own[name].copy_(present[name])
        for cache in (*self.keys, *self.values):
            cache.zero_()  # nothing of an earlier call stays, were it NaN

    def prefill(self, prompts: Tensor, starts: Tensor) -> Tensor:
        """Left-padded prompts (B, P) long, each row's first real slot (B,) → fp32 logits after the prompts (B, V)."""
        rows, count = prompts.shape
        self._make_room(count + 1)
        self.filled = count
        self.slot.fill_(count)
        self.starts.copy_(starts)
        slots = torch.arange(self.bias.shape[-1], device=self.device)
        self.bias.zero_().masked_fill_(((slots < starts[:, None]) | (slots >= count))[:, None], float("-inf"))
        slots, mask = slots[:count], None
        if bool((starts > 0).any()):
            seen = (slots <= slots[:, None]) & (slots >= starts[:, None, None])  # (B, P, P)
            mask = (seen | (slots == slots[:, None]))[:, None]  # a row of the softmax needs something to see
        turns = self.turns[(slots - starts[:, None]).clamp_(min=0)][:, :, None]  # (B, P, 1, K/2)
        with torch.autocast(self.device.type, enabled=False):
            x = F.embedding(prompts, self.ends["embedding"]).float()
            for layer, weights in enumerate(self.layers):
                # (B, H or G, P, K)
                q, k, v = (part.transpose(1, 2).to(self.cache_dtype) for part in self._project(weights, x, turns))
                for cache, part in ((self.keys[layer], k), (self.values[layer], v)):
                    cache.view(rows, self.groups, -1, self.size)[:, :, :count] = part
                if layer == len(self.layers) - 1:  # nobody reads what the earlier tokens would become
                    q, x, mask = q[:, :, -1:], x[:, -1:], None if mask is None else mask[:, :, -1:]
                causal, grouped = mask is None and q.shape[2] > 1, self.heads != self.groups
                attended = F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=causal, scale=1.0, enable_gqa=grouped
                )
                x = self._add(weights, x, attended.transpose(1, 2).flatten(2))
            return self._logits(x[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of each row (B,) long → fp32 logits after it (B, V), valid until the next step."""
        self._make_room(self.filled + 1)
        self.filled += 1
        if self.graph is None:
            return self._step(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (B,) bool only. Not for a captured step, whose shapes are fixed."""
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                caches[layer] = cache.unflatten(0, (len(rows), self.groups))[rows].flatten(0, 1)
        self.starts, self.bias = self.starts[rows], self.bias[rows]

    def capture(self) -> None:
        """Record `_step` as a CUDA graph, before the first prefill.

        Not run yet on a GPU. Tests run `_step` on CPU, also as a recording of its operations that is played again.
        """
        self.tokens = torch.zeros_like(self.starts)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once before the capture, for what libraries set up on their first call
            self._step(self.tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step(self.tokens)

    def _step(self, tokens: Tensor) -> Tensor:
        """What `step` computes. On CUDA where to write and what to see is in tensors alone: one recording does."""
        rows, slots = len(tokens), self.bias.shape[-1]
        by_group = (rows * self.groups, -1, self.size)
        self.bias.index_fill_(-1, self.slot, 0.0)
        turns = self.turns[self.slot - self.starts][:, None]  # (B, 1, K/2)
        with torch.autocast(self.device.type, enabled=False):
            x = F.embedding(tokens, self.ends["embedding"]).float()  # (B, D): the residual stream stays in fp32
            for weights, keys, values in zip(self.layers, self.keys, self.values, strict=True):
                q, k, v = self._project(weights, x, turns)
                for cache, part in ((keys, k), (values, v)):
                    if self.fixed:
                        cache.index_copy_(1, self.slot, part.reshape(by_group).to(cache.dtype))
                    else:  # the same without copies in between, 4 to 7 % of a step
                        cache.view(rows, self.groups, slots, -1)[:, :, self.filled - 1] = part
                q = q.reshape(by_group).to(keys.dtype)
                # The H/G queries that share a key head are the rows of one small matrix product
                scores = torch.bmm(q, keys.transpose(1, 2)).view(rows, self.heads, slots)
                weighting = (scores + self.bias).softmax(-1).to(keys.dtype).view(rows * self.groups, -1, slots)
                x = self._add(weights, x, torch.bmm(weighting, values).view(rows, -1))
            self.slot += 1
            return self._logits(x)

    def _project(self, weights: Weights, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, D), turns (…, 1, K/2) → queries (…, H, K), divided by √K, keys and values (…, G, K)."""
        h = F.rms_norm(x, x.shape[-1:], weights["norm_1"], self.eps).to(self.dtype)
        qkv = linear(h, weights["qkv"], weights.get("qkv_bias")).unflatten(-1, (-1, self.size))  # (…, H + 2G, K)
        qk, v = qkv.split((self.heads + self.groups, self.groups), dim=-2)
        qk = qk.float()
        if "qk_norm" in weights:
            qk = F.rms_norm(qk, (self.size,), None, self.eps) * weights["qk_norm"]
        qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        return *qk.split((self.heads, self.groups), dim=-2), v

    def _add(self, weights: Weights, x: Tensor, attended: Tensor) -> Tensor:
        """x (…, D) plus what the heads read, attended (…, H·K), plus the MLP of that."""
        x = x + linear(attended.to(self.dtype), weights["out"], weights.get("out_bias"))
        h = F.rms_norm(x, x.shape[-1:], weights["norm_2"], self.eps).to(self.dtype)
        gate, up = linear(h, weights["gate_up"], weights.get("gate_up_bias")).chunk(2, dim=-1)
        return x + linear(F.silu(gate).mul_(up), weights["down"], weights.get("down_bias"))

    def _logits(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], self.ends["norm"], self.eps)
        return linear(x.to(self.dtype), self.ends["head"]).float()

    def _make_room(self, needed: int) -> None:
        """At least `needed` slots; new ones are zero (0 · NaN would be NaN) and hidden."""
        have = self.bias.shape[-1]
        if needed > have:
            more = -(-needed // BLOCK) * BLOCK - have
            self.keys = [F.pad(cache, (0, 0, 0, more)) for cache in self.keys]
            self.values = [F.pad(cache, (0, 0, 0, more)) for cache in self.values]
            self.bias = F.pad(self.bias, (0, more), value=float("-inf"))


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def compute_dtype(model: GPTForCausalLM, rows: int) -> torch.dtype:
    """Of the matrix products: autocast's, else the weights'. On CPU one row is computed in the weights' own: to cast
    SmolLM2 takes as long as 80 tokens save, and a chat has a call for each answer."""
    if torch.is_autocast_enabled(model.device.type) and (captures(model.device) or rows > 1):
        return torch.get_autocast_dtype(model.device.type)
    return model.model.embed_tokens.weight.dtype


def fuse(model: GPTForCausalLM, rows: int) -> Fused:
    """The weights for decoding `rows` rows: one dictionary a block, and one of embedding, last norm and head.

    On CPU they are meant for one call: what needs no other form is not copied.
    """
    dtype, copy = compute_dtype(model, rows), captures(model.device)

    def made(weight: Tensor) -> Tensor:
        return prepacked(weight.detach().to(dtype, copy=copy), rows)

    ends = {
        "embedding": model.model.embed_tokens.weight.detach().to(copy=copy),
        "norm": model.model.norm.weight.detach().to(torch.float32, copy=True),
        "head": made(model.lm_head.weight),
    }
    blocks = (fuse_block(cast(Block, block), dtype) for block in model.model.layers)
    return [{name: made(w) for name, w in matrices.items()} | norms for matrices, norms in blocks], ends


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """A weight (out, in) in the layout in which oneDNN multiplies on CPU; where it cannot, and a bias, as it is.

    A step multiplies few rows by weights that come from memory: MKL and oneDNN's plain product would lay each of them
    out anew every time, a quarter of the product's own time. torch.compile uses the same two operations. One row in
    fp32 is a product with a vector, which reads the plain layout faster.
    """
    if weight.device.type != "cpu" or weight.dim() == 1 or not torch.backends.mkldnn.is_available():
        return weight
    in_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    in_fp32 = weight.dtype == torch.float32 and rows > 1
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if in_bf16 or in_fp32 else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in), a weight as `prepacked` returns it → (…, out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def fuse_block(block: Block, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """The block's matrices and biases, those that read the same input joined in `dtype`, and its norms in fp32."""
    attention, mlp, size = block.self_attn, block.mlp, block.self_attn.head_dim
    # 1/√K goes into the queries' norm weight, else into their matrix and bias
    q_norm, k_norm, root = attention.q_norm, attention.k_norm, size**-0.5
    normed = isinstance(q_norm, RMSNorm)

    def joined(*parts: Tensor) -> Tensor:
        whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=dtype, device=parts[0].device)
        for place, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part.detach())  # and cast on the way: to join in fp32 first takes three times as long
        return whole

    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Rotary pairs side by side, so that one complex product turns them all
        q, k = (pair_up(part.detach(), size) for part in (q, k))
        return joined(q if normed else q * root, k, v)

    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    fused = {
        "qkv": turned(*(part.weight for part in linears)),
        "out": attention.o_proj.weight,
        "gate_up": joined(mlp.gate_proj.weight, mlp.up_proj.weight),
        "down": mlp.down_proj.weight,
    }
    if attention.q_proj.bias is not None:
        fused["qkv_bias"] = turned(*(part.bias for part in linears))
    if attention.o_proj.bias is not None:
        fused["out_bias"] = attention.o_proj.bias
    if mlp.down_proj.bias is not None:
        fused["gate_up_bias"] = joined(mlp.gate_proj.bias, mlp.up_proj.bias)
        fused["down_bias"] = mlp.down_proj.bias
    norms: Weights = {"norm_1": block.input_layernorm.weight, "norm_2": block.post_attention_layernorm.weight}
    if isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
        heads, groups = (part.out_features // size for part in linears[:2])
        scales = pair_up(q_norm.weight, size) * root, pair_up(k_norm.weight, size)
        norms["qk_norm"] = torch.cat((scales[0].expand(heads, -1), scales[1].expand(groups, -1)))
    # Detached: F.rms_norm takes a slow composed form for a weight with a gradient, even in inference mode
    return fused, {name: weight.detach().to(torch.float32, copy=True) for name, weight in norms.items()}


# ----------------------------------------------------------------------------------------------------------------------
# On CUDA, one capture for all calls of the same shape


def captures(device: torch.device) -> bool:
    """Whether decoders there record their step once and play it again."""
    return device.type == "cuda"


_kept: WeakKeyDictionary[GPTForCausalLM, dict[tuple[int, int, torch.dtype], Decoder]] = WeakKeyDictionary()


@contextmanager
def borrowed(model: GPTForCausalLM, rows: int, slots: int, fused: Fused | None = None) -> Iterator[Decoder]:
    """A decoder with the model's present weights, for as long as the `with` lasts.

    On CUDA it is kept with the model afterwards, graph and memory, for the next call with as many rows and, rounded
    up, slots; the KEPT last ones used are. On CPU there is nothing to capture, and it is made anew, of `fused` weights
    where the caller has them.
    """
    if not captures(model.device):
        with torch.inference_mode():
            decoder = Decoder(model, rows, slots, fused)
        yield decoder
        return
    kept = _kept.setdefault(model, {})
    shape = (rows, -(-slots // BLOCK) * BLOCK, compute_dtype(model, rows))
    with torch.inference_mode():
        if shape in kept:
            decoder = kept.pop(shape)  # not in the store while in use: two streams must not share one
            decoder.load(model)
        else:
            decoder = Decoder(model, *shape[:2])
            decoder.capture()
    yield decoder
    kept[shape] = decoder
    for oldest in list(kept)[:-KEPT]:
        del kept[oldest]
