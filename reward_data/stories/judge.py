"""The exact judge of stories: every sentence is parsed against the frame table and happens in a simulated world.

`check` gives each sub-check in [0, 1], `gold` their weighted mean times a length factor. Nothing here is learned and nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from .grammar import parse, split_sentences
from .lexicon import GENDER
from .spec import Spec, parse_prompt
from .world import World

WEIGHTS = {
    # Obedience, 0.60: what the instruction asked for. It needs the prompt, so no text is good for every prompt.
    "words": 0.25,  # the share of the required words that stand in a sentence of the grammar
    "ending": 0.20,  # the last sentence closes the story in the asked way
    "name": 0.15,  # the first person of the story is the asked one
    # Coherence, 0.40: what makes any story good.
    "pronouns": 0.10,  # names and pronouns mean people who are there, of the right gender
    "continuity": 0.10,  # things, animals and places: nothing is held by two, lost things stay lost until found
    "grammar": 0.10,  # the share of sentences that parse
    "repeats": 0.05,  # no sentence is told twice
    "close": 0.05,  # the last sentence is whole and a closing one, and no other is
}
FULL_LENGTH = 4
"""Distinct sentences in grammar that a story needs for full marks; with fewer, gold shrinks in proportion (texts of one line score low)."""
REPEAT_LEEWAY = 1.5
"""Gold also shrinks once distinct sentences in grammar are less than 1/1.5 of all sentences, so that loops and padding score low."""


def text_of(x: str | Sequence[dict[str, str]], role: str) -> str:
    """Plain text of a prompt or completion given as text or as messages: the last message of `role`, or the last of all."""
    if isinstance(x, str):
        return x
    for message in reversed(x):
        if message["role"] == role:
            return message["content"]
    return x[-1]["content"] if x else ""


def check(prompt_text: str, story: str) -> dict[str, float]:
    """Every sub-check of `WEIGHTS` and `length` (the factor), each in [0, 1]. Raises ValueError for a prompt that states no spec."""
    return _check(parse_prompt(prompt_text), story)


def score(checks: dict[str, float]) -> float:
    """Sub-checks → gold: the weighted mean times the length factor."""
    return round(sum(weight * checks[name] for name, weight in WEIGHTS.items()) * checks["length"], 6)


def gold(prompts: Sequence, completions: Sequence, **columns: Sequence) -> list[float]:
    """Gold scores in [0, 1]; 1.0 only where every check passes.

    `prompts` and `completions` are texts or message lists, one completion a prompt. Further columns are accepted and ignored, as TRL's
    reward functions are called with the whole row. Raises ValueError for a prompt that states no spec.
    """
    return [
        _gold(text_of(prompt, "user"), text_of(completion, "assistant"))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@lru_cache(maxsize=50_000)
def _gold(prompt: str, story: str) -> float:
    return score(check(prompt, story))


def _graded(faults: int) -> float:
    """No fault 1, one ½, two or more 0."""
    return max(0.0, 1.0 - faults / 2)


def _check(spec: Spec, story: str) -> dict[str, float]:
    sentences = split_sentences(story)
    parsed = [parse(sentence) for sentence in sentences]
    good = [p for p in parsed if p is not None]
    world = World()
    names = things = 0
    found: set[str] = set()
    first_person = None
    for frame, values in good:
        n, t = world.apply(frame, values)
        names, things = names + n, things + t
        found.update(values)
    for _, values in good:
        first_person = next((value for value in values if value in GENDER), None)
        if first_person:
            break
    distinct = len({s for s, p in zip(sentences, parsed, strict=True) if p is not None})
    repeated = len(sentences) - len(set(sentences))
    label = parsed[-1][0].label if parsed and parsed[-1] else ""
    early = sum(bool(frame.label) for frame, _ in (good[:-1] if label else good))
    total = max(1, len(sentences))
    return {
        "words": sum(word in found for word in spec.words) / max(1, len(spec.words)),
        "ending": float(label == spec.ending),
        "name": float(first_person == spec.name),
        "pronouns": _graded(names),
        "continuity": _graded(things),
        "grammar": len(good) / total,
        "repeats": _graded(repeated),
        "close": float(bool(label)) * _graded(early),
        "length": min(1.0, distinct / FULL_LENGTH) * min(1.0, REPEAT_LEEWAY * distinct / total),
    }
