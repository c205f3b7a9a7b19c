"""A world-state generator of simple English stories, with an exact judge.

    from reward_data import stories
    next(stories.corpus(seed=0, max_bytes=1_000_000))     # a document for pretraining
    row = stories.instructions(seed=0, size=1)[0]         # {"prompt": [message], "completion": [message]}
    stories.prompts(seed=0, size=1, split="ppo")          # [{"prompt": [message]}]
    stories.gold([row["prompt"]], [row["completion"]])    # [0.95]
    stories.check(row["prompt"][0]["content"], row["completion"][0]["content"])    # every sub-check by name

lexicon.py holds the words, frames.py the sentences and what they do, grammar.py compiles and parses them, world.py
simulates, telling.py tells, faults.py spoils, spec.py words and reads instructions, tasks.py makes what the stages
read, judge.py judges.

Validation and test prompts ask for pairs of words, and a third of them for names, that no training prompt asks for.
The same names and words do occur in the corpus, or their tokens would be untrained: what is tested is obeying new
combinations, not new words.
A gold reward of this kind shows that the machinery learns what it is rewarded for. It says nothing of human taste.
"""

from .judge import WEIGHTS, check, gold
from .spec import Spec, parse_prompt
from .tasks import ENDLESS, corpus, instructions, preferences, prompts, story

__all__ = [
    "ENDLESS",
    "WEIGHTS",
    "Spec",
    "check",
    "corpus",
    "gold",
    "instructions",
    "parse_prompt",
    "preferences",
    "prompts",
    "story",
]
