"""Proximal policy optimisation (arXiv 1707.06347) of a language model against rewards, under a KL penalty.

    trainer = PPOTrainer(policy, reference, rewards, critic, PPOConfig(...), train_dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model("runs/ppo")

`train` reads from top to bottom: sample answers and score them, turn scores into advantages, take optimizer steps; with
`step` the answers and scores are the caller's. The last two are learner.py. What is computed stands in algorithm.py,
what is looked at in rollout.py and forward.py, options with a state of their own in extras.py; evaluation.py looks at
held-out prompts, watch.py warns, state.py keeps.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.checkpoint import latest_checkpoint
from pipeline.errors import UserError
from pipeline.model.hardware import keep_freed_memory
from pipeline.model.lora import is_lora, without_wrapper
from pipeline.model.sampler import Samples, generate
from pipeline.ppo import algorithm as A
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.evaluation import evaluate, keep_best
from pipeline.ppo.extras import Average, PretrainingText
from pipeline.ppo.forward import ReferenceLogprobs, TokenLogprobs, TokenLogprobsAndValues, TokenValues, value_head
from pipeline.ppo.learner import Learner
from pipeline.ppo.rollout import (
    PromptBatch,
    Prompts,
    Rollout,
    as_ids,
    check_rows,
    decode_completions,
    rollout_of,
    seeded,
)
from pipeline.ppo.setup import (
    build_accelerator,
    build_optimizer,
    check_config,
    check_models,
    combine_rewards,
    end_tokens_of,
)
from pipeline.ppo.state import check_start, load_state, save_models, save_state
from pipeline.ppo.watch import watch_evaluation, watch_update
from pipeline.rewards import RewardFunction, add_to_moments, scale_scores

Callback = Callable[["PPOTrainer", dict[str, float]], None]
# First number of the seed, so that no two uses draw the same; others have 1 (rollout.py), 3, 5 (learner.py) and 4
# (evaluation.py).
SAMPLING = 2


class PPOTrainer(Learner):
    """PPO with a policy, a frozen reference, rewards and a critic of its own network.

    policy            causal language model of transformers or of model/gpt.py, or one with LoRA (a PeftModel); trained
                      in place
    reference         model of the same vocabulary, frozen here; None: a copy of the policy as it is now, or the policy
                      with its adapter switched off
    rewards           `f(prompts, completions, **columns) -> list[float]`, or several, which are added up
    critic            sequence classifier with one label; trained in place; None with `args.share_trunk`
    args              PPOConfig
    train_dataset     rows with `prompt` (text or messages); other columns go to the rewards
    eval_dataset      held-out rows of the same kind, looked at every `args.eval_steps` updates
    processing_class  the policy's tokenizer
    stage             pipeline.runtime.record.Stage for logging, progress and the resume point; None: plain prints
    gold              function like a reward that is only looked at, on eval_dataset
    callbacks         each is called as `callback(trainer, metrics)` after every update
    ptx_dataset       texts, or rows with `text`: the pretraining text of `args.ptx_coef`

    Raises UserError before any work where arguments, models and data do not fit together.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        rewards: RewardFunction | Sequence[RewardFunction],
        critic: nn.Module | None,
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        stage: Any = None,
        gold: RewardFunction | None = None,
        callbacks: Sequence[Callback] | None = None,
        ptx_dataset: Any = None,
    ) -> None:
        self.args, self.stage, self.gold, self.callbacks = args, stage, gold, list(callbacks or ())
        self.accelerator: Accelerator = stage.accelerator if stage else build_accelerator(args)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.rank, self.is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.reduce: A.Reduce | None = None if self.world == 1 else lambda t: self.accelerator.reduce(t, "sum")
        check_config(args, self.world, processing_class)
        if self.device.type == "cpu":
            keep_freed_memory()

        self.tokenizer = processing_class
        self.end_tokens, warning = end_tokens_of(policy, processing_class)
        if warning:
            self.say(f"warning: {warning}")
        self.pad_token = processing_class.pad_token_id if processing_class.pad_token_id is not None else 0
        if (critic is None) != args.share_trunk:
            raise UserError("pass a critic, or set share_trunk for a head on the policy's own trunk: one of the two")
        self.context = context = check_models(args, policy, reference, critic, processing_class)
        self.prompts = Prompts(train_dataset, self.tokenizer, args.response_length, context, "train_dataset")
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = Prompts(eval_dataset, self.tokenizer, args.response_length, context, "eval_dataset")
        self.rewards = combine_rewards(rewards)
        if args.eval_steps and eval_dataset is None:
            raise UserError("eval_steps is set but eval_dataset is missing; give held-out prompts, or set it to 0")
        if args.best_metric == "gold" and args.eval_steps and gold is None:
            raise UserError("best_metric is gold but there is no gold judge; give one, or choose another figure")
        self.ptx = None
        if args.ptx_coef:
            longest = args.ptx_max_length if context is None else min(args.ptx_max_length, context - 1)
            self.ptx = PretrainingText(ptx_dataset, self.tokenizer, longest)

        self.policy = policy.to(self.device)
        self.critic = (critic if critic is not None else value_head(policy)).to(self.device)
        if reference is not None and reference is not policy:
            self.reference_forward = TokenLogprobs(reference.to(self.device).requires_grad_(False), args.temperature)
        elif is_lora(policy):
            self.reference_forward = ReferenceLogprobs(self.policy, args.temperature)
        else:
            self.reference_forward = TokenLogprobs(copy.deepcopy(policy).requires_grad_(False), args.temperature)
        actor = self.policy, args.learning_rate
        judge = self.critic, args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
        # Without gradients the modules `_forward` run as they are; training goes through DistributedDataParallel.
        if args.share_trunk:
            common = TokenLogprobsAndValues(self.policy, self.critic, args.temperature, args.gradient_checkpointing)
            self.policy_forward = self.critic_forward = common
            self.policy_train, self.policy_optimizer = self.accelerator.prepare(
                common, build_optimizer(args, actor, judge)
            )
            self.critic_train, self.critic_optimizer = self.policy_train, self.policy_optimizer
        else:
            self.policy_forward = TokenLogprobs(self.policy, args.temperature, args.gradient_checkpointing)
            self.critic_forward = TokenValues(self.critic, args.gradient_checkpointing)
            self.policy_train, self.policy_optimizer = self.accelerator.prepare(
                self.policy_forward, build_optimizer(args, actor)
            )
            self.critic_train, self.critic_optimizer = self.accelerator.prepare(
                self.critic_forward, build_optimizer(args, judge)
            )

        # Two networks with no weight in common, and no collectives, which need one order on all processes
        common = {id(p) for p in self.policy.parameters()} & {id(p) for p in self.critic.parameters()}
        self.at_once = self.device.type == "cpu" and self.world == 1 and not args.share_trunk and not common

        self.total_updates = math.ceil(args.total_episodes / args.batch_size)
        self.updates_done, self.tokens, self.seconds = 0, 0, 0.0
        self.evaluated: int | None = None  # updates done at the last held-out evaluation
        self.half_done = False  # an update has begun to change weights and is not counted yet
        self.resumed = False
        self.metrics: dict[str, float] = {}  # of the last update
        self.kl_coef = args.kl_coef  # β, which adaptive_kl_target moves
        self.average = Average(self.policy, args.ema_decay) if args.ema_decay is not None else None
        self.best: dict[str, Any] | None = None  # figure and step of the best held-out evaluation
        self.baseline: list[float] | None = None  # verdicts on the reference's held-out answers
        self.watched: dict[str, Any] = {}
        self.score_moments = [0.0, 0.0, 0.0]  # of all scores so far, for normalize_scores

    # --- the story ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run the updates that are left, from the newest checkpoint if there is one; returns the final metrics."""
        self.resume()
        self._begin()
        with self._progress() as advance:
            for update in range(self.updates_done, self.total_updates):
                start = time.perf_counter()
                metrics = self.learn(*self.sample(update), start)
                advance(1, f"{metrics['episodes_per_s']:.1f} episodes/s")
        return self.final_metrics()

    def step(
        self, prompts: Sequence[Any], completions: Sequence[Any], scores: Any, logprobs: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """One update from answers that the caller sampled and scored, for a loop of one's own; returns its metrics.

        prompts      batch_size / processes of them: token ids (list or tensor), text, or messages
        completions  as many: token ids, the end token included where there is one, or text (or messages), which is
                     taken as ended
        scores       as many numbers; missing_eos_penalty is taken off here
        logprobs     log-probabilities of each completion's tokens as the sampler had them, if `args.sampler_weight_cap`
                     is to correct for them and `val/sampler_gap` to show them

        Does what `train` does with its own answers, evaluation, checkpoints and callbacks included; the learning rate's
        course ends at `args.total_episodes`. To go on from a checkpoint, call `resume` before the loop.
        Raises UserError for rows that do not fit, and after the last update.
        """
        if self.updates_done >= self.total_updates:
            raise UserError(f"step: all {self.total_updates} updates of total_episodes are done; raise total_episodes")
        if self.args.sampler_weight_cap is not None and logprobs is None:
            raise UserError("step: sampler_weight_cap is set; pass the sampler's logprobs, or set it to none")
        asked, said = as_ids(prompts, self.tokenizer), as_ids(completions, self.tokenizer, self.end_tokens[0])
        scores = [float(score) for score in scores]
        vocabulary = without_wrapper(self.policy).get_input_embeddings().num_embeddings
        check_rows(asked, said, scores, logprobs, self.args.batch_size // self.world, self.context, vocabulary)
        self._begin()
        start = time.perf_counter()
        rollout = rollout_of(asked, said, scores, self.end_tokens, self.pad_token, logprobs, self.device)
        rollout.scores, metrics = self.shape_scores(rollout.scores, rollout.ended)
        return self.learn(rollout, metrics | {"time/sample": 0.0, "time/score": 0.0}, start)

    def _begin(self) -> None:
        """What stands before updates: nothing half done, no other run's checkpoints, an evaluation that is due."""
        check_start(self)
        if self.stage:
            self.stage.begin()
        self.evaluate_if_due()

    def learn(self, rollout: Rollout, metrics: dict[str, float], start: float) -> dict[str, float]:
        """One update from scored answers, and what follows it; `metrics` are those of sampling, begun at `start`."""
        update = self.updates_done
        self.set_learning_rates(update)
        judged = self.score(rollout, update)
        metrics |= judged | {"time/score": metrics["time/score"] + judged["time/score"]}
        self.half_done = True
        metrics |= self.optimise(rollout, update)
        self._follow(metrics, update)
        self.updates_done, self.half_done = update + 1, False
        self._account(metrics, rollout, time.perf_counter() - start)
        for callback in self.callbacks:
            callback(self, metrics)
        self.evaluate_if_due()
        self._save_if_due()
        return metrics

    def sample(self, update: int) -> tuple[Rollout, dict[str, float]]:
        """Answer this process's share of the update's prompts and score the answers."""
        args, start = self.args, self._clock()
        count = args.batch_size // args.num_generations
        indices = self.prompts.order(update * count, count, args.seed)
        batch = self.prompts.take([i for i in indices[self.rank :: self.world] for _ in range(args.num_generations)])
        samples = self.generate(batch, seeded(args.seed, SAMPLING, update, self.rank))
        sampled = self._clock()
        completions = decode_completions(samples, batch.prompts, self.tokenizer)
        scores, metrics = self.shape_scores(self.judge(batch, completions), samples.ended)
        rollout = Rollout(
            samples.sequences, samples.prompt_lengths, samples.response_lengths, samples.ended, samples.logprobs, scores
        )
        return rollout, metrics | {"time/sample": sampled - start, "time/score": self._clock() - sampled}

    # --- its parts ----------------------------------------------------------------------------------------------------

    def judge(self, batch: PromptBatch, completions: list[Any]) -> Tensor:
        """The rewards' scores; if one fails, on any process, the state is saved and every process stops."""
        failure, scores = None, [0.0]
        try:
            scores = self.rewards(batch.prompts, completions, **batch.columns)
        except UserError as error:
            failure = error
        failed = torch.tensor(float(failure is not None), device=self.device)
        if self.reduce(failed) if self.reduce else failed:
            save_state(self)
            where = f"after update {self.updates_done} is kept in {self.checkpoints}"
            raise UserError(f"{failure or 'a reward failed on another process'}; the state {where}") from failure
        return torch.tensor(scores, device=self.device)

    def shape_scores(self, scores: Tensor, ended: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Scores as an update takes them: normalised, clipped, less the penalty for no end token.

        Also the mean of what came in, for the log, where normalising or clipping hides it.
        """
        args, metrics = self.args, {}
        if args.normalize_scores or args.score_clip is not None:
            one = torch.ones_like(scores, dtype=torch.bool)
            metrics["objective/scores_raw"] = A.masked_mean(scores, one, self.reduce).item()
        if args.normalize_scores:
            self.score_moments = add_to_moments(self.score_moments, scores, self.reduce)
        scores = scale_scores(scores, self.score_moments if args.normalize_scores else None, args.score_clip)
        return scores - args.missing_eos_penalty * (~ended), metrics

    def generate(self, batch: PromptBatch, random: torch.Generator, model: nn.Module | None = None) -> Samples:
        """Sample one answer a prompt at `args.temperature`, of the policy or of another model."""
        with self.accelerator.autocast():
            return generate(
                model or self.policy,
                batch.ids,
                max_new_tokens=self.args.response_length,
                temperature=self.args.temperature,
                eos_token_id=self.end_tokens,
                pad_token_id=self.pad_token,
                generator=random,
            )

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _account(self, metrics: dict[str, float], rollout: Rollout, seconds: float) -> None:
        """Count what an update did and log it."""
        self.metrics = metrics
        self.tokens += round(metrics["response/length"] * self.args.batch_size)
        self.seconds += seconds
        metrics["lr"] = self.policy_optimizer.param_groups[0]["lr"]
        metrics["critic/lr"] = self.critic_optimizer.param_groups[-1]["lr"]
        metrics["episodes_per_s"] = self.args.batch_size / seconds
        metrics["seconds_left"] = (self.total_updates - self.updates_done) * self.seconds / self.updates_done
        due = self.updates_done % self.args.logging_steps == 0 or self.updates_done == self.total_updates
        self._log_with(watch_update(self.watched, metrics, self.args.batch_size), metrics, due)

    def _log_with(self, warnings: list[str], metrics: dict[str, Any], due: bool = True) -> None:
        """Log metrics that are due, or that there is a warning about; it stands in their line, and on the screen."""
        if due or warnings:
            self.log(metrics | ({"warning": " ".join(warnings)} if warnings else {}))
        for sentence in warnings:
            self.say(f"warning: {sentence}")

    def say(self, sentence: str) -> None:
        """A sentence on the screen, by one process."""
        if self.stage:
            self.stage.say(sentence)
        elif self.is_main:
            print(sentence, flush=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics under the number of updates and episodes so far."""
        row = {"step": self.updates_done, "episode": self.updates_done * self.args.batch_size}
        row |= {name: round(value, 8) if isinstance(value, float) else value for name, value in metrics.items()}
        if self.stage:
            self.stage.log(row)
        elif self.is_main:
            numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
            print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)

    def final_metrics(self) -> dict[str, float]:
        """What a stage records: episodes and their speed over the whole run, KL and scores of the last update."""
        episodes = self.updates_done * self.args.batch_size
        last = {name: self.metrics[f"objective/{name}"] for name in ("kl", "scores")}
        return {"episodes": episodes, "episodes_per_s": episodes / max(self.seconds, 1e-9), **last}

    def evaluate_if_due(self) -> None:
        """Log an evaluation before the first update, every `eval_steps` updates and after the last, each once."""
        due = self.args.eval_steps and (
            self.updates_done % self.args.eval_steps == 0 or self.updates_done == self.total_updates
        )
        if due and self.evaluated != self.updates_done:
            try:
                metrics = self.evaluate()
            except UserError:  # a reward or judge that failed; with more processes not all of them are here
                if self.world == 1:
                    save_state(self)
                raise
            self._log_with(watch_evaluation(self.watched, metrics), metrics)
            keep_best(self, metrics)
            self.evaluated = self.updates_done

    def evaluate(self) -> dict[str, float]:
        """Figures of the policy on the held-out prompts, with the same random numbers each time (evaluation.py)."""
        return evaluate(self)

    def _progress(self) -> Any:
        if self.stage:
            return self.stage.progress(self.total_updates, "ppo", done=self.updates_done)
        return contextlib.nullcontext(lambda n=1, text="": None)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def save_model(self, folder: str | Path) -> None:
        """Write the policy with its tokenizer as a stock model folder, and the critic into its subfolder `critic`
        (with share_trunk its head alone, as value_head.safetensors).

        The average of `args.ema_decay` goes into the subfolder `ema`, a model folder as well. LoRA is merged into the
        weights, so that each folder opens without peft; the adapter alone is in its subfolder `adapter`.
        """
        save_models(self, Path(folder))

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.stage.checkpoints if self.stage else Path(self.args.output_dir) / "checkpoints"

    def _save_if_due(self) -> None:
        if self.args.save_steps and self.updates_done % self.args.save_steps == 0:
            save_state(self)

    def resume(self) -> int:
        """Go on from the newest checkpoint, if nothing is done yet; returns the number of updates done."""
        point = self.stage.resume_from if self.stage else latest_checkpoint(self.checkpoints)
        if point is not None and self.updates_done == 0:
            load_state(self, point)
            if not self.stage:  # it has said so
                self.say(f"going on from {point}: {self.updates_done} of {self.total_updates} updates are done")
        self.resumed = True
        return self.updates_done
