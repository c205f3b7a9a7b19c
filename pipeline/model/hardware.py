"""What this machine can do: bfloat16 in hardware, memory that a process keeps, two networks side by side."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")
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


@contextlib.contextmanager
def handing_back_memory() -> Iterator[None]:
    """Hand back what is free after all, before and after work of other threads: these have stores of their own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    yield
    if trim is not None:
        trim(0)


def side_by_side(calls: Sequence[Callable[[], ResultT]], at_once: bool) -> list[ResultT]:
    """The calls' results in order; `at_once`: each call in a thread of its own, with its share of PyTorch's threads.

    For calls that write nothing in common. Two networks on one thread each learn faster than one after the other on
    two, since no product waits for its other half. Grad mode and CPU autocast are those of the caller.
    """
    threads = torch.get_num_threads()
    share = threads // len(calls)
    if not at_once or len(calls) == 1 or share == 0:
        return [call() for call in calls]
    grad, autocast, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def inside(call: Callable[[], ResultT]) -> ResultT:
        # Where the caller is in no autocast region, none here, not even a disabled one: weights in bf16 are kept until
        # the outermost region ends, which would be after the optimizer steps inside it
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
            return call()

    torch.set_num_threads(share)  # MKL's number is common to all threads, OpenMP's is each thread's own
    try:
        with ThreadPoolExecutor(len(calls), initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return list(pool.map(inside, calls))
    finally:
        torch.set_num_threads(threads)


def bf16_in_hardware() -> bool:
    """Whether the GPU, or without one the CPU, multiplies bfloat16 matrices itself; elsewhere fp32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_bf16(mixed_precision: str) -> bool:
    """Resolve the field `mixed_precision`."""
    return mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())
