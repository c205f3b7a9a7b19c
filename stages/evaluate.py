"""Judge the policies on held-out prompts: `python -m stages.evaluate --config configs/stories/evaluate.yaml`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from pipeline import judging
from pipeline.checkpoint import write_json, write_jsonl
from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.rewards import RewardModel, checked, is_function_name, load_function, readers_of
from pipeline.runtime import preview
from pipeline.runtime.arguments import EvaluateArguments
from pipeline.runtime.console import run
from pipeline.runtime.parts import Parts
from pipeline.runtime.record import Stage
from pipeline.runtime.sampling_budget import of_sampling
from pipeline.text import data
from pipeline.text.data import Loaded
from pipeline.text.tokenizer import load_tokenizer
from reward_data.formats import answer_to


def main(args: EvaluateArguments) -> None:
    """Write scores.json (figures by policy, win rate) and samples.jsonl (every answer with its scores)."""
    names = {"pretrain": args.pretrain_model, "sft": args.sft_model, "ppo": args.ppo_model}
    judges = load_judges(args.judges)
    written = is_function_name(args.reward_model)  # a rule, in place of a reward model
    others = {"fluency": args.fluency_model, "reward": None if written else args.reward_model, "dataset": args.dataset}
    stage = Stage(args, "evaluate", {**names, **others})
    if not stage.is_main:  # a minute's work: one process does it
        return
    policies = load_policies(names, stage.device, args.pretrain_chat)
    asked: dict[str, Any] = {"seed": args.seed, "size": args.num_prompts, "suffix": args.prompt_suffix}
    loaded = {"test": data.load_prompts(args.dataset, split="test", **asked)}
    if written:
        reward: Any = load_function(args.reward_model)
    else:
        reward = RewardModel(args.reward_model, stage.device, args.mixed_precision, args.eval_batch_size)
    columns = fitting_columns(
        args, stage, policies, loaded, [reward, *judges.values(), args.gold and load_function(args.gold)]
    )
    if args.show:
        return
    prompts = columns.pop("prompt")
    gold = partial(_judged, load_function(args.gold), f"gold {args.gold}", columns) if args.gold else None
    proxy = partial(_judged, reward, f"proxy {args.reward_model}", columns)
    more = {name: partial(_judged, judge, f"judge {name}", columns) for name, judge in judges.items()}

    if args.dry_run:
        return say_budget(args, stage, policies, prompts, reward)
    with stage.progress((3 + args.best_of) * len(prompts), "evaluate") as advance:
        verdicts = judge_policies(args, stage, policies, prompts, proxy=proxy, gold=gold, more=more, advance=advance)
    scores: dict[str, Any] = {"policies": {name: verdict.figures for name, verdict in verdicts.items()}, "win_rate": {}}
    ours, theirs = verdicts["ppo"], verdicts["sft"]
    if ours.gold and theirs.gold:
        scores["win_rate"]["ppo_vs_sft"] = judging.win_rate(ours.gold, theirs.gold, seed=args.seed)
    differences = {name: judging.paired_difference(ours.judges[name], theirs.judges[name]) for name in judges}
    scores |= {"judges": {name: {"ppo_vs_sft": found} for name, found in differences.items()}} if judges else {}
    for name, verdict in verdicts.items():
        stage.log({f"{name}/{key}": value for key, value in verdict.figures.items()})
    write_json(stage.output_dir / "scores.json", scores | {"gold": args.gold, "num_prompts": len(prompts)})
    samples = judging.samples_of(verdicts)
    write_jsonl(stage.output_dir / "samples.jsonl", samples)
    stage.table("answers", samples)
    stage.finish(scores)


def fitting_columns(
    args: EvaluateArguments,
    stage: Stage,
    policies: dict[str, judging.Policy],
    loaded: dict[str, Loaded],
    judges: list[Any],
) -> dict[str, list]:
    """The columns of the prompts that leave every policy and judge room for an answer."""
    readers = [policies[name].reader(f"the policy of {name}") for name in ("sft", "pretrain", "ppo")]
    sft, room = policies["sft"], ("max_new_tokens", args.max_new_tokens)
    readers += readers_of(*judges)
    return preview.open_prompts(stage, loaded, readers, sft.tokenizer, sft.stops, room, args.overlong)["test"].to_dict()


def say_budget(
    args: EvaluateArguments, stage: Stage, policies: dict[str, judging.Policy], prompts: list[Any], reward: RewardModel
) -> None:
    """Print what sampling the answers and scoring them by the reward model take, timed with SFT's."""
    sft = policies["sft"]

    def asked(count: int) -> int:
        chosen = [prompts[number % len(prompts)] for number in range(count)]
        answers = sampled(args, stage, sft, chosen, count)
        reward(answers.prompts, answers.texts)
        return sum(map(len, answers.response_ids))

    others = [policy.model for name, policy in policies.items() if name != "sft"]
    count = (len(policies) + args.best_of) * len(prompts)
    of_sampling(stage, [sft.model, *others, reward.model], sft.encode(prompts), count, asked)


def sampled(
    args: EvaluateArguments,
    stage: Stage,
    policy: judging.Policy,
    prompts: list[Any],
    batch_size: int,
    number: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> judging.Answers:
    """One answer of `policy` to each prompt, drawn with the random numbers of `number`."""
    with stage.dtype_autocast():
        return judging.answer(
            policy,
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=batch_size,
            # A generator of its own: the answers of one policy do not depend on what the others said
            generator=torch.Generator(stage.device).manual_seed(1000 * args.seed + number),
            advance=advance,
        )


def load_judges(names: list[str]) -> dict[str, Any]:
    """The functions of `judges`, by the name after the colon. Raises UserError for two of one name."""
    short = [name.rpartition(":")[2] for name in names]
    for name in short:
        if short.count(name) > 1:
            raise UserError(f"judges: two are called {name}, and their figures could not be told apart; rename one")
    return {name: load_function(module) for name, module in zip(short, names, strict=True)}


def load_policies(names: dict[str, str], device: torch.device | None, pretrain_chat: bool) -> dict[str, judging.Policy]:
    """Open the models. Raises UserError if they do not share a vocabulary: then no KL is defined."""
    policies: dict[str, judging.Policy] = {}
    for name, path in names.items():
        model, tokenizer = load_policy(path, device), load_tokenizer(path)
        fit_embeddings(model, tokenizer, path)
        policies[name] = judging.Policy(model, tokenizer, plain=name == "pretrain" and not pretrain_chat)
        if tokenizer.get_vocab() != policies["pretrain"].tokenizer.get_vocab():
            raise UserError(
                f"{path} has another vocabulary than {names['pretrain']}; all policies must come from one model"
            )
    return policies


def judge_policies(
    args: EvaluateArguments,
    stage: Stage,
    policies: dict[str, judging.Policy],
    prompts: list[Any],
    *,
    proxy: judging.Judge,
    gold: judging.Judge | None,
    more: Mapping[str, judging.Judge],
    advance: Callable[[int], None],
) -> dict[str, judging.Verdict]:
    """Verdicts of pretrain, sft, best_of_<n> and ppo, in this order; `advance` is told how many answers are done."""
    sft, n = policies["sft"], args.best_of
    fluency = fluency_of(args, stage, policies["pretrain"])

    def judge(number: int, name: str, asked: list[Any]) -> dict[str, Any]:
        policy = policies.get(name, sft)
        answers = sampled(args, stage, policy, asked, args.batch_size, number, advance)
        scores = proxy(answers.prompts, answers.texts)
        if name in policies:
            kl = 0.0 if policy is sft else judging.sequence_kl(policy, sft, answers, args.temperature)
        else:
            best, kl = judging.best_of(scores, n), judging.best_of_n_kl(n)
            answers, scores = answers.take(best), [scores[i] for i in best]
        common: dict[str, Any] = {"gold": gold, "judges": more, "fluency": fluency, "seed": args.seed}
        return asdict(judging.verdict_of(answers, proxy=scores, kl=kl, **common))

    parts, verdicts = Parts(stage, (3 + n) * len(prompts), "answers"), {}
    for number, name in enumerate(("pretrain", "sft", f"best_of_{n}", "ppo")):
        asked = [prompt for prompt in prompts for _ in range(1 if name in policies else n)]
        if parts.is_kept:
            advance(len(asked))
        part = parts.get(partial(judge, number, name, asked), len(asked))
        verdicts[name] = judging.Verdict(**part | {"answers": judging.Answers(**part["answers"])})
    return verdicts


def fluency_of(
    args: EvaluateArguments, stage: Stage, pretrained: judging.Policy
) -> Callable[[list[str]], float | None]:
    """What gives the bits per byte of texts: under fluency_model, or where none is named under the pretrained model."""
    model, tokenizer = pretrained.model, pretrained.tokenizer
    if args.fluency_model not in (None, args.pretrain_model):
        model, tokenizer = load_policy(args.fluency_model, stage.device), load_tokenizer(args.fluency_model)
        fit_embeddings(model, tokenizer, args.fluency_model)
    return partial(judging.text_bits_per_byte, model, tokenizer)


def _judged(function: Any, name: str, columns: dict[str, list], prompts: list, texts: list[str]) -> list[float]:
    """Scores by a reward function, which is also given the data set's other columns, repeated as the prompts are."""
    times = len(prompts) // max(1, len(next(iter(columns.values()), prompts)))
    repeated = {key: [value for value in values for _ in range(times)] for key, values in columns.items()}
    answers = [answer_to(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return checked(name, function, prompts, answers, repeated)


if __name__ == "__main__":
    run(main, EvaluateArguments)
