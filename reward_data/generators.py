"""Generators of data sets: what one has to offer, and the names that the field `dataset` knows them by.

A generator is a module with the names of `Generator`; it inherits from nothing. How to add one:
docs/extending.md.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Literal, Protocol, cast, runtime_checkable

from reward_data.formats import Row

Split = Literal["train", "validation", "test", "preferences", "ppo"]

GENERATORS = {"stories": "reward_data.stories", "reviews": "reward_data.reviews"}
"""The name in `dataset`, and the module, which is imported when it is first needed."""


@runtime_checkable
class Generator(Protocol):
    """What the stages call, always by keyword.

    `seed` sets the order, or what is made up; the same arguments give the same result on every machine. `split` names
    the side: nothing that is asked or told in "validation" and "test" may be in the others, whatever the seed.

    A generator that has no rows of one kind raises NotImplementedError there, with a sentence on where to get them
    instead. For a split that it does not have it raises ValueError with those it has; for files that are missing,
    ValueError or FileNotFoundError with what to do. The user reads these sentences as they are.
    """

    ENDLESS: bool
    """Whether it makes up as much as is asked for. Then it is never called with None for `max_bytes` or `size`."""

    def corpus(self, seed: int, max_bytes: int | None, split: Split) -> Iterable[str]:
        """Documents to pretrain on, as many as fit `max_bytes` of UTF-8, or all. Splits: train and validation.

        May be an iterator, which is read as far as it is needed (`streaming: true`).
        """

    def instructions(self, seed: int, size: int | None, split: Split) -> Iterable[Row]:
        """Rows {"prompt": messages, "completion": messages}, at most `size`, or all. Splits: train, validation, test.

        Messages are lists of {"role", "content"}, made by `formats.user` and `formats.assistant`.
        """

    def prompts(self, seed: int, size: int | None, split: Split) -> Iterable[Row]:
        """Rows {"prompt": messages}, at most `size`, or all; further columns are given to reward functions.

        Splits: preferences, ppo, validation, test.
        """

    def preferences(self, seed: int, split: Split) -> Iterable[Row]:
        """All rows {"prompt": messages, "chosen": messages, "rejected": messages}. Splits: train, validation, test."""


def load_generator(name: str) -> Generator:
    """The generator that `GENERATORS` names."""
    return cast(Generator, import_module(GENERATORS[name]))
