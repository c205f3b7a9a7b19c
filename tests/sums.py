"""A third generator, made by the recipe of docs/extending.md: sums of two digits."""

from collections.abc import Iterator
from random import Random

from reward_data.formats import Row, assistant, user

ENDLESS = False
TERMS = [(a, b) for a in range(10) for b in range(10)]


def _terms(seed: int, split: str) -> list[tuple[int, int]]:
    """The pairs of one split: those that make 9 are the test, those that make 10 the validation."""
    held_out = {"test": 9, "validation": 10}
    wanted = held_out.get(split)
    chosen = [(a, b) for a, b in TERMS if (a + b == wanted if wanted else a + b not in held_out.values())]
    return Random(f"{split} {seed}").sample(chosen, len(chosen))


def corpus(seed: int, max_bytes: int | None, split: str) -> Iterator[str]:
    if split not in ("train", "validation"):
        raise ValueError(f"the sums have no corpus for {split!r}; choose train or validation")
    used = 0
    for a, b in _terms(seed, split):
        text = f"{a} + {b} = {a + b}"
        used += len(text)
        if max_bytes is not None and used > max_bytes:
            return
        yield text


def instructions(seed: int, size: int | None, split: str) -> list[Row]:
    rows = [{"prompt": user(f"{a} + {b}?"), "completion": assistant(str(a + b))} for a, b in _terms(seed, split)]
    return rows[:size]


def prompts(seed: int, size: int | None, split: str) -> list[Row]:
    return [{"prompt": user(f"{a} + {b}?"), "answer": a + b} for a, b in _terms(seed, split)][:size]


def preferences(seed: int, split: str) -> list[Row]:
    raise NotImplementedError("let stages.preferences make them")
