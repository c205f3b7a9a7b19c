"""Optimise the policy with PPO: `python -m stages.ppo --config configs/stories/ppo.yaml`."""

from functools import partial
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_critic, load_policy
from pipeline.model.lora import add_lora, lora_told, without_wrapper
from pipeline.model.shared import critic_on
from pipeline.ppo import PPOTrainer
from pipeline.ppo.advantages import ESTIMATORS, check_estimator
from pipeline.ppo.config import check_config
from pipeline.rewards import RewardFunction, load_function, load_rewards, models_of, readers_of, reward_names
from pipeline.runtime import preview, signals
from pipeline.runtime.arguments import check_lora
from pipeline.runtime.console import run
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.ppo_budget import of_ppo
from pipeline.runtime.record import Stage
from pipeline.text import data
from pipeline.text.lengths import Reader, positions_of
from pipeline.text.tokenizer import is_chat, load_tokenizer, prompt_ids, stop_ids

# What a line on the screen has room for; metrics.jsonl has everything.
SHOWN = (
    "step episode objective/scores objective/kl objective/entropy response/length policy/approxkl_avg "
    "val/explained_variance episodes_per_s eval/proxy eval/gold eval/win_rate eval/kl eval/length seconds_left"
)


def main(args: PPOArguments) -> None:
    """Policy and reference start from the SFT model, the critic from the reward model unless it sits on the policy's
    trunk; the reward model stays fixed."""
    if bool(args.ptx_coef) != bool(args.ptx_dataset):
        raise UserError("ptx_coef and ptx_dataset go together; set both or neither")
    models = {f"reward_{i}": r for i, r in enumerate(reward_names(args.reward)) if ":" not in r}
    inputs = {
        "model": args.model_name_or_path,
        **models,
        "critic": args.critic_name_or_path if has_critic_network(args) else None,
    }
    stage = Stage(args, "ppo", inputs | {"dataset": args.dataset, "ptx_dataset": args.ptx_dataset})
    stage.shown = tuple(SHOWN.split())
    check_lora("ppo", args)
    if args.share_base and not args.use_peft:
        raise UserError("ppo: share_base is for LoRA, which freezes what is shared; set use_peft too")
    check_config(args, stage.accelerator.num_processes)  # before the models are opened
    check_estimator(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    policy, critic = load_models(args, tokenizer)
    rewards = load_rewards(
        args.reward,
        args.reward_weights,
        mixed_precision=args.mixed_precision,
        ensemble=args.reward_ensemble,
        uwo_coef=args.uwo_coef,
        base=policy if args.share_base else None,
    )
    actor, critic = with_lora(args, stage, policy, critic)
    prompts = load_prompts(args, stage, tokenizer, {"policy": actor, "critic": critic}, rewards)
    if args.show:
        return
    trainer = PPOTrainer(
        actor,
        rewards,
        args,
        prompts["training"],
        tokenizer,
        critic=critic,  # and no reference: the policy as it is now
        gold=load_function(args.gold) if args.gold else None,
        eval_dataset=prompts["held-out"],
        ptx_dataset=pretraining_text(args),
        recorder=stage,
    )
    if args.dry_run:
        return of_ppo(stage, trainer, [reward.model for reward in models_of(rewards)])
    with signals.deferred():  # the trainer looks at them between updates
        metrics = trainer.train()
    stage.write_model(trainer.save_model)
    stage.finish(metrics, tokens=trainer.state.tokens)


def load_prompts(
    args: PPOArguments,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, nn.Module | None],
    rewards: RewardFunction,
) -> dict[str, Dataset]:
    """Training and held-out prompts that leave every model room for an answer."""
    encode = partial(prompt_ids, tokenizer)
    readers = [
        Reader(f"the {name}", positions_of(without_wrapper(model)), encode)
        for name, model in models.items()
        if model is not None
    ]
    asked: dict[str, Any] = {"seed": args.seed, "suffix": args.prompt_suffix}
    splits = {
        "training": data.load_prompts(args.dataset, split="ppo", size=args.dataset_size, **asked),
        "held-out": data.load_prompts(args.dataset, split="validation", size=args.eval_size, **asked),
    }
    readers += readers_of(rewards, load_function(args.gold) if args.gold else None)
    ends = stop_ids(models["policy"], tokenizer, is_chat(splits["training"].rows))
    room = "response_length", args.response_length
    return preview.open_prompts(stage, splits, readers, tokenizer, ends, room, args.overlong)


def has_critic_network(args: PPOArguments) -> bool:
    """Whether a critic of its own network learns beside the policy."""
    return ESTIMATORS[args.advantage_estimator].needs_critic and not args.share_trunk


def load_models(args: PPOArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, nn.Module | None]:
    """Policy and critic, which is None where it has no network of its own, as yet without LoRA."""
    policy, critic = load_policy(args.model_name_or_path), None
    fit_embeddings(policy, tokenizer, args.model_name_or_path)
    if has_critic_network(args) and args.share_base:
        critic = critic_on(policy, args.critic_name_or_path, args.critic_head_init)
    elif has_critic_network(args):
        critic = load_critic(args.critic_name_or_path, head=args.critic_head_init)
        fit_embeddings(critic, tokenizer, args.critic_name_or_path)
    return policy, critic


def with_lora(
    args: PPOArguments, stage: Stage, policy: nn.Module, critic: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """Policy and critic as they are trained; says how much of them that is."""
    if not args.use_peft:
        return policy, critic
    policy = add_lora(policy, args.lora_r, args.lora_alpha, args.lora_target_modules)
    critic = critic and add_lora(critic, args.lora_r, args.lora_alpha)
    for name, model in (("policy", policy), ("critic", critic)):
        if model is not None:
            stage.say(f"{name}: {lora_told(model)}")
    if args.share_base:
        stage.say(f"all models are {args.model_name_or_path}, once in memory, with adapters")
    return policy, critic


def pretraining_text(args: PPOArguments) -> list[str] | None:
    """Documents for the mix of `ptx_coef`, or None where there is none."""
    if not args.ptx_dataset:
        return None
    return data.load_texts(args.ptx_dataset, split="train", seed=args.seed, max_bytes=args.ptx_max_bytes)


if __name__ == "__main__":
    run(main, PPOArguments)
