"""How much of the machine is used: the operations a model needs, over the most that the machine can do.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B) = tokens/s · FLOPs a token / peak FLOP/s. The peak is
measured here, not taken from a data sheet: the fastest matrix product in the precision of the training.
"""

import time

import torch
from transformers import PretrainedConfig

MEASURE_SECONDS = 0.1  # of repeated products of one width
WIDTHS = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # small ones fit the cache, large ones keep every core busy


def flops_per_token(config: PretrainedConfig, tokens_in_row: int) -> int:
    """FLOPs of forward and backward a trained token, 6·N + 12·L·H·K·T (PaLM, appendix B, for rows of T tokens).

    N are the weights that multiply: the matrices of the L blocks (attention with H query heads and G key/value heads of
    size K, SwiGLU of width M) and the head V·D, tied or not. Looking up an embedding, norms and biases cost next to
    nothing. 6 = 2 (multiply, add) · 3 (forward, gradient of the inputs, gradient of the weights). As in PaLM, scores
    that the causal mask drops count, and work done twice (gradient checkpointing) does not.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    attention = config.hidden_size * size * (2 * heads + 2 * groups)
    block = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * block + config.vocab_size * config.hidden_size
    return 6 * weights + 12 * config.num_hidden_layers * heads * size * tokens_in_row


@torch.no_grad()
def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of square matrices of `dtype` on `device`; takes a quarter of a second.

    With the threads that torch has now. On a machine that others use too, it is what they leave.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)  # its own: measuring must not change what is trained
    peak = 0.0
    for width in WIDTHS.get(device.type, (1024,)):
        a, b = (torch.randn(width, width, device=device, generator=generator).to(dtype) for _ in range(2))
        torch.mm(a, b)  # the first call sets up
        until = time.perf_counter() + MEASURE_SECONDS
        while True:
            _wait(device)
            started = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            peak = max(peak, 2 * width**3 / (time.perf_counter() - started))
            if time.perf_counter() > until:
                break
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
