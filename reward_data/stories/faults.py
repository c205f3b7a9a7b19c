"""Planting faults into a told story: part of the texts are bad, so that a preference for good ones has what to teach.

Every fault is a function (rng, sentences) → sentences. Where a story offers no place for it, the sentences come back as
they were.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Any

from .grammar import GROUPS, parse
from .lexicon import AGREE, GENDER, NAMES, OBJECTS
from .telling import Teller
from .world import World

_FLIP = {"He": "She", "She": "He", "he": "she", "she": "he", "him": "her", "her": "him"}
_HOLDING = [
    frame for name in ("use", "give", "drop", "lose") for frame in GROUPS[name] if ("O", "it") not in frame.slots
]
"""Sentences whose subject has to hold the object."""


def _pick(rng: Random, items: Sequence) -> Any:
    return items[int(rng.random() * len(items))]


def wrong_pronoun(rng: Random, lines: list[str]) -> list[str]:
    """One pronoun gets the other gender.

    In a story with both genders it may now mean somebody else and be no fault.
    """
    order = list(range(len(lines)))
    rng.shuffle(order)
    for index in order:
        parsed = parse(lines[index])
        if parsed is None:
            continue
        frame, values = parsed[0], list(parsed[1])
        spots = [i for i, _ in frame.agree] + [i for i, _, _ in frame.people if values[i] in _FLIP]
        if spots:
            spot = _pick(rng, spots)
            pair = AGREE.get(frame.slots[spot][0])
            values[spot] = pair[values[spot] == pair[0]] if pair else _FLIP[values[spot]]
            return [*lines[:index], frame.render(values), *lines[index + 1 :]]
    return lines


def broken_continuity(rng: Random, lines: list[str]) -> list[str]:
    """One more sentence before the last, in which somebody uses or gives what they do not have.

    The object is lost, gone, held by another, or was never spoken of.
    """
    world = World()
    for line in lines[:-1]:
        if parsed := parse(line):
            world.apply(*parsed)
    if not world.people:
        return lines
    wrong = [(person, thing) for thing, holder in world.things.items() for person in world.people if holder != person]
    person, thing = _pick(rng, wrong or [(world.people[0], _pick(rng, [o for o in OBJECTS if o not in world.things]))])
    others = [other for other in world.people if other != person]
    frame = _pick(rng, [f for f in _HOLDING if others or all(variable != "Q" for variable, _ in f.slots)])
    bound = {"P": person, "O": thing, "Q": others[0] if others else ""}
    return [*lines[:-1], frame.render(Teller(rng, person).values(frame, bound, by_name=True)), lines[-1]]


def repeated(rng: Random, lines: list[str]) -> list[str]:
    """An earlier sentence once more, before the last."""
    return [*lines[:-1], _pick(rng, lines[:-1] or lines), lines[-1]]


def garbled(rng: Random, lines: list[str]) -> list[str]:
    """One sentence loses a word, doubles one or swaps two, so that it is in no frame."""
    for _ in range(8):
        index = int(rng.random() * len(lines))
        words = lines[index].split(" ")
        spot = int(rng.random() * (len(words) - 1))
        how = rng.random()
        if how < 0.4:
            del words[spot]
        elif how < 0.7:
            words.insert(spot, words[spot])
        else:
            words[spot : spot + 2] = reversed(words[spot : spot + 2])
        line = " ".join(words)
        if parse(line) is None:
            return [*lines[:index], line, *lines[index + 1 :]]
    return lines


def cut_off(rng: Random, lines: list[str]) -> list[str]:
    """The text stops in the middle of its last sentence, or before it."""
    words = lines[-1].split(" ")
    keep = int(rng.random() * len(words))
    return [*lines[:-1], " ".join(words[:keep])] if keep else lines[:-1]


def rambling(rng: Random, lines: list[str]) -> list[str]:
    """Somebody else's story begins in the middle of this one."""
    teller = Teller(rng)
    frame = _pick(rng, GROUPS["open.plain"])
    spot = 1 + int(rng.random() * (len(lines) - 1))
    return [*lines[:spot], frame.render(teller.values(frame, {"P": teller.name})), *lines[spot:]]


def wrong_name(rng: Random, lines: list[str], name: str, names: Sequence[str] = NAMES) -> list[str]:
    """All through the story the protagonist has another name of the same gender."""
    text = "\n".join(lines)
    others = [n for n in names if GENDER[n] == GENDER[name] and not re.search(rf"\b{n}\b", text)]
    return re.sub(rf"\b{name}\b", _pick(rng, others), text).split("\n")
