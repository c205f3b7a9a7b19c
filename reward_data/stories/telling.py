"""Telling one story: a simulation that chooses, sentence by sentence, a frame that can happen next.

A story has an opening, a middle, often a turn towards its ending, and a closing sentence that carries the ending's label.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from random import Random

from .grammar import FRAMES, GROUPS, TOKEN, Frame
from .lexicon import AGREE, ANIMALS, DECOR, ENDINGS, GENDER, KIND_OF, NAMES, OBJECTS, PLACES
from .world import LOST, THERE, World

MIDDLE_WEIGHTS = {
    "mid.plain": 8, "mid.talk": 3, "meet.friend": 4, "mid.two": 5, "mid.they": 2, "have.new": 2, "find.new": 3, "find.place": 1,
    "see.new": 2, "see.take": 3, "want.new": 1, "want.other": 1, "use": 7, "use.two": 3, "give": 4, "take": 2, "have.friend": 1,
    "lose": 1, "seek": 4, "found": 4, "drop": 1, "break": 0.5, "animal.new": 3, "animal.place": 2, "animal.use": 7, "animal.thing": 3,
    "animal.bring": 1, "animal.steal": 1, "animal.return": 4, "animal.away": 0.7, "go": 2, "go.two": 2, "at": 3, "leave": 0.5,
}  # fmt: skip
"""How readily each group is told in the middle, where it can happen at all. Following up what is there weighs more than new things."""

INTRODUCE = {
    "O": ("have.new", "find.new", "find.place", "see.new", "want.new", "have.friend", "animal.bring"),
    "A": ("animal.new", "animal.place"),
    "L": ("go", "go.two", "at", "animal.place", "find.place"),
}
OPEN_WITH = {"O": ("open.have", "open.want"), "A": ("open.animal",), "L": ("open.place", "open.at")}
TURNS = {
    "happy": ("turn.happy", "found", "found", "give", "have.new", "animal.return"),
    "sad": ("turn.sad", "lose", "lose", "break", "animal.away", "animal.steal", "leave"),
    "surprising": ("turn.surprising",),
}
PRONOUN_SHARE = 0.65
"""How often a subject that a pronoun would mean is called by it."""

_MIDDLES = tuple(MIDDLE_WEIGHTS)
_MIDDLE_STEPS = tuple(accumulate(MIDDLE_WEIGHTS.values()))
_OPENINGS = tuple(name for name in GROUPS if name.startswith("open."))
_CLOSINGS = {label: [f for f in FRAMES if f.label == label] for label in ENDINGS}
_SUBJECT = {"m": {"S": "He", "s": "he", "o": "him"}, "f": {"S": "She", "s": "she", "o": "her"}}
_KNOWN_TO = {"know", "want", "steal"}


def token_count(text: str) -> int:
    """Words and punctuation marks: what a BPE would need if every word were one token."""
    return len(TOKEN.findall(text))


class Teller:
    """One story being told. `told` holds (frame, values) a sentence; `world` is the state after them."""

    def __init__(self, rng: Random, name: str | None = None, words: Sequence[str] = (), names: Sequence[str] = NAMES) -> None:
        self.rng = rng
        self.names = names
        self.name = name or self.pick(names)
        self.pending = list(words)
        self.world = World()
        self.told: list[tuple[Frame, list[str]]] = []

    def pick(self, items: Sequence):
        """A uniform choice, several times faster than Random.choice."""
        return items[int(self.rng.random() * len(items))]

    def story(self, ending: str, sentences: int, budget: int) -> list[str]:
        """Tell `sentences` sentences in at most about `budget` tokens, using every pending word, and close with `ending`."""
        rng = self.rng
        self._open()
        room = budget - 11  # the longest closing
        lines = [self.line(0)]
        used = token_count(lines[0])
        while self.pending or (used < room and len(self.told) < sentences - 1):
            last = len(self.told) == sentences - 2
            tight = len(self.told) + len(self.pending) >= sentences - 1 or used + 12 * len(self.pending) >= room - 12
            if self.pending and (tight or rng.random() < 0.7):
                self._introduce()
            elif not (last and rng.random() < 0.6 and self._turn(ending)):
                self._middle()
            line = self.line(-1)
            used += token_count(line)
            if used > room and not self.pending and len(self.told) > 3:
                self.told.pop()  # too long: the world has moved on, so nothing more may refer to this sentence
                return [*lines, self._plain_close(ending)]
            lines.append(line)
        self._close(ending)
        return [*lines, self.line(-1)]

    def line(self, index: int) -> str:
        frame, values = self.told[index]
        return frame.render(values)

    def _open(self) -> None:
        kinds = [KIND_OF[word] for word in self.pending]
        groups: Sequence[str] = _OPENINGS
        if kinds and self.rng.random() < 0.6:
            groups = OPEN_WITH[self.pick(kinds)]
        while not self.tell(self.pick(GROUPS[self.pick(groups)])):
            pass

    def _introduce(self) -> None:
        """Tell something new that uses a pending word."""
        groups = INTRODUCE[KIND_OF[self.pick(self.pending)]]
        before = len(self.pending)
        for _ in range(1000):
            if self.tell(self.pick(GROUPS[self.pick(groups)]), must_use=before):
                return
        raise AssertionError(f"no frame can use {self.pending} here")

    def _middle(self) -> None:
        while True:
            group = _MIDDLES[bisect(_MIDDLE_STEPS, self.rng.random() * _MIDDLE_STEPS[-1])]
            if self.tell(self.pick(GROUPS[group])):
                return

    def _turn(self, ending: str) -> bool:
        return any(self.tell(self.pick(GROUPS[self.pick(TURNS[ending])])) for _ in range(4))

    def _close(self, ending: str) -> None:
        while not self.tell(self.pick(_CLOSINGS[ending])):
            pass

    def _plain_close(self, ending: str) -> str:
        """A closing that refers to nothing but the protagonist, by name."""
        while True:
            frame = self.pick(GROUPS["close." + ending])
            if all(variable in ("P", "royal", "job", "said", "relative", "daytime") or variable in AGREE for variable, _ in frame.slots):
                values = self.values(frame, {"P": self.name}, by_name=True)
                self.told.append((frame, values))
                return frame.render(values)

    def tell(self, frame: Frame, must_use: int = 0) -> bool:
        """Try to let a frame happen next; False, with nothing changed, if it cannot."""
        bound = self._bind(frame)
        if bound is None:
            return False
        if must_use and not any(word in self.pending for word in bound.values()):
            return False
        values = self.values(frame, bound)
        if any(frame is other and values == earlier for other, earlier in self.told):
            return False
        world = self.world.copy()
        if world.apply(frame, values) != (0, 0):
            return False
        self.world = world
        self.told.append((frame, values))
        for word in bound.values():
            if word in self.pending:
                self.pending.remove(word)
        return True

    def _bind(self, frame: Frame) -> dict[str, str] | None:
        """Choose people and things for a frame's slots, or None if there are none to choose."""
        world, rng = self.world, self.rng
        bound: dict[str, str] = {}
        people = world.people
        for _, variable, form in frame.people:
            if variable == "P":
                if form == "+":
                    bound["P"] = self.name
                else:
                    here = self.name in people
                    bound["P"] = self.name if here and (len(people) == 1 or rng.random() < 0.75) else self.pick(people)
        for _, variable, form in frame.people:
            if variable == "Q":
                others = [n for n in people if n != bound.get("P")]
                if form == "+":
                    bound["Q"] = self.pick(self.names)
                elif not others:
                    return None
                else:
                    bound["Q"] = self.pick(others)
                if frame.group == "leave" and bound["Q"] == self.name:
                    return None  # the protagonist stays to the end
        for _, variable, form, determiner in frame.things:
            if variable == "O":
                choices = self._objects(frame, form, determiner, bound)
            elif variable == "A":
                choices = self._new(ANIMALS, world.animals) if determiner == "a" else [a for a, here in world.animals.items() if here]
                if frame.effects and any(effect[0] == "miss" for effect in frame.effects):
                    choices = [a for a, here in world.animals.items() if not here]
            elif any(effect[0] == "at" for effect in frame.effects) and world.place is not None:
                choices = [world.place]
            else:
                choices = self._new(PLACES, (world.place,))
            if not choices:
                return None
            bound[variable] = self.pick(choices)
        return bound

    def _new(self, words: Sequence[str], known) -> Sequence[str]:
        """A pending word of this kind where there is one, else any word."""
        waiting = [word for word in self.pending if word in words and word not in known]
        return waiting or (self.pick(words),)

    def _objects(self, frame: Frame, form: str, determiner: str, bound: dict[str, str]) -> Sequence[str]:
        things = self.world.things
        if determiner == "a" and form != "it":
            return self._new(OBJECTS, things)
        verb, *arguments = next(effect for effect in frame.effects if "O" in effect)
        if verb == "find":
            choices = [o for o, holder in things.items() if holder == THERE]
        elif verb in ("seek", "refind"):
            choices = [o for o, holder in things.items() if holder == LOST]
        elif verb in _KNOWN_TO:
            choices = list(things)
        else:
            holder = bound.get(arguments[2] if verb == "take" else arguments[0])
            choices = [o for o, held in things.items() if held == holder]
        if form == "it":
            choices = [o for o in choices if o == self.world.it]
        return choices

    def values(self, frame: Frame, bound: dict[str, str], by_name: bool = False) -> list[str]:
        """The words for a frame's slots: names or pronouns for people, decor at random."""
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
            elif variable in "PQ" and form in _SUBJECT["m"] and not by_name:
                value = self._called(bound[variable], form, bound.get("Q" if variable == "P" else "P"))
            else:
                value = bound[variable]
            values.append(value)
        return values

    def _called(self, name: str, form: str, other: str | None) -> str:
        """A person's name, or a pronoun where it would be understood."""
        gender = GENDER[name]
        if self.rng.random() < PRONOUN_SHARE and self.world.meant(gender) == name and self.world.meant(gender, but=other) == name:
            return _SUBJECT[gender][form]
        return name
