"""The exact judge of stories: every sentence is parsed against the table of frames and happens in a simulated world.

`check` gives every sub-check in [0, 1], `gold` their weighted mean times a length factor. Nothing here is learned and
nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..formats import text_of
from .grammar import parse, split_sentences
from .spec import Spec, parse_prompt
from .world import World

WEIGHTS = {
    # Obedience, 0.60: what the instruction asked for. It needs the prompt, so that no text is good for every prompt.
    "words": 0.25,  # the share of the required words that stand in a sentence of the grammar
    "ending": 0.20,  # the last sentence closes the story in the way that was asked
    "name": 0.15,  # the first person of the story is the one that was asked
    # Coherence, 0.40: what makes any story good.
    "pronouns": 0.10,  # names and pronouns mean people who are there, of the right gender
    "continuity": 0.10,  # things, animals, places: nothing held by two, lost things stay lost until they are found
    "grammar": 0.10,  # the share of sentences that parse
    "repeats": 0.05,  # no sentence is told twice
    "close": 0.05,  # the last sentence is whole and a closing one, and no other is
}
FULL_LENGTH = 4
"""Distinct sentences in grammar for full marks; with fewer, gold shrinks in proportion: one line scores low."""
LEEWAY = 1.5
"""Gold shrinks too once fewer than 1/LEEWAY of the sentences are distinct and in grammar: loops and padding are bad."""


def check(prompt_text: str, story: str) -> dict[str, float]:
    """Every sub-check of WEIGHTS and `length`, the factor, each in [0, 1].

    Raises ValueError for a prompt that states no spec.
    """
    spec = parse_prompt(prompt_text)
    sentences = split_sentences(story)
    parsed = [parse(sentence) for sentence in sentences]
    told = [sentence for sentence in parsed if sentence is not None]
    world = World()
    faults = [world.apply(frame, values) for frame, values in told]
    return _obedience(spec, parsed, world) | {
        "pronouns": _graded(sum(names for names, _ in faults)),
        "continuity": _graded(sum(things for _, things in faults)),
        **_form(sentences, parsed),
    }


def score(checks: dict[str, float]) -> float:
    """Sub-checks → gold: the weighted mean times the length factor."""
    return round(sum(weight * checks[name] for name, weight in WEIGHTS.items()) * checks["length"], 6)


def gold(prompts: Sequence, completions: Sequence, **columns: Sequence) -> list[float]:
    """Gold scores in [0, 1]; 1.0 only where every check passes.

    `prompts` and `completions` are texts or message lists, one completion a prompt. Further columns are accepted and
    ignored, as reward functions are called with the whole row. Raises ValueError for a prompt that states no spec.
    """
    return [
        score(check(text_of(prompt), text_of(completion)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _graded(faults: int) -> float:
    """No fault 1, one 1/2, two or more 0."""
    return max(0.0, 1.0 - faults / 2)


def _obedience(spec: Spec, parsed: list, world: World) -> dict[str, float]:
    found = {value for sentence in parsed if sentence for value in sentence[1]}
    return {
        "words": sum(word in found for word in spec.words) / len(spec.words),
        "ending": float(bool(parsed) and parsed[-1] is not None and parsed[-1][0].label == spec.ending),
        "name": float(world.protagonist == spec.name),
    }


def _form(sentences: list[str], parsed: list) -> dict[str, float]:
    """What can be seen without the world: grammar, repeats, the close, and the length factor."""
    total = max(1, len(sentences))
    closings = [sentence is not None and bool(sentence[0].label) for sentence in parsed]
    distinct = len({text for text, sentence in zip(sentences, parsed, strict=True) if sentence is not None})
    return {
        "grammar": sum(sentence is not None for sentence in parsed) / total,
        "repeats": _graded(len(sentences) - len(set(sentences))),
        "close": float(bool(closings) and closings[-1]) * _graded(sum(closings[:-1])),
        "length": min(1.0, distinct / FULL_LENGTH) * min(1.0, LEEWAY * distinct / total),
    }
