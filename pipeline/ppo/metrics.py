"""The figures of an update: of its answers before the first step, and means over its optimizer steps."""

import math

import torch
from torch import Tensor

from pipeline.ppo import algorithm as A
from pipeline.ppo.algorithm import Reduce
from pipeline.ppo.rollout import Rollout

SAME = 1e-6  # relative difference up to which two scores are one, as rounding makes


def rollout_metrics(rollout: Rollout, kl: Tensor, kl_coef: float, reduce: Reduce) -> dict[str, float]:
    """Means over the answers (kl, scores, …: sums over an answer's tokens) or tokens (entropy) of all processes."""
    mask, lengths, scores = rollout.mask, rollout.response_lengths.float(), rollout.scores
    k3 = A.kl_k3(rollout.logprobs, rollout.ref_logprobs)
    one = torch.ones_like(scores)
    per_token = [(table * mask).sum(1) for table in (kl, k3, rollout.entropy)]
    per_answer = [one, lengths, scores, scores**2, (~rollout.ended).float(), per_token[0] ** 2]
    sums = reduce(torch.stack(per_token + per_answer, dim=1).double().sum(0)).tolist()
    kl1, kl3, entropy, count, length, score, score_squared, truncated, kl_squared = sums
    mean_kl, mean_score, penalty = kl1 / count, score / count, -kl_coef * kl1 / count
    metrics = {
        "objective/kl": mean_kl,
        "objective/kl_k3": kl3 / count,
        "objective/kl_std": math.sqrt(max(0.0, kl_squared / count - mean_kl**2)),
        "objective/kl_coef": kl_coef,
        "objective/scores": mean_score,
        "objective/scores_std": math.sqrt(max(0.0, score_squared / count - mean_score**2)),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": mean_score + penalty,
        "objective/entropy": entropy / length,
        "response/length": length / count,
        "response/without_eos": truncated / count,
    }
    if rollout.sampler_logprobs is not None:
        gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
        metrics["val/sampler_gap"] = A.masked_mean(gap, mask, reduce).item()
    return metrics


def zero_std_share(scores: Tensor, group: int, reduce: Reduce) -> float:
    """Share of prompts whose `group` answers all have the same score, of scores (B,) in which they follow each other.

    With one answer a prompt there is nothing to compare it with but the others: 1 if all answers of the update, over
    all processes, have one score, else 0.
    """
    scores = scores.double()
    if group > 1:
        groups = scores.view(-1, group)
        centre, off = groups.mean(1), (groups - groups.mean(1, keepdim=True)).abs().amax(1)
        same, count = (off <= SAME * centre.abs()).sum(), len(groups)
        total = reduce(torch.stack([same.double(), torch.full_like(centre[0], count)]))
        return (total[0] / total[1]).item()
    total = reduce(torch.stack([scores.sum(), torch.full_like(scores[0], len(scores))]))
    mean = total[0] / total[1]
    off = reduce((scores - mean).abs().sum()) / total[1]
    return float(off <= SAME * mean.abs())


class MetricSums:
    """Collects without waiting for the device: everything stays a tensor until `means`."""

    def __init__(self) -> None:
        self.open: dict[str, Tensor] = {}
        self.shares: dict[str, list[Tensor]] = {}
        self.norms: dict[str, list[Tensor]] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's sums to those of the mini-batch that is open."""
        for name, value in sums.items():
            self.open[name] = self.open[name] + value if name in self.open else value

    def close(self, tokens: Tensor, norms: dict[str, Tensor]) -> None:
        """End a mini-batch of `tokens` tokens over all processes; gradient norms are the same on every process."""
        for name, value in self.open.items():
            self.shares.setdefault(name, []).append(value / tokens)
        for name, value in norms.items():
            self.norms.setdefault(name, []).append(value)
        self.open = {}

    def means(self, reduce: Reduce) -> dict[str, float]:
        """Mean over mini-batches of the mean over tokens.

        `val/ratio_first` and `val/ratio_first_var` (mean square of ρ − 1) are of the first mini-batch alone.
        """
        rows = {name: torch.stack(values).mean() for name, values in self.shares.items()}
        if "val/ratio" in self.shares:
            rows["val/ratio_first"] = self.shares["val/ratio"][0]
            rows["val/ratio_first_var"] = self.shares["val/ratio_var"][0]
        table = torch.stack(list(rows.values()))
        values = dict(zip(rows, reduce(table).tolist(), strict=True))
        if "val/ratio" in values:
            values["val/ratio_var"] = max(0.0, values["val/ratio_var"] - (values["val/ratio"] - 1) ** 2)
        return values | {name: torch.stack(norms).mean().item() for name, norms in self.norms.items()}
