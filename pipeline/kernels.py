"""Two parts of the GPT with gradients written by hand, for CPU, where PyTorch's own are slow.

RMSNorm: autograd's backward is composed of a dozen passes over memory; this one takes a third of the time. Attention:
PyTorch's fused kernel in bf16 is twice as slow as in fp32; this one is twice as fast as that. Each computes what the
formula in its docstring says; tests/test_gpt.py holds values and gradients against it. On other devices, the GPT calls
PyTorch's functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64  # of one block in attention: smaller ones waste fewer masked scores, larger ones make fewer calls
LONGEST = 512  # tokens of a row: beyond, the probabilities that attention keeps take too much memory


class RMSNormFunction(torch.autograd.Function):
    """y = r·x⊙w with r = 1/√(mean(x²) + ε) over the last dimension; fp32.

    dx = r·(g⊙w) − x·r³·⟨g⊙w, x⟩/D and dw = Σ r·g⊙x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        # Detached, or PyTorch would take the composed form that its own backward needs
        return F.rms_norm(x.detach(), weight.shape, weight.detach(), eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        grad = grad.reshape(rows.shape)
        r = torch.linalg.vector_norm(rows, dim=-1).square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()  # (N,)
        product = grad * rows
        grad_weight = product.T @ r
        coefficient = (product @ weight).mul_(r**3).div_(-x.shape[-1])  # (N,)
        grad_x = torch.mul(grad, weight, out=product).mul_(r[:, None]).addcmul_(rows, coefficient[:, None])
        return grad_x.view(x.shape), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) ⊙ weight over the last dimension; x (…, D) and weight (D,) fp32."""
    if x.device.type == "cpu":
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class CausalAttentionFunction(torch.autograd.Function):
    """softmax(q·kᵀ + causal mask)·v for q (already divided by √K), k and v (N, T, K) in bf16.

    Block by block of queries, so that most of the scores that the mask would drop are never computed. The softmax
    computes in fp32 inside. The probabilities are kept for the backward, N·T²/2 of them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, probabilities = torch.empty_like(q), []
        mask = q.new_full((QUERIES, QUERIES), float("-inf")).triu_(1)
        for start in range(0, q.shape[1], QUERIES):
            rows = slice(start, min(start + QUERIES, q.shape[1]))
            own = rows.stop - start
            scores = torch.bmm(q[:, rows], k[:, : rows.stop].transpose(1, 2))  # (N, own, start + own)
            scores[:, :, start:] += mask[:own, :own]
            probabilities.append(scores.softmax(-1))
            out[:, rows] = torch.bmm(probabilities[-1], v[:, : rows.stop])
        ctx.save_for_backward(q, k, v, *probabilities)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *probabilities = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, p in zip(range(0, q.shape[1], QUERIES), probabilities, strict=True):
            rows, seen = slice(start, p.shape[2]), slice(0, p.shape[2])
            grad_v[:, seen] += torch.bmm(p.transpose(1, 2), grad[:, rows])
            grad_p = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)  # p⊙(grad_p − Σ p⊙grad_p)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen])
            grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        return grad_q, grad_k, grad_v


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√K + causal mask)·v in bf16: q (B, T, H, K), k and v (B, T, G, K) → (B, T, H, K) bf16."""
    batch, tokens, heads, size = q.shape

    def by_head(x: Tensor) -> Tensor:  # (B, T, G or H, K) → (B·H, T, K)
        x = x.transpose(1, 2).bfloat16()
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return x.reshape(-1, tokens, size)

    with torch.autocast("cpu", enabled=False):
        out = CausalAttentionFunction.apply(by_head(q * size**-0.5), by_head(k), by_head(v))
    return out.view(batch, heads, tokens, size).transpose(1, 2)
