"""Held-out evaluation while PPO runs: figures of the policy on prompts that it does not train on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from pipeline.judging import distinct_n, win_rate
from pipeline.ppo import algorithm as A
from pipeline.ppo.learner import Learner
from pipeline.ppo.rollout import HELD_OUT, Answerer, Prompts, Rollout, seeded
from pipeline.ppo.state import RunState
from pipeline.rewards import RewardFunction, checked
from reward_data.formats import text_of


@dataclass
class HeldOutAnswer:
    """One held-out answer and what is known of it."""

    prompt: str
    text: str
    length: int
    ended: bool
    proxy: float  # the reward that PPO is paid by
    gold: float | None
    kl: float = 0.0  # log π − log π_ref of the whole answer, in nats

    @property
    def score(self) -> float:
        """What decides a comparison: gold where there is one, else proxy."""
        return self.proxy if self.gold is None else self.gold


@dataclass
class Evaluation:
    """What an evaluation found; `baseline` are the scores of the first reference's answers, for RunState."""

    metrics: dict[str, float]
    baseline: list[float]
    answers: list[HeldOutAnswer]


@dataclass
class Evaluator:
    """Held-out prompts with what answers and scores them."""

    prompts: Prompts
    answerer: Answerer
    rewards: RewardFunction
    gold: RewardFunction | None
    learner: Learner

    def evaluate(self, state: RunState) -> Evaluation:
        """Answer every held-out prompt with the same random numbers each time; figures over all processes.

        The win rate is against the answers of the reference that the run began with (SFT), by gold where there is one
        and by proxy otherwise, a tie counting half, with a bootstrap interval of 95 % over prompts.
        """
        models, args = self.learner.models, self.learner.args
        answers = self.answers_of(models.policy, with_kl=True)
        baseline = state.baseline
        if baseline is None:
            baseline = [answer.score for answer in self.answers_of(models.reference, with_kl=False)]
        count, texts = len(answers), [answer.text for answer in answers]
        mean = {name: sum(getattr(a, name) for a in answers) / count for name in ("proxy", "kl", "length")}
        without_eos = sum(not answer.ended for answer in answers) / count
        # What the penalties are measured in: with normalize_scores, standard deviations of the scores so far
        unit = A.standard_deviation(state.score_moments) if args.normalize_scores else 1.0
        penalty = unit * (args.missing_eos_penalty * without_eos + args.kl_coef * mean["kl"])
        wins = win_rate([answer.score for answer in answers], baseline)
        metrics = {f"eval/{name}": value for name, value in mean.items()} | {
            "eval/rlhf_reward": mean["proxy"] - penalty,
            "eval/win_rate": wins["mean"],
            "eval/win_rate_low": wins["ci95"][0],
            "eval/win_rate_high": wins["ci95"][1],
            "eval/without_eos": without_eos,
            "eval/distinct_2": distinct_n(texts, 2),
            "eval/repetition": repetition(texts),
        }
        if self.gold:
            gold = torch.tensor([answer.gold for answer in answers], dtype=torch.double)
            metrics["eval/gold"] = gold.mean().item()
            metrics["eval/gold_se"] = (gold.std().item() if count > 1 else 0.0) / count**0.5
        return Evaluation(metrics, baseline, answers)

    def answers_of(self, model: nn.Module, with_kl: bool) -> list[HeldOutAnswer]:
        """The answers of `model` to all held-out prompts, scored; those of all processes, on every process."""
        learner, size = self.learner, self.learner.args.batch_size
        own = range(learner.rank, len(self.prompts), learner.world)
        answers: list[HeldOutAnswer] = []
        self.answerer.sync(model)
        for start in range(0, len(own), size):
            random = seeded(learner.args.seed, HELD_OUT, start, learner.rank)
            answers += self._batch(own[start : start + size], random, with_kl)
        if learner.world == 1:
            return answers
        return [HeldOutAnswer(**row) for row in gather_object([asdict(answer) for answer in answers])]

    def _batch(self, indices: Sequence[int], random: torch.Generator, with_kl: bool) -> list[HeldOutAnswer]:
        batch = self.prompts.take(indices)
        samples, completions = self.answerer.answer(batch, random, self.learner.args.eval_temperature)
        proxy = self.rewards(batch.prompts, completions, **batch.columns)
        gold: list[Any] = [None] * len(completions)
        if self.gold:
            gold = checked("gold", self.gold, batch.prompts, completions, batch.columns)
        lengths, ended = samples.response_lengths.tolist(), samples.ended.tolist()
        texts = map(text_of, batch.prompts), map(text_of, completions)
        rows = zip(*texts, lengths, ended, proxy, gold, strict=True)
        answers = [HeldOutAnswer(*row) for row in rows]
        if with_kl:
            rollout = Rollout.of(samples, torch.tensor(proxy, device=self.learner.device))
            for answer, kl in zip(answers, self.learner.kl_of(rollout), strict=True):
                answer.kl = kl
        return answers


def repetition(texts: list[str]) -> float:
    """Share of an answer's word bigrams that it has said before, mean over the answers that have a bigram."""
    shares = [1 - distinct_n([text], 2) for text in texts if len(text.split()) > 1]
    return sum(shares) / len(shares) if shares else 0.0
