"""What a PPO trainer builds and checks before it starts."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from pipeline.errors import UserError
from pipeline.model.hardware import use_bf16
from pipeline.model.lora import is_lora, without_wrapper
from pipeline.ppo.config import PPOConfig
from pipeline.rewards import RewardFunction, WeightedRewards, name_of
from pipeline.text.tokenizer import check_fits, stop_ids


def build_accelerator(args: PPOConfig) -> Accelerator:
    """An Accelerator for use without a stage; a process keeps the precision of its first one, which auto follows."""
    precision = "bf16" if use_bf16(args.mixed_precision) else "no"
    there = AcceleratorState._shared_state.get("_mixed_precision", precision)
    if there != precision:
        if args.mixed_precision != "auto":
            raise UserError(
                f"mixed_precision: a Trainer or Accelerator before it has set this process to {there!r}, which cannot "
                f"be {precision!r} too; set both alike, or run PPO in a process of its own"
            )
        precision = there
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)


def build_optimizer(args: PPOConfig, *models: tuple[nn.Module, float]) -> torch.optim.AdamW:
    """AdamW of models, each with its peak learning rate, kept as `rate`; weight decay leaves out norms and biases."""
    groups = []
    for model, rate in models:
        parameters = [p for p in model.parameters() if p.requires_grad]
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


def combine_rewards(rewards: RewardFunction | Sequence[RewardFunction]) -> RewardFunction:
    """One reward, or several added up, with every value checked."""
    if isinstance(rewards, WeightedRewards):
        return rewards
    functions = [rewards] if callable(rewards) else list(rewards)
    if not functions:
        raise UserError("no reward is given; pass at least one function or reward model")
    return WeightedRewards([(name_of(f), f, 1.0) for f in functions])


def check_models(
    args: PPOConfig, policy: nn.Module, reference: nn.Module | None, critic: nn.Module | None, tokenizer: Any
) -> int | None:
    """Raise UserError where models and tokenizer do not fit together; returns the tokens that all models can read."""
    models = {"policy": policy, "reference": reference, "critic": critic}
    models = {name: without_wrapper(model) for name, model in models.items() if model is not None}
    for name, model in models.items():
        check_fits(tokenizer, model.get_input_embeddings().num_embeddings, f"the {name}")
    if reference is not None and reference is not policy:
        own = {id(p) for p in policy.parameters()}
        if any(id(p) in own for p in reference.parameters()):
            raise UserError(
                "the reference shares weights with the policy, which will be trained; pass None for a copy of the "
                "policy as it is now, or with LoRA for the policy with its adapter switched off"
            )
    if args.ref_sync_updates:
        if is_lora(policy):
            raise UserError(
                "ref_sync_updates: a policy with LoRA cannot hand its weights to a reference; set it to 0, or merge "
                "the adapter first"
            )
        if [p.shape for p in models.get("reference", policy).parameters()] != [p.shape for p in policy.parameters()]:
            raise UserError("ref_sync_updates: the reference has other shapes than the policy; set it to 0")
    contexts = [getattr(model.config, "max_position_embeddings", None) for model in models.values()]
    return min((context for context in contexts if context is not None), default=None)


def end_tokens_of(policy: nn.Module, tokenizer: Any) -> tuple[list[int], str | None]:
    """Ids that end an answer, those that the policy can say first; a warning if it can say none of them."""
    size = without_wrapper(policy).get_input_embeddings().num_embeddings
    ends = stop_ids(policy, tokenizer)
    known = [token for token in ends if 0 <= token < size]
    if known:
        return known, None
    return ends, (
        f"the policy's end token {ends[0]} lies beyond its {size} embeddings, so no answer can end; set "
        "generation_config.eos_token_id"
    )


def check_config(args: PPOConfig, world: int, tokenizer: Any) -> None:
    """Raise UserError for values that make no sense, alone or together."""
    if tokenizer is None:
        raise UserError("processing_class is missing; pass the policy's tokenizer")
    for name, kind in get_type_hints(PPOConfig).items():
        if get_origin(kind) is Literal and getattr(args, name) not in get_args(kind):
            raise UserError(f"{name}: {getattr(args, name)!r} is none of {', '.join(map(repr, get_args(kind)))}")
    counts = (
        "total_episodes",
        "batch_size",
        "num_mini_batches",
        "num_ppo_epochs",
        "per_device_train_batch_size",
        "response_length",
        "logging_steps",
        "num_generations",
        "adaptive_kl_horizon",
        "ptx_batch_size",
        "ptx_max_length",
    )
    for name in counts:
        if getattr(args, name) < 1:
            raise UserError(f"{name}: {getattr(args, name)} is too small; give a positive whole number")
    positive = ("temperature", "learning_rate", "cliprange", "max_grad_norm")
    for name in positive:
        if not getattr(args, name) > 0:
            raise UserError(f"{name}: {getattr(args, name)} must be above 0")
    for name in (
        "kl_coef",
        "missing_eos_penalty",
        "critic_warmup_updates",
        "warmup_steps",
        "weight_decay",
        "eval_steps",
        "save_steps",
        "ref_sync_updates",
        "entropy_coef",
        "ptx_coef",
        "vf_coef",
    ):
        if not getattr(args, name) >= 0:
            raise UserError(f"{name}: {getattr(args, name)} must not be negative")
    for name in ("num_mini_batches", "num_generations"):
        if args.batch_size % (world * getattr(args, name)):
            raise UserError(
                f"batch_size {args.batch_size} must be a multiple of {name} × processes = "
                f"{getattr(args, name)} × {world}; change one of them"
            )
    if args.adaptive_kl_target is not None and args.adaptive_kl_horizon < args.batch_size:
        raise UserError(
            f"adaptive_kl_horizon: {args.adaptive_kl_horizon} episodes are less than the {args.batch_size} of an "
            "update, after which β could jump below 0; give it thousands"
        )
    for name, low in (
        ("critic_learning_rate", 0),
        ("dual_clip", 1),
        ("adaptive_kl_target", 0),
        ("target_kl", 0),
        ("cliprange_high", 0),
        ("cliprange_value", 0),
        ("score_clip", 0),
        ("sampler_weight_cap", 0),
    ):
        if getattr(args, name) is not None and not getattr(args, name) > low:
            raise UserError(f"{name}: {getattr(args, name)} must be above {low}, or none")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise UserError(f"ema_decay: {args.ema_decay} must lie between 0 and 1, or be none")
    if args.adaptive_kl_target is not None and args.kl_coef == 0:
        raise UserError("adaptive_kl_target: a kl_coef of 0 stays 0; give kl_coef a start above 0")
    if args.ptx_coef and args.ptx_batch_size % world:
        raise UserError(f"ptx_batch_size {args.ptx_batch_size} must be a multiple of the {world} processes")
    if args.critic_warmup_updates * args.batch_size >= args.total_episodes:
        raise UserError(
            f"critic_warmup_updates {args.critic_warmup_updates} leaves no update of {args.batch_size} episodes to the "
            f"policy out of {args.total_episodes}; lower it or raise total_episodes"
        )
    for name in ("gamma", "lam", "lam_value"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"{name}: {getattr(args, name)} must lie between 0 and 1")
