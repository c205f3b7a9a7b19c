"""What the stages read: the pretraining corpus, instructions with answers of mixed obedience, and prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from ..formats import assistant, user
from . import faults
from .lexicon import ENDINGS, NAMES, REQUIRED
from .spec import Spec, draw, write_prompt
from .telling import Teller

# The pretraining corpus.
CORPUS_SENTENCES = (4, 7)
CORPUS_FAULTY = 0.12
"""Share of documents with a planted fault, one of CORPUS_FAULTS: pretraining text is of mixed quality."""
CORPUS_HEADED = 0.95
"""Share of the other documents that begin with a heading of what is in them, as TinyStories-Instruct has it. Without
headings a small model sees too little reason to look back, and never learns to copy from a prompt (LOG.md)."""
HEADING = "Name: {name}. Words: {words}. Ending: {ending}.\n"
CORPUS_FAULTS = (
    faults.wrong_pronoun,
    faults.broken_continuity,
    faults.repeated,
    faults.garbled,
    faults.cut_off,
    faults.rambling,
)

# Instruction answers: how often each thing is right or wrong. Set so that their mean gold is about 0.63 and that every
# sub-check is often right and often wrong: then a reward model sees both, and PPO has room above its starting point.
OBEY_WORD = 0.55
OBEY_ENDING = 0.75
OBEY_NAME = 0.7
ANSWER_FAULTS = {
    faults.wrong_pronoun: 0.35,
    faults.broken_continuity: 0.35,
    faults.garbled: 0.35,
    faults.repeated: 0.3,
    faults.cut_off: 0.2,
}
ANSWER_SENTENCES = (4, 7)
ANSWER_TOKENS = 56
"""Words and punctuation marks of an answer, about, at most: it is to fit a response of 64 tokens."""
PLANTED_TOKENS = 9
"""What a planted sentence takes of them."""

ENDLESS = True
"""The stages are to say how much they want (reward_data/generators.py)."""

_WORD, _ASKABLE = re.compile(r"[a-z]+"), frozenset(REQUIRED)

PROMPT_SPLITS = {"preferences": False, "ppo": False, "validation": True, "test": True}
"""Splits of `prompts`: True for those of held-out names and pairs."""
INSTRUCTION_SPLITS = {"train": False, "validation": True, "test": True}


def corpus(seed: int, max_bytes: int, split: str = "train") -> Iterator[str]:
    """Documents for pretraining, as many as fit `max_bytes` of UTF-8 with one byte between documents.

    Stories of 4 to 7 sentences; CORPUS_FAULTY of them have a planted fault, most of the others a heading that names the
    first person, the askable words and the ending. Every name and word occurs, held-out ones too, or their tokens would
    be untrained: what is held out is that an instruction asks for them together. `split` is "train" or "validation";
    ValueError for another.
    """
    _known(split, ("train", "validation"), "corpus")
    rng = _rng("corpus", split, seed)
    size = 0
    while True:
        text = _document(rng)
        size += len(text) + 1
        if size > max_bytes:
            return
        yield text


def _document(rng: Random) -> str:
    spec = Spec(rng.choice(NAMES), tuple(rng.sample(REQUIRED, 2)), rng.choice(ENDINGS))
    teller = Teller(rng, spec.name, spec.words)
    count = _between(rng, CORPUS_SENTENCES)
    lines = teller.story(spec.ending, count, budget=14 * count)
    if rng.random() < CORPUS_FAULTY:
        return " ".join(teller.pick(CORPUS_FAULTS)(rng, lines))
    text = " ".join(lines)
    if rng.random() >= CORPUS_HEADED:
        return text
    words = [word for word in dict.fromkeys(_WORD.findall(text)) if word in _ASKABLE]
    rng.shuffle(words)
    return HEADING.format(name=spec.name, words=", ".join(words), ending=spec.ending) + text


def story(rng: Random, spec: Spec, names: Sequence[str] = NAMES) -> str:
    """A clean story that obeys a spec: its gold is 1."""
    teller = Teller(rng, spec.name, spec.words, names)
    return " ".join(teller.story(spec.ending, _between(rng, ANSWER_SENTENCES), ANSWER_TOKENS))


def answer(rng: Random, spec: Spec, names: Sequence[str] = NAMES) -> str:
    """A story that obeys a spec part of the time and sometimes holds faults, by the knobs above."""
    words = [word for word in spec.words if rng.random() < OBEY_WORD]
    other_endings = [ending for ending in ENDINGS if ending != spec.ending]
    ending = spec.ending if rng.random() < OBEY_ENDING else rng.choice(other_endings)
    plants = [plant for plant, probability in ANSWER_FAULTS.items() if rng.random() < probability]
    added = PLANTED_TOKENS * sum(plant in (faults.broken_continuity, faults.repeated) for plant in plants)
    teller = Teller(rng, spec.name, words, names)
    lines = teller.story(ending, _between(rng, ANSWER_SENTENCES), ANSWER_TOKENS - added)
    if rng.random() >= OBEY_NAME:
        lines = faults.wrong_name(rng, lines, spec.name, names)
    for plant in plants:
        lines = plant(rng, lines)
    return " ".join(lines)


def instructions(seed: int, size: int, split: str = "train") -> list[dict]:
    """Instruction rows {"prompt": [user message], "completion": [assistant message]} with answers of mixed quality.

    "train" asks for training names and pairs, "validation" and "test" for held-out ones; ValueError for another split.
    The answers may hold any name: one that never came up would be unlearned rather than held out.
    """
    held_out = INSTRUCTION_SPLITS[_known(split, INSTRUCTION_SPLITS, "instructions")]
    rng = _rng("instructions", split, seed)
    rows = []
    for _ in range(size):
        spec = draw(rng, held_out)
        text = answer(rng, spec)
        rows.append({"prompt": user(write_prompt(rng, spec)), "completion": assistant(text)})
    return rows


def prompts(seed: int, size: int, split: str) -> list[dict]:
    """Prompt rows {"prompt": [user message]}.

    "preferences" and "ppo" are of the training side, "validation" and "test" held out; ValueError for another split.
    """
    held_out = PROMPT_SPLITS[_known(split, PROMPT_SPLITS, "prompts")]
    rng = _rng("prompts", split, seed)
    return [{"prompt": user(write_prompt(rng, draw(rng, held_out)))} for _ in range(size)]


def preferences(seed: int, split: str) -> list[dict]:
    """None of its own: pairs are two answers of a policy, which the judge compares. Raises NotImplementedError."""
    raise NotImplementedError("run the stage that makes them, name its folder")


def _known(split: str, splits: Sequence[str] | dict[str, bool], what: str) -> str:
    if split not in splits:
        raise ValueError(f"the {what} of the stories have no split {split!r}; choose one of {', '.join(splits)}")
    return split


def _rng(*key: object) -> Random:
    """A generator of its own for each use. String seeds are hashed with SHA-512, alike in every process."""
    return Random(":".join(map(str, key)))


def _between(rng: Random, low_high: tuple[int, int]) -> int:
    low, high = low_high
    return low + int(rng.random() * (high - low + 1))
