"""From scored answers to new weights: advantages, then optimizer steps of critic and policy."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model.hardware import handing_back_memory, side_by_side
from pipeline.ppo import algorithm as A
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.extras import Average, PretrainingText, copy_weights
from pipeline.ppo.forward import TokenLogprobs, TokenValues
from pipeline.ppo.metrics import MetricSums, rollout_metrics
from pipeline.ppo.rollout import Plan, Rollout, plan_epoch, seeded

SHUFFLING, PRETRAINING = 3, 5  # first numbers of seeds, as in trainer.py


class Step(NamedTuple):
    """One optimizer step: rows by micro-batch, their tokens on all processes, what draws pretraining text."""

    micro_batches: list[Tensor]
    tokens: Tensor
    random: torch.Generator


class Learner:
    """The half of PPOTrainer that learns; the other half builds, samples, logs and keeps."""

    args: PPOConfig
    accelerator: Accelerator
    device: torch.device
    world: int
    rank: int
    reduce: A.Reduce | None
    at_once: bool  # policy and critic may learn at the same time
    total_updates: int
    policy: nn.Module
    policy_forward: TokenLogprobs
    reference_forward: TokenLogprobs
    critic_forward: TokenValues
    policy_train: nn.Module  # the forwards above, through DistributedDataParallel
    critic_train: nn.Module
    policy_optimizer: Any
    critic_optimizer: Any
    kl_coef: float
    average: Average | None
    ptx: PretrainingText | None

    def score(self, rollout: Rollout, update: int) -> dict[str, float]:
        """Fill in log-probabilities, values, advantages and returns.

        Micro-batches and threads are those of the first epoch, so the policy's log-probabilities come out of the same
        computation as in training: to the bit, the ratio at the first step is 1 and the KL to an equal reference 0.
        """
        args, start = self.args, self._clock()
        if self._renews(update):
            copy_weights(self.policy, self.reference_forward.model)
        plan = self.plan(rollout, update, epoch=0)
        clocks = [start]
        with self.accelerator.autocast():
            names = ("logprobs", "entropy", "values")[: 3 if args.share_trunk else 2]
            with_entropy = partial(self.policy_forward, entropy=True)
            tables = rollout.per_token(with_entropy, plan, len(names), self.at_once)
            for name, table in zip(names, tables, strict=True):
                setattr(rollout, name, table)
            clocks.append(self._clock())
            with self.reference_forward.without_adapter():
                (rollout.ref_logprobs,) = rollout.per_token(
                    lambda *inputs: self.reference_forward(*inputs)[0], plan, at_once=self.at_once
                )
            clocks.append(self._clock())
            if not args.share_trunk:
                (rollout.values,) = rollout.per_token(self.critic_forward, plan, at_once=self.at_once)
            clocks.append(self._clock())

        lengths, mask = rollout.response_lengths, rollout.mask
        kl = A.kl_k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = A.place_rewards(rollout.scores, kl, lengths, self.kl_coef)
        if args.whiten_rewards:
            rewards = A.masked_whiten(rewards, mask, self.reduce, shift_mean=False)
        rollout.returns = A.gae(rewards, rollout.values, lengths, args.gamma, args.lam_value) + rollout.values * mask
        advantages = A.gae(rewards, rollout.values, lengths, args.gamma, args.lam)
        rollout.advantages = A.masked_whiten(advantages, mask, self.reduce)

        if args.sampler_weight_cap is not None:
            rollout.weights = A.importance_weights(rollout.logprobs, rollout.sampler_logprobs, args.sampler_weight_cap)

        metrics = rollout_metrics(rollout, kl, self.kl_coef, self.reduce)
        parts = ("time/logprobs", "time/reference", "time/critic")  # of time/score
        metrics |= {name: end - begin for name, begin, end in zip(parts, clocks, clocks[1:], strict=False)}
        metrics["time/score"] = self._clock() - start
        return metrics

    def optimise(self, rollout: Rollout, update: int) -> dict[str, float]:
        """`num_ppo_epochs` × `num_mini_batches` optimizer steps of critic and, after its warm-up, policy."""
        start = self._clock()
        self.policy_moves = update >= self.args.critic_warmup_updates
        steps = self.steps(rollout, update)
        learn = [self.learn_values, self.learn_policy] if self.policy_moves else [self.learn_values]
        if self.args.share_trunk:
            learn = [self.learn_both]
        log = MetricSums()
        with handing_back_memory() if self.at_once else contextlib.nullcontext():
            for part in side_by_side([partial(half, rollout, steps) for half in learn], self.at_once):
                log.join(part)
        metrics = log.means(self.reduce)
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(
                f"ppo: a loss or gradient of update {update + 1} is not a finite number; lower learning_rate or "
                "critic_learning_rate and begin anew, in another output_dir if this run's checkpoints are to stay"
            )
        metrics["time/update"] = self._clock() - start
        return metrics

    def steps(self, rollout: Rollout, update: int) -> list[Step]:
        """All optimizer steps of an update."""
        found = []
        for epoch in range(self.args.num_ppo_epochs):
            plan = self.plan(rollout, update, epoch)
            counts = torch.stack([rollout.response_lengths[torch.cat(rows)].sum() for rows in plan]).float()
            counts = self.reduce(counts) if self.reduce else counts
            for i, (micro_batches, tokens) in enumerate(zip(plan, counts, strict=True)):
                random = seeded(self.args.seed, PRETRAINING, update, epoch, i, self.rank)
                found.append(Step(micro_batches, tokens, random))
        return found

    def learn_values(self, rollout: Rollout, steps: list[Step]) -> MetricSums:
        """The critic's steps; they share nothing with the policy's, so both may run at the same time."""
        log = MetricSums()
        for step in steps:
            self.critic_step(rollout, step.micro_batches, step.tokens, log)
        return log

    def learn_policy(self, rollout: Rollout, steps: list[Step]) -> MetricSums:
        """The policy's steps, up to the one that goes past `target_kl`."""
        log = MetricSums()
        for step in steps:
            if self.policy_moves:
                if self.ptx:
                    self.pretraining_loss(step.random, step.tokens, log)
                self.policy_step(rollout, step.micro_batches, step.tokens, log)
        return log

    def learn_both(self, rollout: Rollout, steps: list[Step]) -> MetricSums:
        """With `share_trunk`: the steps of policy and critic in one."""
        log = MetricSums()
        for step in steps:
            if self.policy_moves and self.ptx:
                self.pretraining_loss(step.random, step.tokens, log)
            self.common_step(rollout, step.micro_batches, step.tokens, log)
        return log

    def critic_step(self, rollout: Rollout, micro_batches: list[Tensor], tokens: Tensor, log: MetricSums) -> None:
        """One step on the mean value loss over all `tokens` of a mini-batch, summed up micro-batch by micro-batch."""
        for rows, sync in self._micro_batches(micro_batches, self.critic_train):
            with sync:
                loss, sums = self.value_loss(rollout, rows, self.critic_train(*rollout.inputs(rows)))
                # DistributedDataParallel takes the mean over processes; `tokens` counts those of all processes.
                self.accelerator.backward(loss * self.world / tokens)
            log.add(sums)
        log.close(tokens, {"critic/grad_norm": self._clip_and_step(self.critic_train, self.critic_optimizer)})

    def policy_step(self, rollout: Rollout, micro_batches: list[Tensor], tokens: Tensor, log: MetricSums) -> None:
        """One step on the mean clipped surrogate over all `tokens`; past `target_kl` none, and no more this update."""
        for rows, sync in self._micro_batches(micro_batches, self.policy_train):
            with sync:
                found = self.policy_train(*rollout.inputs(rows), entropy=bool(self.args.entropy_coef))
                loss, sums = self.policy_loss(rollout, rows, *found)
                self.accelerator.backward(loss * self.world / tokens)
            log.add(sums)
        if self._too_far(log.open["policy/approxkl_avg"] / tokens):
            self.policy_moves = False
            self.policy_optimizer.zero_grad()
            log.close(tokens, {})
            return
        log.close(tokens, {"policy/grad_norm": self._clip_and_step(self.policy_train, self.policy_optimizer)})

    def common_step(self, rollout: Rollout, micro_batches: list[Tensor], tokens: Tensor, log: MetricSums) -> None:
        """With `share_trunk`: one step on policy loss + vf_coef · value loss; the head alone while the policy rests."""
        args, moves = self.args, self.policy_moves
        for rows, sync in self._micro_batches(micro_batches, self.policy_train):
            with sync:
                logprobs, entropy, values = self.policy_train(
                    *rollout.inputs(rows), entropy=bool(args.entropy_coef), trunk_learns=moves
                )
                value_loss, sums = self.value_loss(rollout, rows, values)
                loss, policy_sums = self.policy_loss(rollout, rows, logprobs, entropy)
                # While the policy rests its loss counts 0 instead of being left out: DistributedDataParallel waits for
                # every gradient
                self.accelerator.backward((loss * moves + args.vf_coef * value_loss) * self.world / tokens)
            log.add(sums | (policy_sums if moves else {}))
        if moves and self._too_far(log.open["policy/approxkl_avg"] / tokens):
            self.policy_moves = moves = False
        if not moves:
            for parameter in self.policy.parameters():
                parameter.grad = None
        norm = self._clip_and_step(self.policy_train, self.policy_optimizer)
        log.close(tokens, {"policy/grad_norm" if moves else "critic/grad_norm": norm})

    def policy_loss(
        self, rollout: Rollout, rows: Tensor, logprobs: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate less entropy_coef · entropy of a micro-batch, summed over its tokens; sums for the log."""
        args = self.args
        old, advantages = rollout.flat(rollout.logprobs, rows), rollout.flat(rollout.advantages, rows)
        weights = None if rollout.weights is None else rollout.flat(rollout.weights, rows)
        loss, sums = A.policy_loss(
            logprobs, old, advantages, args.cliprange, args.cliprange_high, args.dual_clip, weights
        )
        sums["loss/policy_avg"] = loss.detach()
        if args.entropy_coef:
            loss = loss - args.entropy_coef * entropy.sum()
            sums["policy/entropy_avg"] = entropy.detach().sum()
        return loss, sums

    def value_loss(self, rollout: Rollout, rows: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss of a micro-batch, summed over its tokens; sums for the log."""
        old_values, returns = rollout.flat(rollout.values, rows), rollout.flat(rollout.returns, rows)
        loss, sums = A.value_loss(values, old_values, returns, self.args.cliprange_value)
        return loss, {"loss/value_avg": loss.detach(), **sums}

    def pretraining_loss(self, random: torch.Generator, tokens: Tensor, log: MetricSums) -> None:
        """Gradients of ptx_coef · mean loss on pretraining text (InstructGPT), ahead of the policy step's own."""
        args = self.args
        ids, predicts = self.ptx.draw(args.ptx_batch_size // self.world, random, self.device)
        count = predicts.sum().float()
        count = self.reduce(count) if self.reduce else count
        size = args.per_device_train_batch_size
        for part, places in zip(ids.split(size), predicts.split(size), strict=True):
            with self.accelerator.no_sync(self.policy_train):  # the policy step's last backward pass sums them all
                logprobs = self.policy_train(part, places, temperature=1.0)[0]
                loss = -logprobs.sum() / count
                self.accelerator.backward(args.ptx_coef * loss * self.world)
            log.add({"loss/ptx_avg": loss.detach() * tokens})

    def _follow(self, metrics: dict[str, float], update: int) -> None:
        """Move what follows the policy: β to its target, and the average."""
        args = self.args
        # Where policy and reference are still equal, or again, the KL is 0 and says nothing about β
        equal = update <= args.critic_warmup_updates or self._renews(update)
        if args.adaptive_kl_target is not None and not equal:
            self.kl_coef = A.adapted_kl_coef(
                self.kl_coef,
                metrics["objective/kl"],
                args.adaptive_kl_target,
                args.adaptive_kl_horizon,
                args.batch_size,
            )
        if self.average:
            self.average.update(self.policy)

    def _renews(self, update: int) -> bool:
        """Whether the reference becomes the policy as it is before this update: after the evaluation of the last."""
        every = self.args.ref_sync_updates
        return bool(every) and update > 0 and update % every == 0

    def _too_far(self, approxkl: Tensor) -> bool:
        if self.args.target_kl is None:
            return False
        return float(self.reduce(approxkl) if self.reduce else approxkl) > self.args.target_kl

    def plan(self, rollout: Rollout, update: int, epoch: int) -> Plan:
        """This epoch's mini-batches of micro-batches; the same on every call."""
        shuffle = seeded(self.args.seed, SHUFFLING, update, epoch, self.rank)
        return plan_epoch(rollout.lengths, self.args.num_mini_batches, self.args.per_device_train_batch_size, shuffle)

    def _micro_batches(self, rows: list[Tensor], model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        """Micro-batches, each with the context for its backward pass: processes sum gradients in the last one only."""
        for i, part in enumerate(rows):
            yield part, contextlib.nullcontext() if i + 1 == len(rows) else self.accelerator.no_sync(model)

    def _clip_and_step(self, model: nn.Module, optimizer: Any) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm.detach()

    def set_learning_rates(self, update: int) -> None:
        """Warm-up and decay as a function of the number of updates done, so there is no scheduler state."""
        args = self.args
        factor = min(1.0, (update + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        if args.lr_scheduler_type == "linear":
            factor *= 1 - update / self.total_updates
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
