"""The longest rows first, so that a run without enough memory ends in its first minute.

Before PPO's first update, one micro-batch of the longest prompts with answers of full length goes through forward and
backward pass of policy and critic.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.memory import is_out_of_memory, make_moments, stand_ins
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.learner import Learner, LossFunction, Network
from pipeline.ppo.metrics import MetricSums
from pipeline.ppo.rollout import GivenRows, Prompts, Rollout


def longest_rollout(learner: Learner, prompts: Prompts, count: int) -> Rollout:
    """`count` rows of the longest prompts, each with an answer of `response_length`; all that is computed of them is 0.

    Where there are fewer prompts, they come again.
    """
    ids = sorted(prompts.ids, key=len, reverse=True)
    rows = [ids[i % len(ids)] for i in range(count)]
    answers = [row[-1:] * learner.args.response_length for row in rows]
    rollout = GivenRows(rows, answers, [0.0] * count, None).rollout([], 0, learner.device)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "advantages", "returns"):
        setattr(rollout, name, torch.zeros(rollout.mask.shape, device=learner.device))
    return rollout


def passes(learner: Learner, rollout: Rollout) -> Iterator[tuple[Network, LossFunction]]:
    """What an update trains, with the loss of rows of `rollout`: the critic, where it has a network, and the policy."""
    if learner.critic is not None:
        yield learner.critic, partial(learner.value_loss, rollout)
    if learner.args.share_trunk:
        yield learner.policy, partial(learner.common_loss, rollout, True)
    else:
        yield learner.policy, partial(learner.policy_loss, rollout)


def rehearse(learner: Learner, prompts: Prompts) -> None:
    """One micro-batch of the longest rows, beside what the optimizers take; of all this only AdamW's moments stay."""
    for optimizer in learner.optimizers.values():
        make_moments(optimizer)
    # DistributedDataParallel sums gradients in buckets, which are another copy of them
    reserved = [stand_ins(optimizer, copies=int(learner.world > 1)) for optimizer in learner.optimizers.values()]
    count = min(learner.args.per_device_train_batch_size, learner.args.batch_size // learner.world)
    rollout = longest_rollout(learner, prompts, count)
    rows = torch.arange(count, device=learner.device)
    tokens: Tensor = rollout.response_lengths.sum().float() * learner.world
    devices = [torch.cuda.current_device()] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for network, loss_of in passes(learner, rollout):
            learner.backward(network, loss_of, [rows], tokens, MetricSums())
            network.module.zero_grad(set_to_none=True)
    del reserved


@contextlib.contextmanager
def memory_told(args: PPOConfig, updates_done: Callable[[], int]) -> Iterator[None]:
    """Turn an error that says that memory is full into a UserError which says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        rows = args.per_device_train_batch_size
        ways = [f"lower response_length ({args.response_length}), or batch_size ({args.batch_size})"]
        if not args.gradient_checkpointing:
            ways.insert(0, "set gradient_checkpointing to True")
        if rows > 1:
            ways.insert(0, f"lower per_device_train_batch_size from {rows} to {rows // 2}")
        kept = bool(args.save_steps) and updates_done() >= args.save_steps
        goes_on = "; with all but the last of these it goes on from its last checkpoint" if kept and ways[1:] else ""
        raise UserError(f"ppo: out of memory in update {updates_done() + 1}: {', or '.join(ways)}{goes_on}") from error
