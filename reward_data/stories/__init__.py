"""A world-state generator of simple English stories, with an exact judge.

>>> from reward_data import stories
>>> next(stories.corpus(seed=0, max_bytes=1_000_000))                   # a pretraining document
>>> row = stories.instructions(seed=0, size=1)[0]                       # {"prompt": [...], "completion": [...]}
>>> stories.gold([row["prompt"]], [row["completion"]])                  # [0.55]
>>> stories.check(row["prompt"][0]["content"], row["completion"][0]["content"])   # every sub-check by name

What a gold reward of this kind shows is that the machinery learns what it is rewarded for. It says nothing of human taste.
"""

from .judge import WEIGHTS, check, gold
from .tasks import corpus, instructions, prompts, story

f = gold
"""The same under the name that reward functions have elsewhere."""

__all__ = ["WEIGHTS", "check", "corpus", "f", "gold", "instructions", "prompts", "story"]
