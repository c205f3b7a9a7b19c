"""Frames compiled two ways: into format strings for telling and into a trie of tokens for parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from .frames import TABLE
from .lexicon import AGREE, ANIMALS, DECOR, ENDINGS, NAMES, OBJECTS, PLACES, with_article

TOKEN = re.compile(r'[A-Za-z]+|[.,!?"]|[^ ]')
SENTENCE = re.compile(r'.+?[.!?](?= +[A-Z"]| *$)|.+$', re.DOTALL)  # not after a quotation: who says it is still to come
ARTICLE_CLASSES = ("<article a>", "<article A>")
DETERMINERS = ("a", "the", "{his}", "The", "A")
VERBS_ON_OBJECTS = {"have", "find", "see", "want", "use", "give", "take", "lose", "seek", "refind", "drop", "break", "know", "steal"}
VERBS_ON_ANIMALS = {"meet", "near", "away", "miss"}


@dataclass(slots=True)
class Frame:
    """One template with its typed slots and its effect on the world.

    `slots` are the slots in order as (variable, form), where form says how a person is called: `+` enters, `!` by name, `s` name or he/she,
    `S` the same at the beginning of a sentence, `o` name or him/her; `it` for an object spoken of as `it`; "" for everything else.
    """

    group: str
    template: str
    slots: list[tuple[str, str]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    articles: list[dict[str, str] | None] = field(default_factory=list)
    text: str = ""
    effects: list[tuple[str, ...]] = field(default_factory=list)
    people: list[tuple[int, str, str]] = field(default_factory=list)
    agree: list[tuple[int, str]] = field(default_factory=list)
    things: list[tuple[int, str, str, str]] = field(default_factory=list)
    label: str = ""
    opens: bool = False

    def render(self, values: list[str]) -> str:
        """The sentence with these slot values."""
        return self.text % tuple(
            article[value] if article else value for value, article in zip(values, self.articles, strict=True)
        )


def _form(name: str, index: int) -> tuple[str, str]:
    """Slot text such as `P+` at token `index` → (variable, form)."""
    if name == "it":
        return "O", "it"
    if name[0] in "PQ":
        if name[1:] in ("+", "!"):
            return name[0], name[1:]
        if name == "P":
            return "P", "S" if index == 0 else "s"  # `P*` and `Q` are objects
        return name[0], "o"
    return name, ""


def _compile(group: str, effects: str, template: str) -> Frame:
    """One line of the table → Frame, with the effects that determiners imply added in front."""
    frame = Frame(group, template, label=group.split(".")[1] if group.startswith("close.") else "", opens=group.startswith("open."))
    stated = [tuple(effect.split()) for effect in effects.split(",") if effect.strip()]
    tokens = re.findall(r"\{[^}]+\}|[A-Za-z]+|[.,!?\"]", template)
    implied: list[tuple[str, ...]] = []
    determiner = ""
    for index, token in enumerate(tokens):
        if token in DETERMINERS:
            determiner = token.strip("{}").lower()
        if not token.startswith("{"):
            if token in ("They", "they"):
                implied.append(("they",))
            before_slot = index + 1 < len(tokens) and tokens[index + 1].startswith("{")
            frame.pieces.append(f"<article {token}>" if token in ("a", "A") and before_slot else token)
            continue
        variable, form = _form(token[1:-1], index)
        position = len(frame.slots)
        frame.slots.append((variable, form))
        frame.articles.append(ARTICLES.get(frame.pieces[-1]) if frame.pieces else None)
        frame.pieces.append("<" + _class_of(variable, form) + ">")
        if variable in ("P", "Q"):
            frame.people.append((position, variable, form))
        elif variable in AGREE:
            frame.agree.append((position, variable))
        elif variable in ("O", "A", "L"):
            frame.things.append((position, variable, form, determiner))
            verbs = VERBS_ON_OBJECTS if variable == "O" else VERBS_ON_ANIMALS if variable == "A" else ()
            if variable == "A" and not any(e[0] in verbs for e in stated):
                implied.append(("meet" if determiner == "a" else "near", "A"))
            if variable == "O" and not any(e[0] in verbs for e in stated):
                implied.append(("use", "P", "O") if determiner == "his" else ("know", "O"))
    frame.effects = implied + stated
    frame.text = _format(template)
    return frame


def _class_of(variable: str, form: str) -> str:
    if variable in ("P", "Q"):
        return {"+": "name", "!": "name"}.get(form, "person-" + form)
    if form == "it":
        return "it"
    return variable


def _format(template: str) -> str:
    """`{P} saw a {O}.` → `%s saw %s.`: the article comes with the value."""
    text = re.sub(r"\b[aA] \{", "{", template)
    return re.sub(r"\{[^}]+\}", "%s", text)


def _classes() -> dict[str, tuple[str, ...]]:
    """Word → the slot classes that it can fill."""
    classes: dict[str, list[str]] = {}

    def add(word: str, *names: str) -> None:
        classes.setdefault(word, []).extend(f"<{name}>" for name in names)

    for name in NAMES:
        add(name, "name", "person-S", "person-s", "person-o")
    for pronoun in ("He", "She"):
        add(pronoun, "person-S")
    for pronoun in ("he", "she"):
        add(pronoun, "person-s")
    for pronoun in ("him", "her"):
        add(pronoun, "person-o")
    for slot, words in (*AGREE.items(), *DECOR.items(), ("O", OBJECTS), ("A", ANIMALS), ("L", PLACES), ("it", ("it",))):
        for word in dict.fromkeys(words):
            add(word, slot)
    for article in ("a", "an"):
        add(article, "article a")
        add(article.capitalize(), "article A")
    return {word: tuple(names) for word, names in classes.items()}


def _read_table() -> list[Frame]:
    frames, group, effects = [], "", ""
    for line in TABLE.strip().splitlines():
        if line.startswith("## "):
            group, effects = (part.strip() for part in line[3:].split("|"))
        elif line:
            frames.append(_compile(group, effects, line))
    return frames


CLASSES = _classes()
ARTICLES = {
    "<article a>": {word: with_article(word) for word in CLASSES},
    "<article A>": {word: with_article(word).capitalize() for word in CLASSES},
}
FRAMES = _read_table()
GROUPS: dict[str, list[Frame]] = {}
for _frame in FRAMES:
    GROUPS.setdefault(_frame.group, []).append(_frame)


def _trie() -> dict:
    root: dict = {}
    for frame in FRAMES:
        node = root
        for piece in frame.pieces:
            node = node.setdefault(piece, {})
        node[""] = frame
    return root


TRIE = _trie()


def split_sentences(story: str) -> list[str]:
    """A story → its sentences; a quotation belongs to the sentence round it. The last may be cut off."""
    return [sentence.strip() for sentence in SENTENCE.findall(story) if sentence.strip()]


@lru_cache(maxsize=200_000)
def parse(sentence: str) -> tuple[Frame, tuple[str, ...]] | None:
    """The frame that a sentence is told in and the values of its slots, or None if it is not in the grammar."""
    return _match(TOKEN.findall(sentence), 0, TRIE, ())


def _match(tokens: list[str], index: int, node: dict, values: tuple[str, ...]) -> tuple[Frame, tuple[str, ...]] | None:
    if index == len(tokens):
        frame = node.get("")
        return None if frame is None else (frame, values)
    token = tokens[index]
    if token in node:
        found = _match(tokens, index + 1, node[token], values)
        if found:
            return found
    for name in CLASSES.get(token, ()):
        if name not in node:
            continue
        if name in ARTICLE_CLASSES:
            following = tokens[index + 1] if index + 1 < len(tokens) else ""
            found = None
            if following and with_article(following).split()[0] == token.lower():
                found = _match(tokens, index + 1, node[name], values)
        else:
            found = _match(tokens, index + 1, node[name], (*values, token))
        if found:
            return found
    return None


assert set(ENDINGS) == {frame.label for frame in FRAMES if frame.label}
