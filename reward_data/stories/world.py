"""The state of the world that a story tells of, and what each frame does to it.

One class serves both sides: the generator tells only what applies without a fault, the judge counts the faults.
"""

from __future__ import annotations

from collections.abc import Sequence

from .grammar import Frame
from .lexicon import AGREE, ANIMALS, GENDER

LOST, GONE, THERE = "<lost>", "<gone>", "<there>"
PRONOUN_GENDER = {"he": "m", "him": "m", "He": "m", "she": "f", "her": "f", "She": "f"}
_CAN_STEAL = frozenset(ANIMALS)


class World:
    """Who is there, who holds what, which animals are about, where it happens, and whom `he` and `she` mean.

    `things` maps an object to its holder (a person's name or an animal) or to THERE, LOST or GONE (broken); an object
    that is no key has not been spoken of. `animals` maps an animal to True while it is about.
    """

    __slots__ = ("animals", "it", "meant_by", "people", "place", "protagonist", "things")

    def __init__(self) -> None:
        self.protagonist: str | None = None
        self.people: list[str] = []
        self.things: dict[str, str] = {}
        self.animals: dict[str, bool] = {}
        self.place: str | None = None
        self.meant_by: dict[str, str] = {}
        self.it: str | None = None

    def copy(self) -> World:
        """A world that can be tried out."""
        other = World()
        other.protagonist, other.place, other.it = self.protagonist, self.place, self.it
        other.people, other.things = self.people[:], self.things.copy()
        other.animals, other.meant_by = self.animals.copy(), self.meant_by.copy()
        return other

    def meant(self, gender: str, but: str | None = None) -> str | None:
        """Whom a pronoun means: the last one of that gender spoken of, else (where that is `but`) the only other one.

        The subject of a sentence counts as spoken of after all others in it.
        """
        name = self.meant_by.get(gender)
        if name is not None and name != but:
            return name
        others = [other for other in self.people if GENDER[other] == gender and other != but]
        return others[0] if len(others) == 1 else None

    def apply(self, frame: Frame, values: Sequence[str]) -> tuple[int, int]:
        """Let a told frame happen. Returns (faults of names and pronouns, faults of continuity).

        An effect that cannot happen changes nothing, so that one fault in a story is counted once.
        """
        bound: dict[str, str] = {}
        name_faults = self._bind_people(frame, values, bound)
        faults = 0
        for position, variable, form, _ in frame.things:
            if form == "it":
                faults += self.it is None
                bound["O"] = self.it or ""
            else:
                bound[variable] = values[position]
                if variable == "O":
                    self.it = values[position]
        for effect, *arguments in frame.effects:
            if effect == "they":
                name_faults += len(self.people) < 2
            elif not getattr(self, effect)(*[bound[argument] for argument in arguments]):
                faults += 1
        return name_faults, faults

    def _bind_people(self, frame: Frame, values: Sequence[str], bound: dict[str, str]) -> int:
        """Find whom each person slot means ("" if nobody); returns the faults."""
        faults = 0
        gender = None
        pronouns = []
        for position, variable, form in frame.people:
            value = values[position]
            if value in GENDER:
                faults += self._name(value, enters=form == "+", opens=form == "+" and variable == "P")
                bound[variable] = value
            else:
                pronouns.append((variable, PRONOUN_GENDER[value]))
        for variable, pronoun in pronouns:  # after all names: a pronoun does not mean whoever is named beside it
            bound[variable] = self.meant(pronoun, but=bound.get("Q" if variable == "P" else "P")) or ""
            faults += not bound[variable]
            if variable == "P":
                gender = pronoun
        subject, other = bound.get("P"), bound.get("Q")
        faults += bool(subject) and subject == other
        gender = GENDER[subject] if subject else gender
        if gender:
            faults += sum(values[position] != AGREE[slot][gender == "f"] for position, slot in frame.agree)
        for name in (other, subject):
            if name:
                self.meant_by[GENDER[name]] = name
        return faults

    def _name(self, person: str, enters: bool, opens: bool) -> bool:
        """Speak of a person by name. True for a fault: enters twice, acts without having entered, begins anew."""
        here = person in self.people
        if not here:  # also after a fault, so that it is counted once
            self.people.append(person)
        fault = enters == here or (opens and self.protagonist is not None)
        self.protagonist = self.protagonist or person
        return fault

    # One method an effect, named as in the table of frames: True if it can happen, and then it has happened.

    def _move(self, thing: str, where: str, *allowed: str | None) -> bool:
        if self.things.get(thing) not in allowed:
            return False
        self.things[thing] = where
        return True

    def have(self, person: str, thing: str) -> bool:
        """Comes to hold something new."""
        return self._move(thing, person, None)

    def find(self, person: str, thing: str) -> bool:
        """Comes to hold something that nobody holds and nobody lost."""
        return self._move(thing, person, None, THERE)

    def pick(self, person: str, thing: str) -> bool:
        """Takes up what lies there (or is in hand already)."""
        return self._move(thing, person, THERE, person)

    def see(self, thing: str) -> bool:
        """It lies there, held by nobody."""
        return self._move(thing, THERE, None, THERE)

    def want(self, person: str, thing: str) -> bool:
        """Wishes for what the person does not hold; the thing need not exist."""
        return self.things.get(thing) not in (person, GONE)

    def know(self, thing: str) -> bool:
        """Has been spoken of and is not broken."""
        return self.things.get(thing, GONE) != GONE

    def use(self, person: str, thing: str) -> bool:
        """Only who holds a thing can use it."""
        return self.things.get(thing) == person

    def give(self, giver: str, thing: str, taker: str) -> bool:
        return self._move(thing, taker, giver)

    def take(self, taker: str, thing: str, giver: str) -> bool:
        return self._move(thing, taker, giver)

    def steal(self, animal: str, thing: str) -> bool:
        """An animal takes a thing that somebody else holds or that lies there."""
        return self.things.get(thing, GONE) not in (animal, LOST, GONE) and self._move(
            thing, animal, self.things[thing]
        )

    def lose(self, person: str, thing: str) -> bool:
        return self._move(thing, LOST, person)

    def seek(self, person: str, thing: str) -> bool:
        """Misses or looks for what is lost, or held by somebody else."""
        return self.know(thing) and self.things[thing] not in (person, THERE)

    def refind(self, person: str, thing: str) -> bool:
        """Gets back what was lost or stolen by an animal."""
        return (self.things.get(thing) == LOST or self.things.get(thing) in _CAN_STEAL) and self._move(
            thing, person, self.things[thing]
        )

    def drop(self, person: str, thing: str) -> bool:
        return self._move(thing, THERE, person)

    def destroy(self, person: str, thing: str) -> bool:
        return self._move(thing, GONE, person)

    def meet(self, animal: str) -> bool:
        """An animal comes; never a fault."""
        self.animals[animal] = True
        return True

    def near(self, animal: str) -> bool:
        """It is about."""
        return self.animals.get(animal, False)

    def away(self, animal: str) -> bool:
        """It was about and goes."""
        here = self.near(animal)
        self.animals[animal] = False
        return here

    def miss(self, animal: str) -> bool:
        """It has gone."""
        return self.animals.get(animal) is False

    def go(self, person: str, place: str) -> bool:
        """From elsewhere to a place."""
        moved = self.place != place
        self.place = place
        return moved

    def at(self, place: str) -> bool:
        """The story is at this place, or has been at none so far."""
        here = self.place in (None, place)
        self.place = place
        return here

    def leave(self, person: str) -> bool:
        """A person goes, and can neither act nor be meant by a pronoun any more."""
        self.people = [other for other in self.people if other != person]
        self.meant_by = {gender: name for gender, name in self.meant_by.items() if name != person}
        return True
