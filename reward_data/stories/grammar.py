"""Frames compiled two ways: into format strings for telling and into a trie of tokens for parsing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .frames import BEGINNINGS, ENDS
from .frames_middle import MIDDLES
from .lexicon import AGREE, ANIMALS, DECOR, ENDINGS, NAMES, OBJECTS, PLACES, with_article

TOKEN = re.compile(r'[A-Za-z]+|[.,!?"]|[^\s]')
SENTENCE = re.compile(r'.+?[.!?](?=\s+[A-Z"]|\s*$)|.+$', re.DOTALL)  # not after a quotation: who says it comes next
_TEMPLATE_TOKEN = re.compile(r"\{[^}]+\}|" + TOKEN.pattern)
_DETERMINERS = {"a": "a", "A": "a", "the": "the", "The": "the", "{his}": "his"}
_EFFECTS_ON_ANIMALS = {"meet", "near", "away", "miss"}
_FORMS = {"+": "+", "!": "!", "*": "o"}


@dataclass(slots=True)
class Frame:
    """One template with its typed slots and its effects on the world.

    `slots` are (variable, form) in order. The form says how a person is called: `+` by name on entering, `!` by name,
    `s` name or he/she, `S` the same at the beginning of a sentence, `o` name or him/her. It is `it` for an object
    spoken of as `it`, and empty for all else. `people`, `agree` and `things` list the slots of each kind by position.
    """

    group: str
    template: str
    label: str  # the ending that a closing sentence carries, else ""
    slots: list[tuple[str, str]] = field(default_factory=list)
    articles: list[dict[str, str] | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    text: str = ""
    effects: list[tuple[str, ...]] = field(default_factory=list)
    people: list[tuple[int, str, str]] = field(default_factory=list)
    agree: list[tuple[int, str]] = field(default_factory=list)
    things: list[tuple[int, str, str, str]] = field(default_factory=list)  # with the determiner

    def render(self, values: Sequence[str]) -> str:
        """The sentence with these slot values."""
        return self.text % tuple(
            article[value] if article else value for value, article in zip(values, self.articles, strict=True)
        )


def _compile(group: str, stated: list[tuple[str, ...]], template: str) -> Frame:
    """One line of the table → Frame, with the effects that determiners imply added in front of the stated ones."""
    kind, _, rest = group.partition(".")
    frame = Frame(group, template, label=rest.split(".")[0] if kind == "close" else "")
    tokens = _TEMPLATE_TOKEN.findall(template)
    determiner = ""
    for index, token in enumerate(tokens):
        determiner = _DETERMINERS.get(token, determiner)
        if token.startswith("{"):
            _add_slot(frame, token[1:-1], index == 0, determiner, stated)
            continue
        if token in ("They", "they"):
            frame.effects.append(("they",))
        article = token in ("a", "A") and tokens[index + 1].startswith("{")
        frame.pieces.append(f"<article {token}>" if article else token)
    frame.effects += stated
    # The article comes with the value: `{P} saw a {O}.` → `%s saw %s.`
    frame.text = re.sub(r"\{[^}]+\}", "%s", re.sub(r"\b[aA] \{", "{", template))
    return frame


def _add_slot(frame: Frame, name: str, first: bool, determiner: str, stated: list[tuple[str, ...]]) -> None:
    position = len(frame.slots)
    variable, form = name, ""
    if name[0] in "PQ":
        variable = name[0]
        form = _FORMS[name[1]] if name[1:] else "o" if variable == "Q" else "S" if first else "s"
        frame.people.append((position, variable, form))
    elif name in AGREE:
        frame.agree.append((position, name))
    elif name in ("O", "it", "A", "L"):
        variable, form = ("O", "it") if name == "it" else (name, "")
        frame.things.append((position, variable, form, determiner))
        if variable == "A" and not any(effect[0] in _EFFECTS_ON_ANIMALS for effect in stated):
            frame.effects.append(("meet" if determiner == "a" else "near", "A"))
        if variable == "O" and not any("O" in effect for effect in stated):
            frame.effects.append(("use", "P", "O") if determiner == "his" else ("know", "O"))
    frame.slots.append((variable, form))
    frame.articles.append(_ARTICLES.get(frame.pieces[-1]) if frame.pieces else None)
    frame.pieces.append(f"<{_slot_class(variable, form)}>")


def _slot_class(variable: str, form: str) -> str:
    """The name of the set of words that fill a slot."""
    if variable in ("P", "Q"):
        return "name" if form in ("+", "!") else "person " + form
    return form or variable


def _classes() -> dict[str, tuple[str, ...]]:
    """Word → the slot classes that it can fill."""
    sets = {
        "name": NAMES,
        "person S": (*NAMES, "He", "She"),
        "person s": (*NAMES, "he", "she"),
        "person o": (*NAMES, "him", "her"),
        "O": OBJECTS,
        "A": ANIMALS,
        "L": PLACES,
        "it": ("it",),
        "article a": ("a", "an"),
        "article A": ("A", "An"),
        **AGREE,
        **DECOR,
    }
    classes: dict[str, list[str]] = {}
    for name, words in sets.items():
        for word in words:
            classes.setdefault(word, []).append(f"<{name}>")
    return {word: tuple(names) for word, names in classes.items()}


def _read_table() -> list[Frame]:
    frames, group, stated = [], "", []
    for line in (BEGINNINGS + MIDDLES + ENDS).splitlines():
        if line.startswith("## "):
            group, effects = (part.strip() for part in line[3:].split("|"))
            stated = [tuple(effect.split()) for effect in effects.split(",") if effect]
        elif line:
            frames.append(_compile(group, stated, line))
    return frames


def _build_trie() -> dict:
    """Nested dicts from a token or slot class to what may follow; under "" the frame that ends there."""
    root: dict = {}
    for frame in FRAMES:
        node = root
        for piece in frame.pieces:
            node = node.setdefault(piece, {})
        node[""] = frame
    return root


CLASSES = _classes()
_ARTICLES = {
    "<article a>": {word: with_article(word) for word in CLASSES},
    "<article A>": {word: with_article(word).capitalize() for word in CLASSES},
}
FRAMES = _read_table()
GROUPS: dict[str, list[Frame]] = {}
for _frame in FRAMES:
    GROUPS.setdefault(_frame.group, []).append(_frame)
CLOSINGS = {ending: [frame for frame in FRAMES if frame.label == ending] for ending in ENDINGS}
_TRIE = _build_trie()


def split_sentences(story: str) -> list[str]:
    """A story → its sentences; a quotation belongs to the sentence round it. The last may be cut off."""
    return [sentence.strip() for sentence in SENTENCE.findall(story) if sentence.strip()]


@lru_cache(maxsize=50_000)
def parse(sentence: str) -> tuple[Frame, tuple[str, ...]] | None:
    """The frame that a sentence is told in and the values of its slots, or None if it is not in the grammar."""
    return _match(TOKEN.findall(sentence), 0, _TRIE, ())


def _match(tokens: list[str], index: int, node: dict, values: tuple[str, ...]) -> tuple[Frame, tuple[str, ...]] | None:
    """Depth-first search of the trie from `tokens[index]`; a literal goes before a slot."""
    if index == len(tokens):
        return (node[""], values) if "" in node else None
    token = tokens[index]
    if token in node:
        found = _match(tokens, index + 1, node[token], values)
        if found:
            return found
    for name in CLASSES.get(token, ()):
        if name not in node:
            continue
        if name in _ARTICLES:  # fits only before a word that takes it, and is no slot
            following = tokens[index + 1] if index + 1 < len(tokens) else ""
            fits = _ARTICLES[name].get(following) == f"{token} {following}"
            found = _match(tokens, index + 1, node[name], values) if fits else None
        else:
            found = _match(tokens, index + 1, node[name], (*values, token))
        if found:
            return found
    return None
