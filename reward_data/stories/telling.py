"""Telling one story: a simulation that chooses, sentence by sentence, a frame that can happen next.

A story has an opening, a middle, often a turn towards its ending, and a closing sentence that carries the
ending's label.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Sequence
from itertools import accumulate
from random import Random
from typing import TypeVar

from .grammar import CLOSINGS, GROUPS, TOKEN, Frame
from .lexicon import AGREE, ANIMALS, DECOR, GENDER, KIND_OF, NAMES, OBJECTS, PLACES
from .world import LOST, THERE, World

T = TypeVar("T")

MIDDLE_WEIGHTS = {
    "mid.plain": 8,
    "mid.talk": 3,
    "meet.friend": 4,
    "mid.two": 5,
    "mid.they": 2,
    "have.new": 2,
    "find.new": 3,
    "find.place": 1,
    "see.new": 2,
    "pick": 3,
    "want.new": 1,
    "want.other": 1,
    "use": 7,
    "use.two": 3,
    "give": 4,
    "take": 2,
    "have.friend": 1,
    "lose": 1,
    "seek": 4,
    "found": 4,
    "drop": 1,
    "break": 0.5,
    "animal.new": 3,
    "animal.place": 2,
    "animal.use": 7,
    "animal.thing": 3,
    "animal.bring": 1,
    "animal.steal": 1,
    "animal.return": 4,
    "animal.away": 0.7,
    "go": 2,
    "go.two": 2,
    "at": 3,
    "leave": 0.5,
}
"""How readily each group is told in the middle where it can happen; following up weighs more than bringing in."""

OPENINGS = tuple(name for name in GROUPS if name.startswith("open."))
OPEN_WITH = {"O": ("open.have", "open.want"), "A": ("open.animal",), "L": ("open.place", "open.at")}
"""Openings that can use a required word of each kind."""
INTRODUCE = {
    "O": ("have.new", "find.new", "find.place", "see.new", "want.new", "have.friend", "animal.bring"),
    "A": ("animal.new", "animal.place"),
    "L": ("go", "go.two", "at", "animal.place", "find.place"),
}
"""The same for the middle."""
TURNS = {
    "happy": ("turn.happy", "found", "found", "give", "have.new", "animal.return"),
    "sad": ("turn.sad", "lose", "lose", "break", "animal.away", "animal.steal", "leave"),
    "surprising": ("turn.surprising",),
}
TURN_SHARE = 0.6
"""How often the sentence before the closing is a turn."""
PRONOUN_SHARE = 0.65
"""How often a person whom a pronoun would mean is called by it."""
LONGEST_CLOSING = 11
"""Tokens that a story's budget keeps free for its closing."""

_MIDDLES = tuple(MIDDLE_WEIGHTS)
_MIDDLE_STEPS = tuple(accumulate(MIDDLE_WEIGHTS.values()))
_PRONOUNS = {"m": {"S": "He", "s": "he", "o": "him"}, "f": {"S": "She", "s": "she", "o": "her"}}


def token_count(text: str) -> int:
    """Words and punctuation marks: what a BPE would need if every word were one token."""
    return len(TOKEN.findall(text))


class Teller:
    """One story being told: `lines` are its sentences so far and `world` is the state after them.

    `name` is the protagonist (drawn from `names` if None), `words` are those that the story has to use, `names` those
    whom friends may have.
    """

    def __init__(
        self, rng: Random, name: str | None = None, words: Sequence[str] = (), names: Sequence[str] = NAMES
    ) -> None:
        self.rng = rng
        self.names = names
        self.name = name or self.pick(names)
        self.pending = list(words)
        self.world = World()
        self.lines: list[str] = []

    def pick(self, items: Sequence[T]) -> T:
        """A uniform choice, several times faster than Random.choice."""
        return items[int(self.rng.random() * len(items))]

    def story(self, ending: str, sentences: int, budget: int) -> list[str]:
        """Tell about `sentences` sentences in about `budget` tokens, using every pending word; close with `ending`.

        The budget goes before the number of sentences, and the words go before the budget.
        """
        room = budget - LONGEST_CLOSING
        self._open()
        used = token_count(self.lines[0])
        while self.pending or (used < room and len(self.lines) < sentences - 1):
            left = sentences - 1 - len(self.lines)
            tight = left <= len(self.pending) or used + 12 * len(self.pending) >= room - 12
            before = self.world, len(self.lines)
            if self.pending and (tight or self.rng.random() < 0.7):
                self._introduce()
            elif not (left == 1 and self.rng.random() < TURN_SHARE and self._turn(ending)):
                self._middle()
            used += token_count(self.lines[-1])
            if used > room and not self.pending and before[1] >= 3:
                self.world = before[0]  # one sentence too many: it never happened
                self.lines.pop()
        while not self.tell(self.pick(CLOSINGS[ending])):
            pass
        return self.lines

    def _open(self) -> None:
        groups: Sequence[str] = OPENINGS
        if self.pending and self.rng.random() < 0.6:
            groups = OPEN_WITH[KIND_OF[self.pick(self.pending)]]
        while not self.tell(self.pick(GROUPS[self.pick(groups)])):
            pass

    def _introduce(self) -> None:
        """Tell something that uses a pending word."""
        groups = INTRODUCE[KIND_OF[self.pick(self.pending)]]
        while not self.tell(self.pick(GROUPS[self.pick(groups)]), must_use=True):
            pass

    def _middle(self) -> None:
        while True:
            group = _MIDDLES[bisect(_MIDDLE_STEPS, self.rng.random() * _MIDDLE_STEPS[-1])]
            if self.tell(self.pick(GROUPS[group])):
                return

    def _turn(self, ending: str) -> bool:
        return any(self.tell(self.pick(GROUPS[self.pick(TURNS[ending])])) for _ in range(4))

    def tell(self, frame: Frame, must_use: bool = False) -> bool:
        """Let a frame happen next; False, with nothing changed, if it cannot, or does not use a pending word."""
        bound = self._bind(frame)
        if bound is None or (must_use and not any(word in self.pending for word in bound.values())):
            return False
        values = self.values(frame, bound)
        world = self.world.copy()
        if world.apply(frame, values) != (0, 0):
            return False
        line = frame.render(values)
        if line in self.lines:
            return False
        self.world = world
        self.lines.append(line)
        self.pending = [word for word in self.pending if word not in values]
        return True

    def _bind(self, frame: Frame) -> dict[str, str] | None:
        """Choose people and things for a frame's slots, or None where there are none to choose."""
        bound: dict[str, str] = {}
        people = self.world.people
        for _, variable, form in frame.people:
            if form == "+":
                bound[variable] = self.name if variable == "P" else self.pick(self.names)
            elif variable == "P":
                bound["P"] = self.name if len(people) == 1 or self.rng.random() < 0.75 else self.pick(people)
        if any(variable == "Q" for _, variable, _ in frame.people) and "Q" not in bound:
            # The protagonist stays to the end.
            subject = bound.get("P", self.name)
            others = [n for n in people if n != subject and not (frame.group == "leave" and n == self.name)]
            if not others:
                return None
            bound["Q"] = self.pick(others)
        for _, variable, form, determiner in frame.things:
            choices = self._choices(frame, variable, form, determiner, bound)
            if not choices:
                return None
            bound[variable] = self.pick(choices)
        return bound

    def _choices(self, frame: Frame, variable: str, form: str, determiner: str, bound: dict[str, str]) -> Sequence[str]:
        """What may fill a slot for an object, animal or place; `tell` still tries whether it can happen."""
        world = self.world
        verb, *arguments = next((effect for effect in frame.effects if variable in effect), ("",))
        if variable == "L":
            return [world.place] if verb == "at" and world.place else self._new(PLACES, (world.place,))
        if variable == "A":
            if determiner == "a":
                return self._new(ANIMALS, world.animals)
            return [animal for animal, here in world.animals.items() if here == (verb != "miss")]
        if determiner == "a" and form != "it":
            return self._new(OBJECTS, world.things)
        if verb == "pick":
            holders: Collection[str] = (THERE,)
        elif verb in ("seek", "refind"):
            holders = (LOST, *world.animals)
        elif verb in ("know", "want", "steal"):
            holders = world.things.values()
        else:
            holders = (bound[arguments[2 if verb == "take" else 0]],)
        return [o for o, holder in world.things.items() if holder in holders and (form != "it" or o == world.it)]

    def _new(self, words: Sequence[str], known: Collection[str | None]) -> Sequence[str]:
        """Pending words of this kind where there are any, else some other word."""
        waiting = [word for word in self.pending if word in words and word not in known]
        return waiting or (self.pick(words),)

    def values(self, frame: Frame, bound: dict[str, str], by_name: bool = False) -> list[str]:
        """The words for a frame's slots: names or pronouns for people, decor at random, no word twice."""
        gender = GENDER.get(bound.get("P", ""), "m")
        values: list[str] = []
        for variable, form in frame.slots:
            if variable in DECOR:
                value = self.pick(DECOR[variable])
                while value in values:
                    value = self.pick(DECOR[variable])
            elif variable in AGREE:
                value = AGREE[variable][gender == "f"]
            elif form == "it":
                value = "it"
            elif form in _PRONOUNS["m"] and not by_name:
                value = self._called(bound[variable], form, bound.get("Q" if variable == "P" else "P"))
            else:
                value = bound[variable]
            values.append(value)
        return values

    def _called(self, name: str, form: str, other: str | None) -> str:
        """A person's name, or a pronoun where it is understood."""
        gender = GENDER[name]
        if self.rng.random() < PRONOUN_SHARE and name == self.world.meant(gender) == self.world.meant(gender, other):
            return _PRONOUNS[gender][form]
        return name
