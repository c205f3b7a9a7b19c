"""The two halves of a block with gradients written by hand, for CPU. Skip this file at first: `gpt.py` says the same.

What is computed is what `gpt.Block` says in plain PyTorch; tests/test_fast_cpu.py holds values and gradients against
it. A training step on CPU whose matrix products run in bf16 is bound by memory, so here queries, keys and values come
out of one product, gate and up of another, nothing is converted back and forth or stored twice, and attention leaves
out most of the scores that the causal mask would drop (PyTorch's own is two to three times slower in either precision).
The residual stream and the norms are fp32; matrix products run in `dtype`, bf16 or fp32.

Shapes: x (B, T, D) fp32 is the residual stream, h = norm(x) in `dtype`; H query heads, G key/value heads of size K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUERIES = 64  # of one block in attention: smaller ones waste fewer masked scores, larger ones make fewer calls
LONGEST = 512  # tokens of a row: beyond, the probabilities that attention keeps take too much memory


# Products run in the precision of their inputs: a cast to what they have already, for custom_fwd to switch autocast off
forward_without_autocast = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
backward_without_autocast = torch.amp.custom_bwd(device_type="cpu")


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


def norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y = r·x⊙w over the last dimension of x (…, D) fp32 → y in `dtype` and r = 1/√(mean(x²) + ε), (…, 1)."""
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * r
    return torch.mul(y, weight, out=y if dtype == y.dtype else torch.empty_like(y, dtype=dtype)), r


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """grad_x = r·(g⊙w) − x·r³·⟨g⊙w, x⟩/D and grad_w = Σ r·g⊙x, both fp32, for g (…, D) in any precision."""
    size = x.shape[-1]
    product = (grad * x).view(-1, size)
    grad_weight = product.T @ r.view(-1)
    coefficient = (product @ weight).view(r.shape).mul_(r**3).div_(-size)
    grad_x = torch.mul(grad, weight, out=product.view(x.shape)).mul_(r)
    return grad_x.addcmul_(x, coefficient), grad_weight


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """softmax(q·kᵀ + causal mask)·v for q (already divided by √K), k and v (B·H, T, K) → the same shape.

    Block by block of queries, so that most masked scores are never computed; the softmax computes in fp32 inside. Also
    returns the blocks' probabilities, B·H·T²/2 numbers, for the backward.
    """
    out, probabilities = torch.empty_like(q), []
    mask = q.new_full((QUERIES, QUERIES), float("-inf")).triu_(1)
    for start in range(0, q.shape[1], QUERIES):
        rows = slice(start, min(start + QUERIES, q.shape[1]))
        own = rows.stop - start
        scores = torch.bmm(q[:, rows], k[:, : rows.stop].transpose(1, 2))  # (B·H, own, start + own)
        scores[:, :, start:] += mask[:own, :own]
        probabilities.append(scores.softmax(-1))
        out[:, rows] = torch.bmm(probabilities[-1], v[:, : rows.stop])
    return out, probabilities


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B·H, T, K)."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, p in zip(range(0, q.shape[1], QUERIES), probabilities, strict=True):
        rows, seen = slice(start, p.shape[2]), slice(0, p.shape[2])
        grad_v[:, seen] += torch.bmm(p.transpose(1, 2), grad[:, rows])
        grad_p = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)  # p⊙(grad_p − Σ p⊙grad_p)
        grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen])
        grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
    return grad_q, grad_k, grad_v


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs (x_2i, x_2i+1) of x (B, T, heads, K) fp32 by complex numbers (1 or B, T, 1, K/2)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def pair_up(x: Tensor, size: int) -> Tensor:
    """Move the rotary pairs (i, i + K/2) of each head's K rows side by side: (heads·K, …), permuted.

    Done to queries and keys alike it changes no score, and one complex product then rotates them all.
    """
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def part_pairs(x: Tensor, size: int) -> Tensor:
    """The inverse of pair_up."""
    return x.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)


def by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H or G, K) → (B·H, T, K); of fewer heads each is repeated."""
    x = x.transpose(1, 2)
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return packed(x, dtype).flatten(0, 1)


def by_token(x: Tensor, heads: int, groups: int) -> Tensor:
    """(B·H, T, K) → (B, T, G, K), what by_head repeated summed: its inverse for gradients."""
    x = x.unflatten(0, (-1, heads))
    if heads != groups:
        x = x.unflatten(1, (groups, -1)).sum(2)
    return x.transpose(1, 2)


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x in `dtype` without gaps, in one pass."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)


class AttentionHalf(torch.autograd.Function):
    """x + W_o·attention(rotate(norm(W_q·h)), rotate(norm(W_k·h)), W_v·h) with h = norm(x).

    Queries, keys and values have biases, and queries and keys norms, or None.
    """

    @staticmethod
    @forward_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        bq: Tensor | None,
        bk: Tensor | None,
        bv: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        turns: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        size = 2 * turns.shape[-1]
        heads, groups = len(wq) // size, len(wk) // size
        # 1/√K goes into the queries' norm weight, else into their matrix and bias
        scale = size**-0.5 if q_norm is None else 1.0
        w = torch.cat((pair_up(wq, size) * scale, pair_up(wk, size), wv)).to(dtype)
        b = None
        if bq is not None and bk is not None and bv is not None:
            b = torch.cat((pair_up(bq, size) * scale, pair_up(bk, size), bv)).to(dtype)
        h, r = norm_forward(x, norm, eps, dtype)
        q, k, v = F.linear(h, w, b).unflatten(-1, (-1, size)).split((heads, groups, groups), dim=2)
        z_q, z_k = packed(q, torch.float32), packed(k, torch.float32)
        for_norms: tuple[Tensor, ...] = ()
        if q_norm is not None and k_norm is not None:
            q, q_norm, k, k_norm = z_q, pair_up(q_norm, size) * size**-0.5, z_k, pair_up(k_norm, size)
            (z_q, r_q), (z_k, r_k) = norm_forward(q, q_norm, eps, q.dtype), norm_forward(k, k_norm, eps, k.dtype)
            for_norms = q, q_norm, r_q, k, k_norm, r_k
        by_heads = [by_head(part, heads, dtype) for part in (turn(z_q, turns), turn(z_k, turns), v)]
        out, probabilities = attention_forward(*by_heads)
        out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
        wo = wo.to(dtype)
        ctx.groups, ctx.scale, ctx.biased, ctx.normed = groups, scale, b is not None, len(for_norms)
        ctx.save_for_backward(x, norm, r, h, w, wo, turns, out, *by_heads, *for_norms, *probabilities)
        return x + F.linear(out, wo)

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, r, h, w, wo, turns, out, q_by_head, k_by_head, v_by_head, *rest = ctx.saved_tensors
        for_norms, probabilities = rest[: ctx.normed], rest[ctx.normed :]
        groups, size = ctx.groups, 2 * turns.shape[-1]
        heads = wo.shape[1] // size
        grad_y = grad.to(w.dtype)
        grad_wo = rows(grad_y).T @ rows(out)
        grad_out = by_head((grad_y @ wo).unflatten(-1, (-1, size)), heads, w.dtype)
        grads = attention_backward(grad_out, q_by_head, k_by_head, v_by_head, probabilities)
        # Into one tensor of (B, T, H + 2G, K), the gradient of the one product
        grad_qkv = torch.empty(*x.shape[:2], heads + 2 * groups, size, dtype=w.dtype)
        into_q, into_k, into_v = grad_qkv.split((heads, groups, groups), dim=2)
        into_v.copy_(by_token(grads[2], heads, groups))
        back = turns.conj().resolve_conj()
        norms: list[Tensor] = []
        for into, grad_part, count, saved in (
            (into_q, grads[0], heads, for_norms[:3]),
            (into_k, grads[1], groups, for_norms[3:]),
        ):
            grad_part = turn(packed(by_token(grad_part, heads, count), torch.float32), back)
            if saved:
                grad_part, grad_norm = norm_backward(grad_part, *saved)
                norms.append(part_pairs(grad_norm, size))
            into.copy_(grad_part)
        grad_qkv = grad_qkv.flatten(2)
        parts = heads * size, groups * size, groups * size
        grad_wq, grad_wk, grad_wv = (rows(grad_qkv).T @ rows(h)).float().split(parts)
        biases: list[Tensor | None] = [None] * 3
        if ctx.biased:
            grad_bq, grad_bk, grad_bv = rows(grad_qkv).sum(0, dtype=torch.float32).split(parts)
            biases = [part_pairs(grad_bq, size) * ctx.scale, part_pairs(grad_bk, size), grad_bv]
        grad_x, grad_norm = norm_backward(grad_qkv @ w, x, norm, r)
        grad_weights = part_pairs(grad_wq, size) * ctx.scale, part_pairs(grad_wk, size), grad_wv, grad_wo.float()
        of_norms = (norms[0] * size**-0.5, norms[1]) if norms else (None, None)
        return grad_x.add_(grad), grad_norm, *grad_weights, *biases, *of_norms, None, None, None


# ---- MLP ------------------------------------------------------------------------------------------------------------


class MLPHalf(torch.autograd.Function):
    """x + W_down·(silu(W_gate·h) ⊙ W_up·h) with h = norm(x)."""

    @staticmethod
    @forward_without_autocast
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        w, down = torch.cat((gate, up)).to(dtype), down.to(dtype)
        h, r = norm_forward(x, norm, eps, dtype)
        both = F.linear(h, w)
        gate, up = both.chunk(2, dim=-1)
        opened = F.silu(gate)
        product = opened * up
        ctx.save_for_backward(x, norm, r, h, w, both, opened, product, down)
        return x + F.linear(product, down)

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, r, h, w, both, opened, product, down = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad_y = grad.to(down.dtype)
        grad_down = rows(grad_y).T @ rows(product)
        grad_product = grad_y @ down
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad_product, opened, out=grad_up)
        torch.ops.aten.silu_backward(grad_product.mul_(up), gate, grad_input=grad_gate)
        grad_w = (rows(grad_both).T @ rows(h)).float()
        grad_x, grad_norm = norm_backward(grad_both @ w, x, norm, r)
        return grad_x.add_(grad), grad_norm, *grad_w.chunk(2), grad_down.float(), None, None


def rows(x: Tensor) -> Tensor:
    """(B, T, D) → (B·T, D)."""
    return x.flatten(0, 1)


# ---- a block of the GPT, of type Any here: gpt.py imports this file --------------------------------------------------


def projections(attention: Any) -> list[Any]:
    """The four matrices of attention."""
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def can_run(block: Any, x: Tensor) -> bool:
    """Whether `run` says exactly what the block says: stock parts in fp32 on CPU that nothing is attached to (LoRA,
    hooks), rows that are not too long, and no compiler at work, which has its own way to fuse."""
    attention, mlp = block.self_attn, block.mlp
    linears = [*projections(attention), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = {type(attention.q_norm), type(attention.k_norm)}
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] <= LONGEST
        and not torch.compiler.is_compiling()
        and not (attention.dropout and block.training)
        and all(type(part) is nn.Linear and (part.weight.dtype == x.dtype or is_frozen_bf16(part)) for part in linears)
        and all(part.bias is None for part in linears[3:])  # queries, keys and values may have biases
        and (norms == {type(block.input_layernorm)} or norms == {nn.Identity})
        and not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)
    )


def is_frozen_bf16(part: nn.Linear) -> bool:
    """Whether a matrix is kept as load.keep_products_in_bf16 keeps it."""
    return part.weight.dtype == torch.bfloat16 and not part.weight.requires_grad


def run(block: Any, x: Tensor, angles: tuple[Tensor, Tensor], keep: Tensor | None = None) -> Tensor:
    """One block of the GPT without padding on the left: x (B, T, D) → (B, T, D), both fp32, or with `keep` (1, N, D);
    `angles` and `keep` as in gpt.py."""
    attention, mlp = block.self_attn, block.mlp
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    norm, eps = block.input_layernorm.weight, block.input_layernorm.eps
    weights = [part.weight for part in projections(attention)]
    weights += [part.bias for part in projections(attention)[:3]]
    weights += [getattr(part, "weight", None) for part in (attention.q_norm, attention.k_norm)]
    x = AttentionHalf.apply(x, norm, *weights, torch.complex(*angles), eps, dtype)
    x = x if keep is None else x[keep][None]
    norm = block.post_attention_layernorm.weight
    return MLPHalf.apply(x, norm, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, eps, dtype)
