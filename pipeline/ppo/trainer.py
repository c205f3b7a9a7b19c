"""Proximal policy optimisation (arXiv 1707.06347) of a language model against rewards, under a KL penalty.

    trainer = PPOTrainer(policy, rewards, PPOConfig(...), train_dataset, tokenizer, critic=critic)
    trainer.train()
    trainer.save_model("runs/ppo")

`train` reads from top to bottom: sample answers, score them, turn scores into advantages, take optimizer steps; with
`step` the answers and scores are the caller's. Advantages and steps are learner.py's, the mathematics algorithm.py's,
the networks models.py's and forward.py's; evaluation.py looks at held-out prompts, watch.py warns, state.py keeps.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.checkpoint import latest_checkpoint, prune, write_json
from pipeline.errors import UserError
from pipeline.model.hardware import keep_freed_memory
from pipeline.model.lora import is_lora, save_whole
from pipeline.model.sampler import OwnSampler, Sampler
from pipeline.ppo import algorithm as A
from pipeline.ppo.advantages import ESTIMATORS, check_estimator
from pipeline.ppo.config import PPOConfig, check_config
from pipeline.ppo.evaluation import Evaluator
from pipeline.ppo.inputs import as_list, as_numbers, check_kinds
from pipeline.ppo.learner import Learner
from pipeline.ppo.longest import memory_told, rehearse
from pipeline.ppo.metrics import zero_std_share
from pipeline.ppo.models import (
    build_models,
    check_models,
    embedding_count,
    end_tokens_of,
    follow_models,
    halve_reference,
)
from pipeline.ppo.recorder import Prints, Recorder
from pipeline.ppo.rollout import (
    SAMPLING,
    Answerer,
    GivenRows,
    PretrainingText,
    PromptBatch,
    Prompts,
    Rollout,
    as_ids,
    check_sampler,
    seeded,
)
from pipeline.ppo.state import RunState, identity_of, load_state, save_state
from pipeline.ppo.watch import watch_evaluation, watch_update
from pipeline.rewards import RewardFunction, check_takes, combined
from pipeline.text.tokenizer import is_chat

Callback = Callable[["PPOTrainer", dict[str, float]], None]


class PPOTrainer:
    """PPO with a policy, a frozen reference, rewards and, for `gae`, a critic of its own network.

    policy            causal language model of transformers or of model/gpt.py, or one with LoRA (a PeftModel); trained
                      in place
    rewards           `f(prompts, completions, **columns) -> list[float]`, or several, which are added up
    args              PPOConfig
    train_dataset     rows with `prompt` (text or messages): a Dataset, a list, a dictionary of lists or a DataFrame;
                      other columns go to the rewards
    processing_class  the policy's tokenizer
    critic            sequence classifier with one label; trained in place; None with `share_trunk` or `rloo`
    reference         model of the same vocabulary, frozen here; None: a copy of the policy as it is now, or the policy
                      with its adapter switched off
    sampler           what answers prompts (model/sampler.py: Sampler); None: our own
    gold              function like a reward that is only looked at, on eval_dataset
    eval_dataset      held-out rows like train_dataset's, looked at every `args.eval_steps` updates
    ptx_dataset       texts, or rows with `text`: the pretraining text of `args.ptx_coef`
    callbacks         each is called as `callback(trainer, metrics)` after every update
    recorder          where it writes (recorder.py): a stage of the pipeline; None: plain prints

    Raises UserError before any work where arguments, models and data do not fit together.
    """

    def __init__(
        self,
        policy: nn.Module,
        rewards: RewardFunction | Sequence[RewardFunction],
        args: PPOConfig,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        *,
        critic: nn.Module | None = None,
        reference: nn.Module | None = None,
        sampler: Sampler | None = None,
        gold: RewardFunction | None = None,
        eval_dataset: Any = None,
        ptx_dataset: Any = None,
        callbacks: Callback | Sequence[Callback] = (),
        recorder: Recorder | None = None,
    ) -> None:
        self.callbacks = check_kinds(policy, reference, critic, args, processing_class, gold, callbacks)
        self.args, self.processing_class = args, processing_class
        self.recorder = recorder or Prints(args)
        accelerator = self.accelerator = self.recorder.accelerator
        check_config(args, accelerator.num_processes)
        check_estimator(args)
        self.context = check_models(policy, reference, critic, args, processing_class)
        self.prompts = self._prompts(train_dataset, "train_dataset")
        end_tokens, warning = end_tokens_of(policy, processing_class, is_chat(self.prompts.rows))
        if warning:
            self.recorder.say(f"warning: {warning}")
        self.rewards = combined(rewards)
        sampler = OwnSampler() if sampler is None else sampler
        check_sampler(sampler, compares=eval_dataset is not None and is_lora(policy) and reference in (None, policy))
        self.answerer = Answerer(sampler, processing_class, end_tokens, args, accelerator)
        ptx = self._pretraining_text(ptx_dataset) if args.ptx_coef else None
        held_out = self._held_out(eval_dataset, gold)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.models = build_models(policy, reference, critic, args, accelerator.device)
        for sentence in follow_models(self.models, self.prompts.ids[:4], accelerator.device):
            self.recorder.say(sentence)
        if reference is None and accelerator.mixed_precision == "bf16":
            halve_reference(self.models, args)
        self.learner = Learner(self.models, args, accelerator, ptx)
        self.evaluator: Evaluator | None = None
        if held_out is not None:
            self.evaluator = Evaluator(held_out, self.answerer, self.rewards, gold, self.learner)
        self.state = RunState(args.kl_coef)
        self.resumed = False

    # --- the story ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run the updates that are left, from the newest checkpoint if there is one; returns the final metrics."""
        self._check_rewards()
        self.resume()
        with memory_told(self.args, lambda: self.state.updates_done):
            if self.state.updates_done == 0:
                rehearse(self.learner, self.prompts)
            return self._train()

    def _train(self) -> dict[str, float]:
        self._begin()
        with self.recorder.progress(self.args.total_updates, "ppo", done=self.state.updates_done) as advance:
            while self.state.updates_done < self.args.total_updates:
                self.stop_if_asked()
                start = self.learner.clock()
                rollout, metrics = self.sample(self.state.updates_done)
                metrics = self.learn(rollout, metrics, start)
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
        args, answerer = self.args, self.answerer
        if self.state.updates_done >= args.total_updates:
            raise UserError(f"step: all {args.total_updates} updates of total_episodes are done; raise total_episodes")
        if args.sampler_weight_cap is not None and logprobs is None:
            raise UserError("step: sampler_weight_cap is set; pass the sampler's logprobs, or set it to none")
        rows = GivenRows(
            prompts=as_ids(as_list(prompts, "prompts"), self.processing_class),
            completions=as_ids(as_list(completions, "completions"), self.processing_class, answerer.end_tokens[0]),
            scores=as_numbers(scores, "scores"),
            logprobs=None if logprobs is None else as_list(logprobs, "logprobs"),
        )
        group = args.num_generations if ESTIMATORS[args.advantage_estimator].grouped else 1
        rows.check(
            args.batch_size // self.accelerator.num_processes, group, self.context, embedding_count(self.models.policy)
        )
        self._begin()
        start = self.learner.clock()
        rollout = rows.rollout(answerer.end_tokens, answerer.pad_token, self.accelerator.device)
        same = zero_std_share(rollout.scores, group, self.learner.reduce)
        rollout.scores, metrics = self.shape_scores(rollout.scores, rollout.ended)
        metrics["objective/frac_reward_zero_std"] = same
        return self.learn(rollout, metrics | {"time/sample": 0.0, "time/score": 0.0}, start)

    def sample(self, update: int) -> tuple[Rollout, dict[str, float]]:
        """Answer this process's share of the update's prompts and score the answers."""
        args, clock, rank = self.args, self.learner.clock, self.accelerator.process_index
        start = clock()
        count = args.batch_size // args.num_generations
        indices = self.prompts.order(update * count, count, args.seed)[rank :: self.accelerator.num_processes]
        batch = self.prompts.take([i for i in indices for _ in range(args.num_generations)])
        self.answerer.sync(self.models.policy)
        samples, completions = self.answerer.answer(batch, seeded(args.seed, SAMPLING, update, rank))
        sampled = clock()
        rewards = self.score(batch, completions)
        scores, metrics = self.shape_scores(rewards, samples.ended)
        metrics["objective/frac_reward_zero_std"] = zero_std_share(rewards, args.num_generations, self.learner.reduce)
        return Rollout.of(samples, scores), metrics | {"time/sample": sampled - start, "time/score": clock() - sampled}

    def learn(self, rollout: Rollout, metrics: dict[str, float], start: float) -> dict[str, float]:
        """One update from scored answers, and what follows it; `metrics` are those of sampling, begun at `start`."""
        state, learner = self.state, self.learner
        update, scored = state.updates_done, learner.clock()
        rates = learner.set_learning_rates(update)
        estimated = learner.estimate(rollout, update, state.kl_coef)
        metrics |= estimated | {"time/score": metrics["time/score"] + learner.clock() - scored}
        state.updating = True
        metrics |= learner.update(rollout, update) | rates
        self._adapt_kl_coef(metrics, update)
        state.updates_done, state.updating = update + 1, False
        self._account(metrics, learner.clock() - start)
        for callback in self.callbacks:
            callback(self, metrics)
        self.stop_if_asked()
        last = state.updates_done == self.args.total_updates
        if self.args.save_steps and last:
            self.save_state()  # nothing is lost if the last evaluation is broken off; it is then made again
        self.evaluate_if_due()
        if self.args.save_steps and not last and state.updates_done % self.args.save_steps == 0:
            self.save_state()
        return metrics

    # --- its parts ----------------------------------------------------------------------------------------------------

    def score(self, batch: PromptBatch, completions: list[Any]) -> Tensor:
        """The rewards' scores; if one fails, on any process, the state is saved and every process stops."""
        failure, scores = None, [0.0]
        try:
            scores = self.rewards(batch.prompts, completions, **batch.columns)
        except UserError as error:
            failure = error
        if self.learner.reduce(torch.tensor(float(failure is not None), device=self.accelerator.device)):
            self.save_state()
            where = f"after update {self.state.updates_done} is kept in {self.recorder.checkpoints}"
            raise UserError(f"{failure or 'a reward failed on another process'}; the state {where}") from failure
        return torch.tensor(scores, device=self.accelerator.device)

    def shape_scores(self, scores: Tensor, ended: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Scores as an update takes them: normalised, clipped, less the penalty for no end token.

        Also the mean of what came in, for the log, where normalising or clipping hides it.
        """
        args, state, reduce, metrics = self.args, self.state, self.learner.reduce, dict[str, float]()
        if args.normalize_scores or args.score_clip is not None:
            everywhere = torch.ones_like(scores, dtype=torch.bool)
            metrics["objective/scores_raw"] = A.masked_mean(scores, everywhere, reduce).item()
        if args.normalize_scores:
            state.updating = True  # these scores must not be counted twice
            state.score_moments = A.add_to_moments(state.score_moments, scores, reduce)
        scores = A.scale_scores(scores, state.score_moments if args.normalize_scores else None, args.score_clip)
        return scores - args.missing_eos_penalty * (~ended), metrics

    def _adapt_kl_coef(self, metrics: dict[str, float], update: int) -> None:
        """Steer β to `adaptive_kl_target`."""
        args = self.args
        # Where policy and reference are still equal, or again, the KL is 0 and says nothing about β
        equal = update <= args.critic_warmup_updates or self.learner.renews_reference(update)
        if args.adaptive_kl_target is not None and not equal:
            target, horizon = args.adaptive_kl_target, args.adaptive_kl_horizon
            self.state.kl_coef = A.adapted_kl_coef(
                self.state.kl_coef, metrics["objective/kl"], target, horizon, args.batch_size
            )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Figures of the policy on the held-out prompts, with the same random numbers each time (evaluation.py)."""
        if self.evaluator is None:
            raise UserError("evaluate: there are no held-out prompts; pass eval_dataset")
        evaluation = self.evaluator.evaluate(self.state)
        self.state.baseline = evaluation.baseline
        rows = [asdict(answer) for answer in evaluation.answers]
        self.recorder.table("eval/answers", rows, self.state.updates_done)
        return evaluation.metrics

    def evaluate_if_due(self) -> None:
        """Log an evaluation before the first update, every `eval_steps` updates and after the last, each once."""
        done, every = self.state.updates_done, self.args.eval_steps
        due = every and (done % every == 0 or done == self.args.total_updates)
        if not due or self.state.evaluated == done:
            return
        try:
            metrics = self.evaluate()
        except UserError:  # a reward or gold judge that failed; with more processes not all of them are here
            if self.accelerator.num_processes == 1:
                self.save_state()
            raise
        self._log(watch_evaluation(self.state.watched, metrics), metrics)
        self._keep_best(metrics)
        self.state.evaluated = done

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Write the policy to `<output_dir>/best` if it has the highest `best_metric` of the run so far."""
        name, best = f"eval/{self.args.best_metric}", self.state.best
        if self.args.best_metric == "none" or (best is not None and metrics[name] <= best["value"]):
            return
        self.state.best = {"metric": name, "value": metrics[name], "step": self.state.updates_done}
        folder = Path(self.args.output_dir) / "best"
        beside = folder.with_name("best.partial")
        self.save_model(beside)
        if self.accelerator.is_main_process:
            write_json(beside / "best.json", self.state.best | {"metrics": metrics})
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        self.accelerator.wait_for_everyone()

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _account(self, metrics: dict[str, float], seconds: float) -> None:
        """Count what an update did and log it."""
        state, total = self.state, self.args.total_updates
        state.metrics = metrics
        state.tokens += round(metrics["response/length"] * self.args.batch_size)
        state.seconds += seconds
        metrics["episodes_per_s"] = self.args.batch_size / seconds
        metrics["seconds_left"] = (total - state.updates_done) * state.seconds / state.updates_done
        due = state.updates_done % self.args.logging_steps == 0 or state.updates_done == total
        self._log(watch_update(state.watched, metrics, self.args.batch_size), metrics, due)

    def _log(self, warnings: list[str], metrics: dict[str, Any], due: bool = True) -> None:
        """Log metrics that are due, or that there is a warning about; it stands in their line, and on the screen."""
        if due or warnings:
            done = self.state.updates_done
            row = {"step": done, "episode": done * self.args.batch_size, **metrics}
            self.recorder.log(row | ({"warning": " ".join(warnings)} if warnings else {}))
        for sentence in warnings:
            self.recorder.say(f"warning: {sentence}")

    def final_metrics(self) -> dict[str, float]:
        """What a stage records: episodes and their speed over the whole run, KL and scores of the last update."""
        episodes = self.state.updates_done * self.args.batch_size
        last = {name: self.state.metrics[f"objective/{name}"] for name in ("kl", "scores")}
        return {"episodes": episodes, "episodes_per_s": episodes / max(self.state.seconds, 1e-9), **last}

    # --- what is kept -------------------------------------------------------------------------------------------------

    def save_model(self, folder: str | Path) -> None:
        """Write the policy with its tokenizer as a stock model folder, and the critic, if there is one, into its
        subfolder `critic` (with share_trunk its head alone, as value_head.safetensors).

        LoRA is merged into the weights, so that each folder opens without peft; the adapter alone is in its subfolder
        `adapter`.
        """
        if self.accelerator.is_main_process:
            folders = {Path(folder): self.models.policy}
            if self.models.critic_forward is not None:
                folders[Path(folder) / "critic"] = self.models.critic_forward.model
            for place, model in folders.items():
                save_whole(model, place)
                self.processing_class.save_pretrained(place)
            if self.args.share_trunk and self.models.critic is not None:
                save_file(dict(self.models.critic.state_dict()), Path(folder) / "value_head.safetensors")
        self.accelerator.wait_for_everyone()

    def save_state(self) -> None:
        """Write a checkpoint of everything that a run goes on from. Raises UserError while an update is half done."""
        self._check_whole()
        save_state(self.recorder.checkpoints, self.learner, self.state, self._identity())

    def stop_if_asked(self) -> None:
        """Where a signal asked any process to stop: keep the state and end, before an evaluation that may be due."""
        if self.learner.reduce(torch.tensor(float(self.recorder.stopping), device=self.accelerator.device)):
            self.save_state()
            self.recorder.stop(self.recorder.checkpoints / f"step-{self.state.updates_done:08d}")

    def resume(self) -> int:
        """Go on from the newest checkpoint, if nothing is done yet; returns the number of updates done."""
        self._check_whole()
        point = self.recorder.resume_from if self.state.updates_done == 0 else None
        if point is not None:
            self.state = load_state(point, self.learner, self._identity())
            if self.accelerator.is_main_process:
                prune(self.recorder.checkpoints, self.state.updates_done)
            done, total = self.state.updates_done, self.args.total_updates
            self.recorder.say(f"{point}: {done} of {total} updates are done")
        self.resumed = True
        return self.state.updates_done

    def _identity(self) -> dict[str, Any]:
        held_out = len(self.evaluator.prompts) if self.evaluator else 0
        return identity_of(self.learner, len(self.prompts), held_out)

    # --- before the start ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """What stands before updates: nothing half done, no other run's checkpoints, an evaluation that is due."""
        self._check_whole()
        new = self.state.updates_done == 0 and not self.resumed
        if new and latest_checkpoint(self.recorder.checkpoints, lambda sentence: None):
            raise UserError(
                f"{self.recorder.checkpoints} has checkpoints of a run; call `resume` to go on from them, or choose "
                "another output_dir"
            )
        self.recorder.begin()
        self.evaluate_if_due()

    def _check_whole(self) -> None:
        if self.state.updating:
            raise UserError(
                f"update {self.state.updates_done + 1} was broken off half way; build models and trainer anew: `train` "
                "goes on from the last checkpoint"
            )

    def _prompts(self, rows: Any, name: str) -> Prompts:
        return Prompts(rows, self.processing_class, self.args.response_length, self.context, name)

    def _held_out(self, rows: Any, gold: RewardFunction | None) -> Prompts | None:
        if self.args.eval_steps and rows is None:
            raise UserError("eval_steps is set but eval_dataset is missing; give held-out prompts, or set it to 0")
        if self.args.best_metric == "gold" and self.args.eval_steps and gold is None:
            raise UserError("best_metric is gold but there is no gold judge; give one, or choose another figure")
        return None if rows is None else self._prompts(rows, "eval_dataset")

    def _check_rewards(self) -> None:
        """Refuse rewards that cannot be called with the columns that there are; not where `step` is given scores."""
        check_takes(self.rewards, self.prompts.columns)
        if self.evaluator is not None:
            columns = self.evaluator.prompts.columns
            check_takes(self.rewards, columns)
            if self.evaluator.gold is not None:
                check_takes(self.evaluator.gold, columns, "gold")

    def _pretraining_text(self, rows: Any) -> PretrainingText:
        longest = self.args.ptx_max_length if self.context is None else min(self.args.ptx_max_length, self.context - 1)
        made = PretrainingText(rows, self.processing_class, longest)
        if made.cut:
            self.recorder.say(f"{made.cut:,} of {len(made.ids):,} pretraining texts are cut after {longest} tokens")
        return made
