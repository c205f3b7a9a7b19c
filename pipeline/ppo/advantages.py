"""Advantage estimators: from the rewards of answers to what each of their tokens is worth more than expected.

Another one is a function like these and an entry in ESTIMATORS; `PPOConfig.advantage_estimator` names it. What differs
between estimators is said in that entry alone: no other file asks for one by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.errors import UserError
from pipeline.ppo import algorithm as A
from pipeline.ppo.algorithm import Reduce
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.rollout import Rollout


@dataclass(frozen=True)
class Estimator:
    """`estimate(rollout, rewards, args, reduce)` fills `rollout.advantages` (B, R), and `rollout.returns` (B, R), the
    critic's targets, where it needs a critic. `rewards` (B, R) are those of each token, the KL penalty included.

    needs_critic  if not, none exists: not in memory, not in a checkpoint, not in a saved folder
    grouped       it compares the `num_generations` answers to one prompt, so there must be at least two
    unused        options that it does not read, beside those of a critic that it does not need
    """

    estimate: Callable[[Rollout, Tensor, PPOConfig, Reduce], None]
    needs_critic: bool
    grouped: bool = False
    unused: tuple[str, ...] = ()


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


ESTIMATORS = {
    "gae": Estimator(estimate_gae, needs_critic=True),
    "rloo": Estimator(
        estimate_rloo, needs_critic=False, grouped=True, unused=("gamma", "lam", "lam_value", "whiten_rewards")
    ),
}
CRITIC_OPTIONS = ("share_trunk", "critic_learning_rate", "critic_warmup_updates", "cliprange_value", "vf_coef")


def check_estimator(args: PPOConfig) -> None:
    """Raise UserError where the other options do not suit `args.advantage_estimator`."""
    name = args.advantage_estimator
    if name not in ESTIMATORS:
        raise UserError(f"advantage_estimator {name} has no entry in ESTIMATORS of pipeline/ppo/advantages.py; add it")
    estimator = ESTIMATORS[name]
    if estimator.grouped and args.num_generations < 2:
        raise UserError(f"advantage_estimator {name} compares answers to one prompt; set num_generations to 2 or more")
    for option in estimator.unused + (() if estimator.needs_critic else CRITIC_OPTIONS):
        if getattr(args, option) != getattr(PPOConfig, option):
            raise UserError(f"{option} has no meaning with advantage_estimator {name}; leave it out, or take gae")
