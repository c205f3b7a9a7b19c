"""Proximal policy optimisation (arXiv 1707.06347) of a language model against rewards, under a KL penalty.

    trainer = PPOTrainer(policy, reference, rewards, critic, PPOConfig(...), train_dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model("runs/ppo")

`train` reads from top to bottom: sample answers, score them, turn scores into advantages, take optimizer steps. What is
computed stands in algorithm.py, what is looked at in rollout.py and forward.py; how state is kept in state.py.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.checkpoint import latest_checkpoint
from pipeline.errors import UserError
from pipeline.ppo import algorithm as A
from pipeline.ppo.forward import TokenLogprobs, TokenValues
from pipeline.ppo.metrics import MetricSums
from pipeline.ppo.rollout import Plan, PromptBatch, Prompts, Rollout, decode_completions, plan_epoch, seeded
from pipeline.ppo.setup import build_accelerator, build_optimizer, check_config, combine_rewards
from pipeline.ppo.state import load_state, save_state
from pipeline.ppo_config import PPOConfig
from pipeline.rewards import RewardFunction, checked
from pipeline.sampler import Samples, generate
from pipeline.tokenizer import stop_ids

Callback = Callable[["PPOTrainer", dict[str, float]], None]
# First numbers of the seeds, so that no two uses draw the same: the order of prompts has 1 (rollout.py).
SAMPLING, SHUFFLING, EVALUATION = 2, 3, 4


class PPOTrainer:
    """PPO with a policy, a frozen reference, rewards and a critic of its own network.

    policy            causal language model of transformers or pipeline.gpt; trained in place
    reference         model of the same vocabulary, frozen here; None: a copy of the policy as it is now
    rewards           `f(prompts, completions, **columns) -> list[float]`, or several, which are added up
    critic            sequence classifier with one label; trained in place
    args              PPOConfig
    train_dataset     rows with `prompt` (text or messages); other columns go to the rewards
    eval_dataset      held-out rows of the same kind, looked at every `args.eval_steps` updates
    processing_class  the policy's tokenizer
    stage             pipeline.runtime.Stage for logging, progress and the resume point; None: plain prints
    gold              function like a reward that is only looked at, on eval_dataset
    callbacks         each is called as `callback(trainer, metrics)` after every update

    Raises UserError before any work where arguments, models and data do not fit together.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        rewards: RewardFunction | Sequence[RewardFunction],
        critic: nn.Module,
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        stage: Any = None,
        gold: RewardFunction | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self.args, self.stage, self.gold, self.callbacks = args, stage, gold, list(callbacks or ())
        self.accelerator: Accelerator = stage.accelerator if stage else build_accelerator(args)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.rank, self.is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.reduce: A.Reduce | None = None if self.world == 1 else lambda t: self.accelerator.reduce(t, "sum")
        check_config(args, self.world, processing_class)

        self.tokenizer, self.end_tokens = processing_class, stop_ids(policy, processing_class)
        self.pad_token = processing_class.pad_token_id if processing_class.pad_token_id is not None else 0
        context = getattr(policy.config, "max_position_embeddings", None)
        self.prompts = Prompts(train_dataset, self.tokenizer, args.response_length, context, "train_dataset")
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = Prompts(eval_dataset, self.tokenizer, args.response_length, context, "eval_dataset")
        self.rewards = combine_rewards(rewards)

        if reference is None or reference is policy:
            reference = copy.deepcopy(policy)
        self.policy, self.critic = policy.to(self.device), critic.to(self.device)
        self.policy_forward = TokenLogprobs(self.policy, args.temperature)
        self.reference_forward = TokenLogprobs(reference.to(self.device).requires_grad_(False), args.temperature)
        self.critic_forward = TokenValues(self.critic)
        self.policy_optimizer = build_optimizer(self.policy, args, args.learning_rate)
        self.critic_optimizer = build_optimizer(self.critic, args, args.critic_learning_rate)
        # Without gradients the modules above run as they are; training goes through DistributedDataParallel.
        self.policy_train, self.policy_optimizer = self.accelerator.prepare(self.policy_forward, self.policy_optimizer)
        self.critic_train, self.critic_optimizer = self.accelerator.prepare(self.critic_forward, self.critic_optimizer)

        self.total_updates = math.ceil(args.total_episodes / args.batch_size)
        self.updates_done, self.tokens, self.seconds = 0, 0, 0.0
        self.metrics: dict[str, float] = {}  # of the last update

    # --- the story ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run the updates that are left, from the newest checkpoint if there is one; returns the final metrics."""
        self._resume()
        if self.updates_done == 0:
            self.evaluate_if_due()
        with self._progress() as advance:
            for update in range(self.updates_done, self.total_updates):
                start = time.perf_counter()
                self.set_learning_rates(update)
                rollout, metrics = self.sample(update)
                judged = self.score(rollout, update)
                metrics |= judged | {"time/score": metrics["time/score"] + judged["time/score"]}
                metrics |= self.optimise(rollout, update)
                self.updates_done = update + 1
                self._account(metrics, rollout, time.perf_counter() - start)
                for callback in self.callbacks:
                    callback(self, metrics)
                self.evaluate_if_due()
                self._save_if_due()
                advance(1, f"{metrics['episodes_per_s']:.1f} episodes/s")
        return self.final_metrics()

    def sample(self, update: int) -> tuple[Rollout, dict[str, float]]:
        """Answer this process's share of the update's prompts and score the answers."""
        args, start = self.args, self._clock()
        indices = self.prompts.order(update * args.batch_size, args.batch_size, args.seed)
        batch = self.prompts.take(indices[self.rank :: self.world])
        samples = self.generate(batch, seeded(args.seed, SAMPLING, update, self.rank))
        sampled = self._clock()
        completions = decode_completions(samples, batch.prompts, self.tokenizer)
        scores = torch.tensor(self.rewards(batch.prompts, completions, **batch.columns), device=self.device)
        rollout = Rollout(
            samples.sequences,
            samples.prompt_lengths,
            samples.response_lengths,
            samples.ended,
            samples.logprobs,
            scores - args.missing_eos_penalty * (~samples.ended),
        )
        return rollout, {"time/sample": sampled - start, "time/score": self._clock() - sampled}

    def score(self, rollout: Rollout, update: int) -> dict[str, float]:
        """Fill in log-probabilities, values, advantages and returns.

        The micro-batches are those of the first epoch, so the policy's log-probabilities come out of the same
        computation as in training: to the bit, the ratio at the first step is 1 and the KL to an equal reference 0.
        """
        args, start = self.args, self._clock()
        plan = self.plan(rollout, update, epoch=0)
        with self.accelerator.autocast():
            rollout.logprobs, rollout.entropy = rollout.per_token(
                lambda *inputs: self.policy_forward(*inputs, entropy=True), plan, outputs=2
            )
            (rollout.ref_logprobs,) = rollout.per_token(lambda *inputs: self.reference_forward(*inputs)[0], plan)
            (rollout.values,) = rollout.per_token(self.critic_forward, plan)

        lengths, mask = rollout.response_lengths, rollout.mask
        kl = A.kl_k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = A.place_rewards(rollout.scores, kl, lengths, args.kl_coef)
        rollout.returns = A.gae(rewards, rollout.values, lengths, args.gamma, args.lam_value) + rollout.values * mask
        advantages = A.gae(rewards, rollout.values, lengths, args.gamma, args.lam)
        rollout.advantages = A.masked_whiten(advantages, mask, self.reduce)

        metrics = self._rollout_metrics(rollout, kl)
        metrics["time/score"] = self._clock() - start
        return metrics

    def optimise(self, rollout: Rollout, update: int) -> dict[str, float]:
        """`num_ppo_epochs` × `num_mini_batches` optimizer steps of critic and, after its warm-up, policy."""
        start = self._clock()
        log = MetricSums()
        self.policy_moves = update >= self.args.critic_warmup_updates
        for epoch in range(self.args.num_ppo_epochs):
            plan = self.plan(rollout, update, epoch)
            counts = torch.stack([rollout.response_lengths[torch.cat(rows)].sum() for rows in plan]).float()
            counts = self.reduce(counts) if self.reduce else counts
            for micro_batches, tokens in zip(plan, counts, strict=True):
                self.critic_step(rollout, micro_batches, tokens, log)
                if self.policy_moves:
                    self.policy_step(rollout, micro_batches, tokens, log)
        metrics = log.means(self.reduce)
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(
                f"ppo: a loss or gradient of update {update + 1} is not a finite number; lower learning_rate or "
                "critic_learning_rate, and start again from the last checkpoint"
            )
        metrics["time/update"] = self._clock() - start
        return metrics

    def critic_step(self, rollout: Rollout, micro_batches: list[Tensor], tokens: Tensor, log: MetricSums) -> None:
        """One step on the mean value loss over all `tokens` of a mini-batch, summed up micro-batch by micro-batch."""
        for rows, sync in self._micro_batches(micro_batches, self.critic_train):
            with sync:
                old_values, returns = rollout.flat(rollout.values, rows), rollout.flat(rollout.returns, rows)
                values = self.critic_train(*rollout.inputs(rows))
                loss, sums = A.value_loss(values, old_values, returns, self.args.cliprange_value)
                # DistributedDataParallel takes the mean over processes; `tokens` counts those of all processes.
                self.accelerator.backward(loss * self.world / tokens)
            log.add({"loss/value_avg": loss.detach(), **sums})
        log.close(tokens, {"critic/grad_norm": self._clip_and_step(self.critic_train, self.critic_optimizer)})

    def policy_step(self, rollout: Rollout, micro_batches: list[Tensor], tokens: Tensor, log: MetricSums) -> None:
        """One step on the mean clipped surrogate over all `tokens`; past `target_kl` none, and no more this update."""
        for rows, sync in self._micro_batches(micro_batches, self.policy_train):
            with sync:
                old, advantages = rollout.flat(rollout.logprobs, rows), rollout.flat(rollout.advantages, rows)
                logprobs, _ = self.policy_train(*rollout.inputs(rows))
                loss, sums = A.policy_loss(logprobs, old, advantages, self.args.cliprange)
                self.accelerator.backward(loss * self.world / tokens)
            log.add({"loss/policy_avg": loss.detach(), **sums})
        if self._too_far(log.open["policy/approxkl_avg"] / tokens):
            self.policy_moves = False
            self.policy_optimizer.zero_grad()
            log.close(tokens, {})
            return
        log.close(tokens, {"policy/grad_norm": self._clip_and_step(self.policy_train, self.policy_optimizer)})

    def _too_far(self, approxkl: Tensor) -> bool:
        if self.args.target_kl is None:
            return False
        return float(self.reduce(approxkl) if self.reduce else approxkl) > self.args.target_kl

    # --- its parts ----------------------------------------------------------------------------------------------------

    def plan(self, rollout: Rollout, update: int, epoch: int) -> Plan:
        """This epoch's mini-batches of micro-batches; the same on every call."""
        shuffle = seeded(self.args.seed, SHUFFLING, update, epoch, self.rank)
        return plan_epoch(rollout.lengths, self.args.num_mini_batches, self.args.per_device_train_batch_size, shuffle)

    def generate(self, batch: PromptBatch, random: torch.Generator) -> Samples:
        """Sample one answer a prompt at `args.temperature`."""
        with self.accelerator.autocast():
            return generate(
                self.policy,
                batch.ids,
                max_new_tokens=self.args.response_length,
                temperature=self.args.temperature,
                eos_token_id=self.end_tokens,
                pad_token_id=self.pad_token,
                generator=random,
            )

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
        for optimizer, rate in (
            (self.policy_optimizer, args.learning_rate),
            (self.critic_optimizer, args.critic_learning_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _rollout_metrics(self, rollout: Rollout, kl: Tensor) -> dict[str, float]:
        """Means over the answers (kl, scores, …: sums over an answer's tokens) or tokens (entropy) of all processes."""
        mask, lengths, scores = rollout.mask, rollout.response_lengths.float(), rollout.scores
        k3 = A.kl_k3(rollout.logprobs, rollout.ref_logprobs)
        gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
        one = torch.ones_like(scores)
        per_token = [(table * mask).sum(1) for table in (kl, k3, rollout.entropy, gap)]
        per_answer = [one, lengths, scores, scores**2, (~rollout.ended).float()]
        sums = torch.stack(per_token + per_answer, dim=1).double().sum(0)
        sums = (self.reduce(sums) if self.reduce else sums).tolist()
        kl1, kl3, entropy, gap, count, length, score, score_squared, truncated = sums
        mean_score, penalty = score / count, -self.args.kl_coef * kl1 / count
        return {
            "objective/kl": kl1 / count,
            "objective/kl_k3": kl3 / count,
            "objective/scores": mean_score,
            "objective/scores_std": math.sqrt(max(0.0, score_squared / count - mean_score**2)),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": mean_score + penalty,
            "objective/entropy": entropy / length,
            "response/length": length / count,
            "response/without_eos": truncated / count,
            "val/sampler_gap": gap / length,
            "val/explained_variance": A.explained_variance(rollout.values, rollout.returns, mask, self.reduce).item(),
        }

    def _account(self, metrics: dict[str, float], rollout: Rollout, seconds: float) -> None:
        """Count what an update did and log it."""
        self.metrics = metrics
        self.tokens += round(metrics["response/length"] * self.args.batch_size)
        self.seconds += seconds
        metrics["lr"] = self.policy_optimizer.param_groups[0]["lr"]
        metrics["episodes_per_s"] = self.args.batch_size / seconds
        if self.updates_done % self.args.logging_steps == 0 or self.updates_done == self.total_updates:
            self.log(metrics)

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics under the number of updates and episodes so far."""
        row = {"step": self.updates_done, "episode": self.updates_done * self.args.batch_size}
        row |= {name: round(value, 8) for name, value in metrics.items()}
        if self.stage:
            self.stage.log(row)
        elif self.is_main:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

    def final_metrics(self) -> dict[str, float]:
        """What a stage records: episodes and their speed over the whole run, KL and scores of the last update."""
        episodes = self.updates_done * self.args.batch_size
        last = {name: self.metrics[f"objective/{name}"] for name in ("kl", "scores")}
        return {"episodes": episodes, "episodes_per_s": episodes / max(self.seconds, 1e-9), **last}

    def evaluate_if_due(self) -> None:
        """Log an evaluation before the first update, every `eval_steps` updates and after the last."""
        due = self.args.eval_steps and (
            self.updates_done % self.args.eval_steps == 0 or self.updates_done == self.total_updates
        )
        if due and self.eval_prompts is not None:
            self.log(self.evaluate())

    def evaluate(self) -> dict[str, float]:
        """Answer every held-out prompt with the same random numbers each time: reward, gold, KL, length."""
        sums = torch.zeros(5, dtype=torch.double, device=self.device)
        own = range(self.rank, len(self.eval_prompts), self.world)
        for start in range(0, len(own), self.args.batch_size):
            batch = self.eval_prompts.take(own[start : start + self.args.batch_size])
            samples = self.generate(batch, seeded(self.args.seed, EVALUATION, start, self.rank))
            answers = decode_completions(samples, batch.prompts, self.tokenizer)
            proxy = self.rewards(batch.prompts, answers, **batch.columns)
            gold = checked("gold", self.gold, batch.prompts, answers, batch.columns) if self.gold else [0.0]
            rollout = Rollout(samples.sequences, samples.prompt_lengths, samples.response_lengths, samples.ended,
                              samples.logprobs, torch.tensor(proxy, device=self.device))  # fmt: skip
            everything = torch.arange(len(batch.ids), device=self.device)
            plan = [list(everything.split(self.args.per_device_train_batch_size))]
            with self.accelerator.autocast():
                (logprobs,) = rollout.per_token(lambda *inputs: self.policy_forward(*inputs)[0], plan)
                (ref_logprobs,) = rollout.per_token(lambda *inputs: self.reference_forward(*inputs)[0], plan)
            kl = A.kl_k1(logprobs, ref_logprobs).sum().item()
            found = [len(batch.ids), sum(proxy), sum(gold), kl, float(samples.response_lengths.sum())]
            sums += torch.tensor(found, dtype=torch.double, device=self.device)
        count, proxy, gold, kl, length = (self.reduce(sums) if self.reduce else sums).tolist()
        metrics = {"eval/proxy": proxy / count, "eval/kl": kl / count, "eval/length": length / count}
        return metrics | ({"eval/gold": gold / count} if self.gold else {})

    def _progress(self) -> Any:
        if self.stage:
            return self.stage.progress(self.total_updates, "ppo", done=self.updates_done)
        return contextlib.nullcontext(lambda n=1, text="": None)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # --- what is kept -------------------------------------------------------------------------------------------------

    def save_model(self, folder: str | Path) -> None:
        """Write the policy with its tokenizer as a stock model folder, and the critic into its subfolder `critic`."""
        if self.is_main:
            self.policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.critic.save_pretrained(Path(folder) / "critic")
            self.tokenizer.save_pretrained(Path(folder) / "critic")
        self.accelerator.wait_for_everyone()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.stage.checkpoints if self.stage else Path(self.args.output_dir) / "checkpoints"

    def _save_if_due(self) -> None:
        if self.args.save_steps and self.updates_done % self.args.save_steps == 0:
            save_state(self)

    def _resume(self) -> None:
        point = self.stage.resume_from if self.stage else latest_checkpoint(self.checkpoints)
        if point is not None and self.updates_done == 0:
            load_state(self, point)
