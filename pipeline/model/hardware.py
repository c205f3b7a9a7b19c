"""What this machine can do: bfloat16 in hardware, memory that a process keeps."""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of handing it back to the system to be zeroed and mapped anew.

    A training step frees and takes the same megabytes hundreds of times: at the size of our PPO benchmark that made
    17,000 page faults for each step of policy and critic (LOG.md). It is glibc's setting; with another C library, or
    settings of the user's own, nothing is done.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not chosen:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)  # of a thread too: less, and it gives whole pieces of 64 MB back


def bf16_in_hardware() -> bool:
    """Whether the GPU, or without one the CPU, multiplies bfloat16 matrices itself; elsewhere fp32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_bf16(mixed_precision: str) -> bool:
    """Resolve the field `mixed_precision`."""
    return mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())
