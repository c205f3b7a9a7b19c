"""What an instruction asks for, in words and back: name, required words, ending; and which of these are held out."""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random
from typing import NamedTuple

from .lexicon import ENDINGS, REQUIRED, TEST_NAMES, TRAIN_NAMES

WORDINGS = {
    "Write a story about {name}. Use: {words}. Ending: {ending}.": 0.6,
    "Tell me about {name}. Words: {words}. Ending: {ending}.": 0.2,
    "Write a {ending} story about {name} with {words}.": 0.2,
}
"""Wordings of the instruction and how often each is used. {words} is a list with commas."""

HELD_OUT_NAME_SHARE = 1 / 3
"""Of held-out prompts; all of them have a held-out pair of words."""

_INDEX = {word: index for index, word in enumerate(REQUIRED)}
_PATTERNS = [
    re.compile(
        re.escape(wording)
        .replace(r"\{name\}", r"(?P<name>[A-Z][a-z]+)")
        .replace(r"\{words\}", r"(?P<words>[a-z]+(?:, [a-z]+)*)")
        .replace(r"\{ending\}", f"(?P<ending>{'|'.join(ENDINGS)})")
    )
    for wording in WORDINGS
]


class Spec(NamedTuple):
    """What a story was asked to be."""

    name: str
    words: tuple[str, ...]
    ending: str


def held_out_pair(first: str, second: str) -> bool:
    """True for the fifth of all pairs of required words that no training prompt may contain, in either order."""
    a, b = sorted((_INDEX[first], _INDEX[second]))
    return (3 * a + 7 * b) % 5 == 0


def draw(rng: Random, held_out: bool) -> Spec:
    """A random spec: two words. A held-out one has a held-out pair, and a third of them a held-out name.

    No training prompt has either.
    """
    name = rng.choice(TEST_NAMES if held_out and rng.random() < HELD_OUT_NAME_SHARE else TRAIN_NAMES)
    while True:
        first, second = rng.sample(REQUIRED, 2)
        if held_out_pair(first, second) == held_out:
            return Spec(name, (first, second), rng.choice(ENDINGS))


def write_prompt(rng: Random, spec: Spec) -> str:
    """A spec in one of the wordings."""
    (wording,) = rng.choices(list(WORDINGS), list(WORDINGS.values()))
    return wording.format(name=spec.name, words=", ".join(spec.words), ending=spec.ending)


@lru_cache(maxsize=50_000)
def parse_prompt(text: str) -> Spec:
    """The spec that a prompt states. Raises ValueError if it is in none of the wordings."""
    for pattern in _PATTERNS:
        match = pattern.search(text)
        if match:
            return Spec(match["name"], tuple(match["words"].split(", ")), match["ending"])
    raise ValueError(
        f"the gold judge of the stories cannot read what this prompt asks for: {text!r}; it knows the form "
        f"'{next(iter(WORDINGS))}' with an ending of {', '.join(ENDINGS)}"
    )
