"""The state of the world that a story tells of, and what each frame does to it.

One class serves both sides: the generator tells only what applies without a fault, the judge counts the faults.
"""

from __future__ import annotations

from .grammar import Frame
from .lexicon import AGREE, GENDER

LOST, GONE, THERE = "<lost>", "<gone>", "<there>"
PRONOUN_GENDER = {"he": "m", "him": "m", "she": "f", "her": "f", "He": "m", "She": "f"}


class World:
    """Who is there, who holds what, which animals are about, where it happens, and whom `he` and `she` mean.

    `things` maps an object to its holder (a person's name or an animal) or to THERE, LOST or GONE (broken); an object that is not a key has
    not been spoken of. `animals` maps an animal to True while it is about.
    """

    __slots__ = ("animals", "he", "it", "people", "place", "protagonist", "things")

    def __init__(self) -> None:
        self.protagonist: str | None = None
        self.people: list[str] = []
        self.things: dict[str, str] = {}
        self.animals: dict[str, bool] = {}
        self.place: str | None = None
        self.he: dict[str, str] = {}
        self.it: str | None = None

    def copy(self) -> World:
        """A world that can be tried out."""
        other = World.__new__(World)
        other.protagonist, other.place, other.it = self.protagonist, self.place, self.it
        other.people, other.things = self.people[:], self.things.copy()
        other.animals, other.he = self.animals.copy(), self.he.copy()
        return other

    def meant(self, gender: str, but: str | None = None) -> str | None:
        """Whom a pronoun means: the last subject or person named of that gender, else (where that is `but`) the only other one there."""
        name = self.he.get(gender)
        if name is not None and name != but:
            return name
        others = [other for other in self.people if GENDER[other] == gender and other != but]
        return others[0] if len(others) == 1 else None

    def apply(self, frame: Frame, values: tuple[str, ...] | list[str]) -> tuple[int, int]:
        """Let a told frame happen. Returns (faults of names and pronouns, faults of continuity); a faulty effect changes nothing."""
        bound: dict[str, str] = {}
        names = self._bind_people(frame, values, bound)
        faults = 0
        for position, variable, form, _ in frame.things:
            if form == "it":
                if self.it is None:
                    faults += 1
                    self.it = ""
                bound[variable] = self.it or ""
            else:
                bound[variable] = values[position]
                if variable == "O":
                    self.it = values[position]
        for effect in frame.effects:
            if effect[0] == "they":
                names += len(self.people) < 2
            elif effect[0] == "leave":
                self._leave(bound["Q"])
            elif not getattr(self, "_" + effect[0])(*[bound.get(argument, "") for argument in effect[1:]]):
                faults += 1
        return names, faults

    def _bind_people(self, frame: Frame, values: tuple[str, ...] | list[str], bound: dict[str, str]) -> int:
        """Find out who each person slot means; returns the faults. An absent person who is named counts as there afterwards."""
        faults = 0
        gender = None
        pronouns = []
        for position, variable, form in frame.people:
            value = values[position]
            if value in GENDER:
                entering = form == "+"
                if entering and variable == "P" and self.protagonist is not None:
                    faults += 1  # a second beginning
                elif entering == (value in self.people):
                    faults += 1  # enters twice, or acts without having entered
                if value not in self.people:
                    self.people.append(value)
                if self.protagonist is None:
                    self.protagonist = value
                bound[variable] = value
            else:
                pronouns.append((variable, PRONOUN_GENDER[value]))
        for variable, pronoun in pronouns:  # after all names, since a pronoun does not mean whoever is named beside it
            bound[variable] = self.meant(pronoun, but=bound.get("Q" if variable == "P" else "P")) or ""
            faults += not bound[variable]
            if variable == "P":
                gender = pronoun
        subject, other = bound.get("P"), bound.get("Q")
        if subject and subject == other:
            faults += 1
        if subject:
            gender = GENDER[subject]
        if gender:
            for position, slot in frame.agree:
                faults += values[position] != AGREE[slot][gender == "f"]
        for name in (other, subject):  # the subject last: it is whom the next pronoun means
            if name:
                self.he[GENDER[name]] = name
        return faults

    def _leave(self, person: str) -> None:
        if person in self.people:
            self.people.remove(person)
        if person and self.he.get(GENDER[person]) == person:
            del self.he[GENDER[person]]

    # One method an effect: True if it can happen, and then it has happened.

    def _put(self, thing: str, where: str, *allowed: str | None) -> bool:
        if self.things.get(thing) not in allowed:
            return False
        self.things[thing] = where
        return True

    def _have(self, person: str, thing: str) -> bool:
        return self._put(thing, person, None)

    def _find(self, person: str, thing: str) -> bool:
        return self._put(thing, person, None, THERE)

    def _refind(self, person: str, thing: str) -> bool:
        return self._put(thing, person, LOST)

    def _see(self, thing: str) -> bool:
        return self._put(thing, THERE, None, THERE)

    def _want(self, person: str, thing: str) -> bool:
        return self.things.get(thing) not in (person, GONE)

    def _know(self, thing: str) -> bool:
        return self.things.get(thing, GONE) != GONE

    def _use(self, person: str, thing: str) -> bool:
        return self._put(thing, person, person)

    def _give(self, giver: str, thing: str, taker: str) -> bool:
        return self._put(thing, taker, giver)

    def _take(self, taker: str, thing: str, giver: str) -> bool:
        return self._put(thing, taker, giver)

    def _steal(self, animal: str, thing: str) -> bool:
        return self.things.get(thing, GONE) not in (animal, LOST, GONE) and self._put(thing, animal, self.things[thing])

    def _lose(self, person: str, thing: str) -> bool:
        return self._put(thing, LOST, person)

    def _seek(self, person: str, thing: str) -> bool:
        return self.things.get(thing) == LOST

    def _drop(self, person: str, thing: str) -> bool:
        return self._put(thing, THERE, person)

    def _break(self, person: str, thing: str) -> bool:
        return self._put(thing, GONE, person)

    def _meet(self, animal: str) -> bool:
        self.animals[animal] = True
        return True

    def _near(self, animal: str) -> bool:
        return self.animals.get(animal, False)

    def _away(self, animal: str) -> bool:
        here = self.animals.get(animal, False)
        self.animals[animal] = False
        return here

    def _miss(self, animal: str) -> bool:
        return self.animals.get(animal) is False

    def _go(self, person: str, place: str) -> bool:
        moved = self.place != place
        self.place = place
        return moved

    def _at(self, place: str) -> bool:
        here = self.place in (None, place)
        self.place = place
        return here
