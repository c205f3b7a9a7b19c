"""Held-out evaluation while PPO runs, and the best policy so far."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import nn

from pipeline.checkpoint import write_json
from pipeline.judging import distinct_n, win_rate
from pipeline.ppo import algorithm as A
from pipeline.ppo.rollout import Rollout, decode_completions, seeded
from pipeline.rewards import checked, standard_deviation
from reward_data.formats import text_of

if TYPE_CHECKING:
    from pipeline.ppo.trainer import PPOTrainer

EVALUATION = 4  # first number of the seed; the others' stand in trainer.py


@dataclass
class Judged:
    """One held-out answer."""

    proxy: float
    gold: float | None
    length: int
    ended: bool
    text: str
    kl: float = 0.0  # log π − log π_ref of the whole answer, in nats


def evaluate(trainer: "PPOTrainer") -> dict[str, float]:
    """Answer every held-out prompt with the same random numbers each time; figures over all processes.

    The win rate is against the answers of the reference that the run began with (SFT), by gold where there is one and
    by proxy otherwise, a tie counting half, with a bootstrap interval of 95 % over prompts.
    """
    args, judged = trainer.args, answer_held_out(trainer, trainer.policy, with_kl=True)
    if trainer.baseline is None:
        reference = answer_held_out(trainer, trainer.reference_forward.model, with_kl=False)
        trainer.baseline = [_verdict(row) for row in reference]
    count, texts = len(judged), [row.text for row in judged]
    mean = {name: sum(getattr(row, name) for row in judged) / count for name in ("proxy", "kl", "length")}
    without_eos = sum(not row.ended for row in judged) / count
    # What the penalties are measured in: with normalize_scores, standard deviations of the scores so far
    unit = standard_deviation(trainer.score_moments) if args.normalize_scores else 1.0
    wins = win_rate([_verdict(row) for row in judged], trainer.baseline)
    metrics = {f"eval/{name}": value for name, value in mean.items()}
    metrics |= {
        "eval/rlhf_reward": mean["proxy"] - unit * (args.missing_eos_penalty * without_eos + args.kl_coef * mean["kl"]),
        "eval/win_rate": wins["mean"],
        "eval/win_rate_low": wins["ci95"][0],
        "eval/win_rate_high": wins["ci95"][1],
        "eval/without_eos": without_eos,
        "eval/distinct_2": distinct_n(texts, 2),
        "eval/repetition": repetition(texts),
    }
    if trainer.gold:
        gold = torch.tensor([row.gold for row in judged], dtype=torch.double)
        metrics["eval/gold"] = gold.mean().item()
        metrics["eval/gold_se"] = (gold.std().item() if count > 1 else 0.0) / count**0.5
    return metrics


def repetition(texts: list[str]) -> float:
    """Share of an answer's word bigrams that it has said before, mean over the answers that have a bigram."""
    found = [1 - distinct_n([text], 2) for text in texts if len(text.split()) > 1]
    return sum(found) / len(found) if found else 0.0


def answer_held_out(trainer: "PPOTrainer", model: nn.Module, with_kl: bool) -> list[Judged]:
    """The answers of `model` to all held-out prompts, judged; those of all processes, on every process."""
    args, device, prompts = trainer.args, trainer.device, trainer.eval_prompts
    found: list[Judged] = []
    own = range(trainer.rank, len(prompts), trainer.world)
    for start in range(0, len(own), args.batch_size):
        batch = prompts.take(own[start : start + args.batch_size])
        samples = trainer.generate(batch, seeded(args.seed, EVALUATION, start, trainer.rank), model)
        answers = decode_completions(samples, batch.prompts, trainer.tokenizer)
        proxy = trainer.rewards(batch.prompts, answers, **batch.columns)
        gold = [None] * len(answers)
        if trainer.gold:
            gold = checked("gold", trainer.gold, batch.prompts, answers, batch.columns)
        rows = zip(proxy, gold, samples.response_lengths.tolist(), samples.ended.tolist(), answers, strict=True)
        judged = [Judged(p, g, length, ended, text_of(answer)) for p, g, length, ended, answer in rows]
        if with_kl:
            rollout = Rollout(
                samples.sequences,
                samples.prompt_lengths,
                samples.response_lengths,
                samples.ended,
                None,
                torch.tensor(proxy, device=device),
            )
            for row, kl in zip(judged, _kl_of(trainer, rollout), strict=True):
                row.kl = kl
        found += judged
    if trainer.world == 1:
        return found
    return [Judged(**row) for row in gather_object([asdict(row) for row in found])]


def _kl_of(trainer: "PPOTrainer", rollout: Rollout) -> list[float]:
    everything = torch.arange(len(rollout.scores), device=trainer.device)
    plan = [list(everything.split(trainer.args.per_device_train_batch_size))]
    with trainer.accelerator.autocast():
        (logprobs,) = rollout.per_token(lambda *inputs: trainer.policy_forward(*inputs)[0], plan)
        with trainer.reference_forward.without_adapter():
            (ref_logprobs,) = rollout.per_token(lambda *inputs: trainer.reference_forward(*inputs)[0], plan)
    return A.kl_k1(logprobs, ref_logprobs).double().sum(1).tolist()


def _verdict(row: Judged) -> float:
    return row.proxy if row.gold is None else row.gold


def keep_best(trainer: "PPOTrainer", metrics: dict[str, float]) -> None:
    """Write the policy to `<output_dir>/best` if it has the highest `best_metric` of the run so far."""
    name = trainer.args.best_metric
    if name == "none":
        return
    value = metrics[f"eval/{name}"]
    if trainer.best is not None and value <= trainer.best["value"]:
        return
    trainer.best = {"metric": f"eval/{name}", "value": value, "step": trainer.updates_done}
    folder = Path(trainer.args.output_dir) / "best"
    beside = folder.with_name("best.partial")
    trainer.save_model(beside)
    if trainer.is_main:
        write_json(beside / "best.json", trainer.best | {"metrics": metrics})
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    trainer.accelerator.wait_for_everyone()
