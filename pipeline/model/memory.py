"""What models and their training take, in bytes that can be counted, and what this machine has.

Weights, gradients and an optimizer's moments follow from the parameters. Activations are counted where autograd keeps
them, in a forward pass that runs: exact on any device and for any architecture.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pipeline.model.logprobs import CHUNK_ELEMENTS

CGROUPS = (  # the limit of a container and what it uses: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# What PyTorch and oneDNN say on a CPU; CUDA has a type of its own
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory", "out of memory")


def weight_bytes(*models: nn.Module | None) -> int:
    """Bytes of the parameters and buffers of models, whatever they share counted once."""
    tensors = {id(t): t for model in models if model is not None for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def trained_count(*models: nn.Module | None) -> int:
    """Parameters that an optimizer changes."""
    return sum(p.numel() for p in _trained(models))


def gradient_bytes(*models: nn.Module | None) -> int:
    """Bytes of the gradients of all trained parameters."""
    return sum(p.numel() * p.element_size() for p in _trained(models))


def _trained(models: Iterable[nn.Module | None]) -> list[nn.Parameter]:
    found = {id(p): p for model in models if model is not None for p in model.parameters() if p.requires_grad}
    return list(found.values())


def moments(optimizer: Any) -> list[tuple[nn.Parameter, int]]:
    """Each trained parameter with the number of tensors of its size that the optimizer keeps: two for AdamW (Loshchilov
    & Hutter 2019), one for Muon (model/optim.py)."""
    groups = [(group["params"], 1 if group.get("use_muon") else 2) for group in optimizer.param_groups]
    return [(parameter, count) for parameters, count in groups for parameter in parameters]


def moment_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's moments after its first step."""
    return sum(count * p.numel() * p.element_size() for p, count in moments(optimizer))


def make_moments(optimizer: Any) -> None:
    """Make AdamW's moments now, the zeros that its first step would begin with; other optimizers stay as they are.

    Then they lie below what comes and goes. Made in the first step, between activations and gradients, they leave gaps
    in a CPU's heap that nothing fits into any more: 1.1 of 6.5 GB of PPO at SmolLM2's shape (LOG.md).
    """
    whole = getattr(optimizer, "optimizer", optimizer)  # in Accelerate's wrapper
    for part in getattr(whole, "halves", [whole]):  # of MuonWithAdamW
        for group in part.param_groups if type(part) is torch.optim.AdamW else ():
            for p in group["params"]:
                if p.requires_grad and p not in part.state:
                    step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                    part.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def stand_ins(optimizer: Any, copies: int = 0) -> list[Tensor]:
    """What the optimizer's first step will still take, and `copies` times the gradients beside it, taken now.

    Written to, because a system gives no memory to what nobody has written.
    """
    state = optimizer.state
    return [torch.ones_like(p) for p, count in moments(optimizer) for _ in range(copies + (0 if p in state else count))]


# ---- what a forward and a backward pass take ------------------------------------------------------------------------


@dataclass
class Passed:
    """Bytes that a forward and backward pass takes beside weights and gradients."""

    kept: int
    """By autograd for the backward pass; what gradient checkpointing computes again is not in it."""
    peak: int
    """The most at a time: what is kept, logits, gradients of activations."""


def measured(forward: Callable[[], Tensor], *models: nn.Module | None) -> Passed:
    """Run `forward`, which gives a loss, and the backward pass, and count what they take.

    The gradients of `models` are there before, so that they are not counted; they are set to None in the end.
    """
    device, kept = next(p.device for model in models if model is not None for p in model.parameters()), [0]
    for parameter in _trained(models):
        parameter.grad = torch.zeros_like(parameter)

    def work() -> None:
        with counting(kept, *models):
            loss = forward()
        loss.backward()

    peak = peak_of(work, device)
    for parameter in _trained(models):
        parameter.grad = None
    return Passed(kept[0], peak)


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that `work` has at a time, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]  # taken, or given back
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


@contextlib.contextmanager
def counting(total: list[int], *models: nn.Module | None) -> Iterator[None]:
    """Add to `total[0]` what autograd keeps of forward passes in this context, beside the parameters of `models`."""
    own = (p for model in models if model is not None for p in model.parameters())
    kept: dict[int, Any] = {p.untyped_storage().data_ptr(): None for p in own}  # held, so that no address comes again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    kept.clear()


@dataclass(frozen=True)
class Line:
    """Bytes as a function of rows: `fixed` (weights in another precision, …) + `row` a row."""

    fixed: float = 0.0
    row: float = 0.0

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """The line through two points (rows, bytes) of different rows."""
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, first[1] - slope * first[0]), slope)

    def __call__(self, rows: int) -> float:
        return self.fixed + self.row * rows


def logit_bytes(tokens: int, vocab_size: int) -> int:
    """fp32 logits of so many positions, or of as many as are taken at a time (model/logprobs.py)."""
    return 4 * min(tokens * vocab_size, max(vocab_size, CHUNK_ELEMENTS))


# ---- what the machine has -------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that lie in the machine's memory."""
    return psutil.Process().memory_info().rss


def available(device: torch.device) -> int:
    """Bytes that this process could have in all: what it has and what is free, of the GPU or of the machine.

    In a container, no more than its limit leaves.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return resident() + max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, of the GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
