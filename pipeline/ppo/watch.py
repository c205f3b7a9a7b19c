"""Warnings in sentences: what a person who knows PPO would see in the figures of a run, said once each.

`watched` is a plain dict that goes into the checkpoint: the first update's figures, the best gold, what was said.
"""

import math
from typing import Any

NOISE = 4.0  # standard errors below 0 from which a mean KL is no noise
RATIO = 0.01  # spread of the ratio at an update's first step, where it should be exactly 1
ENTROPY = 0.1  # share of the first update's entropy
LENGTH = 1.5  # times the first update's length
TRUNCATED = 0.5  # rise of the share without an end token
GAP = 0.05  # nats a token between the sampler's log-probabilities and training's; bf16 makes 0.005
FLAT = 3  # updates one after the other in which no answer's score differs from another's
UNEXPLAINED = -1.0  # explained variance below which a critic is worse than the mean of the returns by as much again
UNTAUGHT = 8  # updates one after the other below it; a new critic may start there
GOLD = 2.0  # standard errors of a fall of gold


def watch_update(watched: dict[str, Any], metrics: dict[str, float], batch_size: int) -> list[str]:
    """Sentences about an update, each given once in a run."""
    names = ("objective/entropy", "response/length", "response/without_eos")
    first = watched.setdefault("first", {name: metrics[name] for name in names})
    was, now = (tuple(row[name] for name in names) for row in (first, metrics))
    kl, error = metrics["objective/kl"], metrics["objective/kl_std"] / math.sqrt(batch_size)
    ratio = math.sqrt(metrics.get("val/ratio_first_var", 0.0))
    new = {}
    if kl < -NOISE * error - 1e-6:
        new["kl"] = (
            f"objective/kl is {kl:.3g}, below 0 by more than noise: the answers are not samples of the policy that is "
            "trained (another temperature, top-k or older weights in the sampler), so the KL penalty is wrong"
        )
    if ratio > RATIO:
        new["ratio"] = (
            f"the probability ratio at the first step of an update is off 1 by {ratio:.2g} (root mean square): two "
            "forward passes with equal weights disagree (dropout, precision, randomness in the model), which PPO "
            "mistakes for learning"
        )
    if metrics.get("val/sampler_gap", 0.0) > GAP:
        new["gap"] = (
            f"the sampler's log-probabilities differ from training's by {metrics['val/sampler_gap']:.2g} nats a token "
            "(val/sampler_gap): it samples from another distribution (filters, penalties, older weights, another "
            "precision); set sampler_weight_cap, or mend the sampler"
        )
    if now[0] < ENTROPY * was[0]:
        new["entropy"] = (
            f"the entropy fell from {was[0]:.2g} to {now[0]:.2g} nats a token: the policy answers nearly the same each "
            "time; raise kl_coef or entropy_coef, or lower learning_rate"
        )
    if now[1] > LENGTH * was[1] or now[2] > was[2] + TRUNCATED:
        new["length"] = (
            f"answers went from {was[1]:.0f} to {now[1]:.0f} tokens, and from {was[2]:.0%} to {now[2]:.0%} without an "
            "end token: see whether the reward likes length, raise missing_eos_penalty or kl_coef"
        )
    return _once(watched, new | _streaks(watched, metrics))


def _streaks(watched: dict[str, Any], metrics: dict[str, float]) -> dict[str, str]:
    """Sentences about what is wrong only if it stays for several updates."""
    explained = metrics.get("val/explained_variance", 0.0)
    rows = watched.setdefault("rows", {"flat": 0, "critic": 0})
    for name, wrong in (
        ("flat", metrics.get("objective/frac_reward_zero_std") == 1.0),
        ("critic", explained < UNEXPLAINED),
    ):
        rows[name] = rows[name] + 1 if wrong else 0
    new = {}
    if rows["flat"] >= FLAT:
        new["flat"] = (
            f"the reward has given all answers to a prompt the same score in {FLAT} updates one after the other, so "
            "there is nothing to learn from it but the KL penalty; see whether it reads the answers, and whether some "
            "of them can be better than others"
        )
    if rows["critic"] >= UNTAUGHT:
        new["critic"] = (
            f"val/explained_variance is {explained:.3g} and was below {UNEXPLAINED:g} in {UNTAUGHT} updates one after "
            "the other: the critic's values are further from the returns than their mean is, and the advantages are "
            "its errors; raise critic_learning_rate or critic_warmup_updates, or take advantage_estimator rloo"
        )
    return new


def watch_evaluation(watched: dict[str, Any], metrics: dict[str, float]) -> list[str]:
    """Sentences about a held-out evaluation that has a gold score."""
    if "eval/gold" not in metrics:
        return []
    proxy, gold, error = metrics["eval/proxy"], metrics["eval/gold"], metrics["eval/gold_se"]
    best = watched.setdefault("gold", [gold, proxy])
    if gold > best[0]:
        watched["gold"] = [gold, proxy]
    new = {}
    if proxy > best[1] and gold < best[0] - GOLD * error:
        new["gold"] = (
            f"the held-out proxy rose from {best[1]:.3g} to {proxy:.3g} while gold fell from {best[0]:.3g} to "
            f"{gold:.3g}: the policy exploits its reward; raise kl_coef, stop earlier, or use several reward models"
        )
    return _once(watched, new)


def _once(watched: dict[str, Any], sentences: dict[str, str]) -> list[str]:
    """Those of the sentences that were not said before."""
    said = watched.setdefault("said", [])
    new = {name: sentence for name, sentence in sentences.items() if name not in said}
    said += new
    return list(new.values())
