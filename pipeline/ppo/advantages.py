"""Advantage estimators: from the rewards of answers to what each of their tokens is worth more than expected.

Another one is a function like these and an entry in ESTIMATORS; `PPOConfig.advantage_estimator` names it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.ppo import algorithm as A
from pipeline.ppo.algorithm import Reduce
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.rollout import Rollout


@dataclass(frozen=True)
class Estimator:
    """`estimate(rollout, rewards, args, reduce)` fills `rollout.advantages` (B, R), and `rollout.returns` (B, R), the
    critic's targets, where it needs a critic. `rewards` (B, R) are those of each token, the KL penalty included. For an
    estimator that needs no critic none exists: not in memory, not in a checkpoint, not in a saved folder."""

    estimate: Callable[[Rollout, Tensor, PPOConfig, Reduce], None]
    needs_critic: bool


def estimate_gae(rollout: Rollout, rewards: Tensor, args: PPOConfig, reduce: Reduce) -> None:
    """Generalised advantage estimation (arXiv 1506.02438), whitened over all tokens of the update."""
    values, lengths, mask = rollout.values, rollout.response_lengths, rollout.mask
    if args.whiten_rewards:
        rewards = A.masked_whiten(rewards, mask, reduce, shift_mean=False)
    rollout.returns = A.gae(rewards, values, lengths, args.gamma, args.lam_value) + values * mask
    advantages = A.gae(rewards, values, lengths, args.gamma, args.lam)
    rollout.advantages = A.masked_whiten(advantages, mask, reduce)


def estimate_rloo(rollout: Rollout, rewards: Tensor, args: PPOConfig, reduce: Reduce) -> None:
    """REINFORCE leave-one-out (arXiv 2402.14740): the answer as a whole is the action, so all its tokens have one
    advantage, and its return is its score less β·KL of all its tokens. Not whitened: the baseline adds no bias. The
    loss is PPO's, with a ratio for each token and a mean over the mini-batch's tokens."""
    advantages = A.leave_one_out(rewards.sum(1), args.num_generations)
    rollout.advantages = advantages[:, None] * rollout.mask


ESTIMATORS = {"gae": Estimator(estimate_gae, needs_critic=True), "rloo": Estimator(estimate_rloo, needs_critic=False)}
