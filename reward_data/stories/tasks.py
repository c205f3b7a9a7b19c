"""What the stages read: the pretraining corpus, instructions with answers of mixed obedience, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import faults
from .lexicon import ENDINGS, NAMES, TRAIN_NAMES
from .spec import Spec, draw, word_prompt
from .telling import Teller

# The pretraining corpus.
CORPUS_FAULTY = 0.3
"""Share of documents with planted faults (one or two of CORPUS_FAULTS): pretraining text is of mixed quality."""
CORPUS_FAULTS = (
    faults.wrong_pronoun, faults.broken_continuity, faults.repeated, faults.garbled, faults.cut_off, faults.rambling,
)  # fmt: skip
CORPUS_SENTENCES = (4, 10)

# Instruction answers: how often each is right. Set so that their mean gold is about 0.55 and every sub-check is often right and often wrong.
OBEY_WORD = 0.45
OBEY_ENDING = 0.5
OBEY_NAME = 0.55
ANSWER_FAULTS = {
    faults.wrong_pronoun: 0.35,
    faults.broken_continuity: 0.35,
    faults.garbled: 0.35,
    faults.repeated: 0.3,
    faults.cut_off: 0.25,
}
ANSWER_SENTENCES = (4, 7)
ANSWER_TOKENS = 56
"""Words and punctuation marks of an answer at most, so that it fits a response of 64 tokens."""

PROMPT_SPLITS = {"preferences": False, "ppo": False, "validation": True, "test": True}
"""Prompt splits: True for those of held-out names and pairs."""


def _rng(*key: object) -> Random:
    """A generator of its own for each use: string seeds are hashed with SHA-512, alike in every process."""
    return Random(":".join(map(str, key)))


def _between(rng: Random, low_high: tuple[int, int]) -> int:
    low, high = low_high
    return low + int(rng.random() * (high - low + 1))


def corpus(seed: int, max_bytes: int, split: str = "train") -> Iterator[str]:
    """Documents for pretraining until `max_bytes` (UTF-8, one newline counted for each) would be passed.

    Plain stories of 4 to 10 sentences, of which CORPUS_FAULTY have a planted fault. All names and words occur, held-out ones too: what is held
    out is that an instruction asks for them. Splits are "train" and "validation"; ValueError for another.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"the stories corpus has no split {split!r}; use train or validation")
    rng = _rng("corpus", split, seed)
    size = 0
    while True:
        teller = Teller(rng)
        count = _between(rng, CORPUS_SENTENCES)
        lines = teller.story(teller.pick(ENDINGS), count, 14 * count)
        if rng.random() < CORPUS_FAULTY:
            lines = teller.pick(CORPUS_FAULTS)(rng, lines)
        text = " ".join(lines)
        size += len(text) + 1
        if size > max_bytes:
            return
        yield text


def story(rng: Random, spec: Spec, names=NAMES) -> str:
    """A clean story that obeys a spec: gold 1."""
    return " ".join(Teller(rng, spec.name, spec.words, names).story(spec.ending, _between(rng, ANSWER_SENTENCES), ANSWER_TOKENS))


def answer(rng: Random, spec: Spec, names=NAMES) -> str:
    """A story that obeys a spec part of the time and sometimes holds faults, by the knobs above."""
    words = [word for word in spec.words if rng.random() < OBEY_WORD]
    ending = spec.ending if rng.random() < OBEY_ENDING else rng.choice([e for e in ENDINGS if e != spec.ending])
    plants = [plant for plant, probability in ANSWER_FAULTS.items() if rng.random() < probability]
    # A planted sentence needs room: it is told on top of the budget.
    extra = 9 * sum(plant in (faults.broken_continuity, faults.repeated) for plant in plants)
    lines = Teller(rng, spec.name, words, names).story(ending, _between(rng, ANSWER_SENTENCES), ANSWER_TOKENS - extra)
    if rng.random() >= OBEY_NAME:
        lines = faults.wrong_name(rng, lines, spec.name, names)
    for plant in plants:
        lines = plant(rng, lines)
    return " ".join(lines)


def instructions(seed: int, size: int, split: str = "train") -> list[dict]:
    """Instruction rows {"prompt": [user message], "completion": [assistant message]} with answers of mixed quality.

    "train" asks for training names and pairs, "validation" and "test" for held-out ones. ValueError for another split.
    """
    held_out = _held_out(split, {"train": False, "validation": True, "test": True})
    rng = _rng("instructions", split, seed)
    rows = []
    for _ in range(size):
        spec = draw(rng, held_out)
        text = answer(rng, spec, NAMES if held_out else TRAIN_NAMES)
        rows.append({"prompt": _message("user", word_prompt(rng, spec)), "completion": _message("assistant", text)})
    return rows


def prompts(seed: int, size: int, split: str) -> list[dict]:
    """Prompt rows {"prompt": [user message]}: "preferences" and "ppo" on the training side, "validation" and "test" held out."""
    held_out = _held_out(split, PROMPT_SPLITS)
    rng = _rng("prompts", split, seed)
    return [{"prompt": _message("user", word_prompt(rng, draw(rng, held_out)))} for _ in range(size)]


def _held_out(split: str, splits: dict[str, bool]) -> bool:
    if split not in splits:
        raise ValueError(f"the stories have no split {split!r} here; choose one of {', '.join(splits)}")
    return splits[split]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
