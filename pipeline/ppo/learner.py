"""From scored answers to new weights: advantages, then optimizer steps of critic and policy."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.ppo import algorithm as A
from pipeline.ppo.advantages import ESTIMATORS
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.metrics import MetricSums, rollout_metrics
from pipeline.ppo.models import Models
from pipeline.ppo.rollout import PRETRAINING, SHUFFLING, Plan, PretrainingText, Rollout, plan_epoch, seeded

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Rows of a micro-batch → their loss, summed over tokens, and sums for the log."""


@dataclass
class Network:
    """What an optimizer trains: a forward pass, which DistributedDataParallel wraps where there are more processes."""

    module: nn.Module
    optimizer: Any


class Learner:
    """Policy and critic with their optimizers: `estimate` advantages of scored answers, then `update` the weights."""

    def __init__(
        self, models: Models, args: PPOConfig, accelerator: Accelerator, ptx: PretrainingText | None = None
    ) -> None:
        self.models, self.args, self.accelerator, self.ptx = models, args, accelerator, ptx
        self.device, self.world, self.rank = accelerator.device, accelerator.num_processes, accelerator.process_index
        self.reduce: A.Reduce = A.alone if self.world == 1 else partial(accelerator.reduce, reduction="sum")
        policy_rate = args.learning_rate
        critic_rate = policy_rate if args.critic_learning_rate is None else args.critic_learning_rate
        trained = [(models.policy, policy_rate)]
        if args.share_trunk and models.critic is not None:
            trained.append((models.critic, critic_rate))
        self.policy = self._network(models.policy_forward, trained)
        self.critic: Network | None = None
        if models.critic_forward is not None:
            self.critic = self._network(models.critic_forward, [(models.critic_forward.model, critic_rate)])

    def _network(self, forward: nn.Module, trained: list[tuple[nn.Module, float]]) -> Network:
        return Network(*self.accelerator.prepare(forward, build_optimizer(self.args, trained)))

    @property
    def optimizers(self) -> dict[str, Any]:
        """The optimizers by the name of what they train."""
        networks = {"policy": self.policy, "critic": self.critic}
        return {name: network.optimizer for name, network in networks.items() if network is not None}

    # --- before the first step ----------------------------------------------------------------------------------------

    def estimate(self, rollout: Rollout, update: int, kl_coef: float) -> dict[str, float]:
        """Fill in log-probabilities, values, advantages and returns; returns the figures of the answers.

        Micro-batches are those of the first epoch, so the policy's log-probabilities come out of the same computation
        as in training: to the bit, the ratio at the first step is 1 and the KL to an equal reference 0.
        """
        args = self.args
        if self.renews_reference(update):
            copy_weights(self.models.policy, self.models.reference)
        times = self._read(rollout, self.plan(rollout, update, epoch=0))
        kl = A.kl_k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = A.place_rewards(rollout.scores, kl, rollout.response_lengths, kl_coef)
        ESTIMATORS[args.advantage_estimator].estimate(rollout, rewards, args, self.reduce)
        for name in ("advantages", "returns")[: 1 if self.models.critic is None else 2]:
            if getattr(getattr(rollout, name, None), "shape", None) != rewards.shape:
                raise UserError(
                    f"advantage_estimator {args.advantage_estimator} must set rollout.{name}, a tensor of the shape "
                    f"{tuple(rewards.shape)} (answers, tokens)"
                )
        if args.sampler_weight_cap is not None and rollout.sampler_logprobs is not None:
            rollout.weights = A.importance_weights(rollout.logprobs, rollout.sampler_logprobs, args.sampler_weight_cap)
        metrics = rollout_metrics(rollout, kl, kl_coef, self.reduce) | times
        if self.models.critic is not None:
            explained = A.explained_variance(rollout.values, rollout.returns, rollout.mask, self.reduce)
            metrics["val/explained_variance"] = explained.item()
        return metrics

    def _read(self, rollout: Rollout, plan: Plan) -> dict[str, float]:
        """The forward passes before learning: the policy's, the reference's and the critic's; returns their times."""
        models, times = self.models, dict[str, float]()
        clock = self.clock()

        def lap(name: str) -> None:
            nonlocal clock
            before, clock = clock, self.clock()
            times[f"time/{name}"] = clock - before

        with self.accelerator.autocast():
            names = ["logprobs", "entropy", "values"][: 3 if self.args.share_trunk else 2]
            with_entropy = partial(models.policy_forward, entropy=True)
            for name, table in zip(names, rollout.per_token(with_entropy, plan, len(names)), strict=True):
                setattr(rollout, name, table)
            lap("logprobs")
            with models.reference_forward.without_adapter():
                reference = models.reference_forward
                (rollout.ref_logprobs,) = rollout.per_token(lambda *inputs: reference(*inputs)[0], plan)
            lap("reference")
            if models.critic_forward is not None:
                (rollout.values,) = rollout.per_token(models.critic_forward, plan)
                lap("critic")
        return times

    def kl_of(self, rollout: Rollout) -> list[float]:
        """log π − log π_ref of each answer as a whole, in nats."""
        rows = torch.arange(len(rollout.scores), device=self.device)
        plan = [list(rows.split(self.args.per_device_train_batch_size))]
        policy, reference = self.models.policy_forward, self.models.reference_forward
        with self.accelerator.autocast():
            (logprobs,) = rollout.per_token(lambda *inputs: policy(*inputs)[0], plan)
            with reference.without_adapter():
                (ref_logprobs,) = rollout.per_token(lambda *inputs: reference(*inputs)[0], plan)
        return A.kl_k1(logprobs, ref_logprobs).double().sum(1).tolist()

    # --- the steps ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, update: int) -> dict[str, float]:
        """`num_ppo_epochs` × `num_mini_batches` optimizer steps of critic and policy (arXiv 1707.06347, algorithm 1).

        The policy rests during the critic's warm-up, and once a mini-batch goes past `target_kl`.
        """
        start, log = self.clock(), MetricSums()
        policy_learns = update >= self.args.critic_warmup_updates
        for epoch in range(self.args.num_ppo_epochs):
            for number, mini_batch in enumerate(self.plan(rollout, update, epoch)):
                tokens = self.reduce(rollout.response_lengths[torch.cat(mini_batch)].sum().float())
                norms = {}
                if self.critic is not None:
                    self.backward(self.critic, partial(self.value_loss, rollout), mini_batch, tokens, log)
                    norms["critic/grad_norm"] = self.step(self.critic)
                if policy_learns and self.ptx is not None:
                    random = seeded(self.args.seed, PRETRAINING, update, epoch, number, self.rank)
                    self.pretraining_backward(self.ptx, random, tokens, log)
                if policy_learns or self.args.share_trunk:
                    loss_of = partial(self.policy_loss, rollout)
                    if self.args.share_trunk:
                        loss_of = partial(self.common_loss, rollout, policy_learns)
                    self.backward(self.policy, loss_of, mini_batch, tokens, log)
                    policy_learns = policy_learns and not self.past_target_kl(log.open, tokens)
                    norms |= self.policy_step(policy_learns)
                log.close(tokens, norms)
        metrics = log.means(self.reduce)
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(
                f"ppo: a loss or gradient of update {update + 1} is not a finite number; lower learning_rate or "
                "critic_learning_rate and begin anew, in another output_dir if this run's checkpoints are to stay"
            )
        return metrics | {"time/update": self.clock() - start}

    def plan(self, rollout: Rollout, update: int, epoch: int) -> Plan:
        """This epoch's mini-batches of micro-batches; the same on every call."""
        shuffle = seeded(self.args.seed, SHUFFLING, update, epoch, self.rank)
        return plan_epoch(rollout.lengths, self.args.num_mini_batches, self.args.per_device_train_batch_size, shuffle)

    def backward(
        self, network: Network, loss_of: LossFunction, mini_batch: list[Tensor], tokens: Tensor, log: MetricSums
    ) -> None:
        """Gradients of the mean loss over all `tokens` of a mini-batch, summed up micro-batch by micro-batch."""
        for i, rows in enumerate(mini_batch):
            last = i + 1 == len(mini_batch)  # the only one in which processes sum their gradients
            with contextlib.nullcontext() if last else self.accelerator.no_sync(network.module):
                loss, sums = loss_of(rows)
                # DistributedDataParallel takes the mean over processes; `tokens` counts those of all processes.
                self.accelerator.backward(loss * self.world / tokens)
            log.add(sums)

    def step(self, network: Network) -> Tensor:
        """Clip the gradients to `max_grad_norm` and take an optimizer step; returns their norm before."""
        norm = self.accelerator.clip_grad_norm_(network.module.parameters(), self.args.max_grad_norm)
        network.optimizer.step()
        network.optimizer.zero_grad()
        return norm.detach()

    def policy_step(self, policy_learns: bool) -> dict[str, Tensor]:
        """The policy's step; while it rests, with `share_trunk` the head's alone, else none. The gradient's norm."""
        if policy_learns:
            return {"policy/grad_norm": self.step(self.policy)}
        for parameter in self.models.policy.parameters():
            parameter.grad = None
        return {"critic/grad_norm": self.step(self.policy)} if self.args.share_trunk else {}

    # --- losses of a micro-batch, summed over its tokens --------------------------------------------------------------

    def policy_loss(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate less entropy_coef · entropy."""
        logprobs, entropy = self.policy.module(*rollout.inputs(rows), entropy=bool(self.args.entropy_coef))
        return self.surrogate(rollout, rows, logprobs, entropy)

    def common_loss(self, rollout: Rollout, policy_learns: bool, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """With `share_trunk`: policy loss + vf_coef · value loss, of one forward pass."""
        logprobs, entropy, values = self.policy.module(
            *rollout.inputs(rows), entropy=bool(self.args.entropy_coef), trunk_learns=policy_learns
        )
        value_loss, sums = self.squared_error(rollout, rows, values)
        loss, policy_sums = self.surrogate(rollout, rows, logprobs, entropy)
        # While the policy rests its loss counts 0 instead of being left out: DistributedDataParallel waits for every
        # gradient
        return loss * policy_learns + self.args.vf_coef * value_loss, sums | (policy_sums if policy_learns else {})

    def value_loss(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's clipped squared error."""
        assert self.critic is not None
        return self.squared_error(rollout, rows, self.critic.module(*rollout.inputs(rows)))

    def surrogate(
        self, rollout: Rollout, rows: Tensor, logprobs: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy loss of log-probabilities (N,) and entropies (N,)."""
        args = self.args
        old, advantages = rollout.flat(rollout.logprobs, rows), rollout.flat(rollout.advantages, rows)
        weights = None if rollout.weights is None else rollout.flat(rollout.weights, rows)
        loss, sums = A.policy_loss(
            logprobs, old, advantages, args.cliprange, args.cliprange_high, args.dual_clip, weights
        )
        sums["loss/policy_avg"] = loss.detach()
        if entropy is not None:
            loss = loss - args.entropy_coef * entropy.sum()
            sums["policy/entropy_avg"] = entropy.detach().sum()
        return loss, sums

    def squared_error(self, rollout: Rollout, rows: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Value loss of values (N,)."""
        old_values, returns = rollout.flat(rollout.values, rows), rollout.flat(rollout.returns, rows)
        loss, sums = A.value_loss(values, old_values, returns, self.args.cliprange_value)
        return loss, {"loss/value_avg": loss.detach(), **sums}

    def pretraining_backward(
        self, ptx: PretrainingText, random: torch.Generator, tokens: Tensor, log: MetricSums
    ) -> None:
        """Gradients of ptx_coef · mean loss on pretraining text (InstructGPT), ahead of the policy step's own."""
        args, module = self.args, self.policy.module
        ids, predicts = ptx.draw(args.ptx_batch_size // self.world, random, self.device)
        count = self.reduce(predicts.sum().float())
        size = args.per_device_train_batch_size
        for part, places in zip(ids.split(size), predicts.split(size), strict=True):
            with self.accelerator.no_sync(module):  # the policy step's last backward pass sums them all
                loss = -module(part, places, temperature=1.0)[0].sum() / count
                self.accelerator.backward(args.ptx_coef * loss * self.world)
            log.add({"loss/ptx_avg": loss.detach() * tokens})

    # --- when ---------------------------------------------------------------------------------------------------------

    def past_target_kl(self, sums: dict[str, Tensor], tokens: Tensor) -> bool:
        """Whether a mini-batch's approximate KL to the sampling policy exceeds `target_kl`."""
        if self.args.target_kl is None:
            return False
        return float(self.reduce(sums["policy/approxkl_avg"] / tokens)) > self.args.target_kl

    def renews_reference(self, update: int) -> bool:
        """Whether the reference becomes the policy as it is before this update: after the evaluation of the last."""
        every = self.args.ref_sync_updates
        return bool(every) and update > 0 and update % every == 0

    def set_learning_rates(self, update: int) -> dict[str, float]:
        """Warm-up and decay as a function of the number of updates done, so there is no scheduler state."""
        args = self.args
        factor = min(1.0, (update + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        if args.lr_scheduler_type == "linear":
            factor *= 1 - update / args.total_updates
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
        rates = {"lr": self.policy.optimizer.param_groups[0]["lr"]}
        if self.models.critic is not None:
            rates["critic/lr"] = (self.critic or self.policy).optimizer.param_groups[-1]["lr"]
        return rates

    def clock(self) -> float:
        """Seconds, when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def build_optimizer(args: PPOConfig, trained: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    """AdamW of models, each with its peak learning rate, kept as `rate`; weight decay leaves out norms and biases."""
    groups: list[dict[str, Any]] = []
    for model, rate in trained:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(f"{type(model).__name__}: no weight of it learns (requires_grad is False); set it for some")
        if any(p.dtype != torch.float32 for p in parameters):
            raise UserError(
                f"{type(model).__name__}: its trained weights are not in fp32, which rounds small steps away; load it "
                "with dtype=torch.float32 (mixed_precision computes in bf16 all the same)"
            )
        for decayed in (True, False):
            group = [p for p in parameters if (p.ndim >= 2) == decayed]
            decay = args.weight_decay if decayed else 0.0
            groups.append({"params": group, "weight_decay": decay, "lr": rate, "rate": rate})
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=args.adam_epsilon, fused=True)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`, a model of the same shape."""
    for theirs, ours in zip(target.parameters(), source.parameters(), strict=True):
        theirs.copy_(ours)
