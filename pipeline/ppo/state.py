"""The whole state of a PPO run in a checkpoint folder: two models, two optimizers, counters, random numbers.

The order of prompts, the mini-batches and the sampled tokens are drawn from generators seeded by (seed, update,
process), so the number of updates done says where the data stands and no generator has to be kept for them. Python's,
NumPy's and torch's global generators are kept all the same, for rewards that draw from them.
"""

import random
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from pipeline.checkpoint import latest_checkpoint, save_checkpoint
from pipeline.errors import UserError
from pipeline.model.lora import is_lora, save_whole, trained_weights
from pipeline.ppo.config import PPOConfig

if TYPE_CHECKING:
    from pipeline.ppo.trainer import PPOTrainer

COUNTERS = (
    "updates_done",
    "evaluated",
    "tokens",
    "seconds",
    "metrics",
    "kl_coef",
    "best",
    "baseline",
    "watched",
    "score_moments",
)
# What may change between the parts of one run; of anything else, its result would be of neither.
FREE = (
    "output_dir",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
)


def save_state(trainer: "PPOTrainer") -> None:
    """Write `checkpoints/step-<updates>`; complete or absent, by one process."""
    random_states = gather_object([_random_state()])

    def write(folder: Path) -> None:
        _save_weights(trainer.policy, folder / "policy.safetensors")
        _save_weights(trainer.critic, folder / "critic.safetensors")
        if trainer.args.ref_sync_updates:
            save_model(trainer.reference_forward.model, str(folder / "reference.safetensors"))
        state = {
            "policy_optimizer": trainer.policy_optimizer.state_dict(),
            "critic_optimizer": None if trainer.args.share_trunk else trainer.critic_optimizer.state_dict(),
            "counters": {name: getattr(trainer, name) for name in COUNTERS},
            "average": trainer.average.values if trainer.average else None,
            "identity": _identity(trainer),
            "random": random_states,
        }
        torch.save(_plain(state), folder / "state.pt")

    if trainer.is_main:
        save_checkpoint(trainer.checkpoints, trainer.updates_done, write)
    trainer.accelerator.wait_for_everyone()


def load_state(trainer: "PPOTrainer", folder: Path) -> None:
    """Put a trainer that has just been built back to where `save_state` left it; UserError if it is of another run."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    now = _identity(trainer)
    for name, then in state["identity"].items():
        if name in now and now[name] != then:
            raise UserError(
                f"checkpoint {folder} was written with {name} {then}, now it is {now[name]}; "
                "set it back, or remove the checkpoints to start anew"
            )
    try:
        _load_weights(trainer.policy, folder / "policy.safetensors")
        _load_weights(trainer.critic, folder / "critic.safetensors")
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"checkpoint {folder} is of other models: {' '.join(str(error).split())[:200]}; give the models that the "
            "run began with, or remove the checkpoints to start anew"
        ) from None
    trainer.policy_optimizer.load_state_dict(state["policy_optimizer"])
    if not trainer.args.share_trunk:
        trainer.critic_optimizer.load_state_dict(state["critic_optimizer"])
    if trainer.args.ref_sync_updates:
        load_model(trainer.reference_forward.model, str(folder / "reference.safetensors"))
    if trainer.average:
        trainer.average.load(state["average"])
    for name, value in state["counters"].items():
        setattr(trainer, name, value)
    _set_random_state(state["random"][trainer.rank])


def check_start(trainer: "PPOTrainer") -> None:
    """Raise UserError for a trainer that must take no update: half of one is in it, or another run's checkpoints are
    where its own would go."""
    if trainer.half_done:
        raise UserError(
            f"update {trainer.updates_done + 1} was broken off half way; build models and trainer anew: `train` goes "
            "on from the last checkpoint"
        )
    new = trainer.updates_done == 0 and not trainer.resumed
    if new and latest_checkpoint(trainer.checkpoints, lambda sentence: None):
        raise UserError(
            f"{trainer.checkpoints} has checkpoints of a run; call `resume` to go on from them, or choose another "
            "output_dir"
        )


def save_models(trainer: "PPOTrainer", folder: Path) -> None:
    """What PPOTrainer.save_model says, by one process."""
    models = {folder: trainer.policy}
    if not trainer.args.share_trunk:
        models[folder / "critic"] = trainer.critic
    if trainer.is_main:
        for place, model in models.items():
            save_whole(model, place)
            trainer.tokenizer.save_pretrained(place)
        if trainer.args.share_trunk:
            save_file(dict(trainer.critic.state_dict()), folder / "value_head.safetensors")
        if trainer.average:
            with trainer.average.inside(trainer.policy):
                save_whole(trainer.policy, folder / "ema")
            trainer.tokenizer.save_pretrained(folder / "ema")
    trainer.accelerator.wait_for_everyone()


def _identity(trainer: "PPOTrainer") -> dict[str, Any]:
    fixed = {f.name: getattr(trainer.args, f.name) for f in fields(PPOConfig) if f.name not in FREE}
    held_out = len(trainer.eval_prompts) if trainer.eval_prompts is not None else 0
    lora = {"lora": _lora_of(trainer.policy), "critic's lora": _lora_of(trainer.critic)}
    counts = {"processes": trainer.world, "prompts": len(trainer.prompts), "held-out prompts": held_out}
    return _plain({**fixed, **lora, **counts})


def _plain(value: Any) -> Any:
    """The same with Python's numbers for NumPy's, which a checkpoint that is safe to open cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _save_weights(model: nn.Module, file: Path) -> None:
    """All weights, or with LoRA those that are trained: the rest is in the folder that the model came from."""
    if is_lora(model):
        save_file({name: p.detach().contiguous() for name, p in trained_weights(model).items()}, file)
    else:
        save_model(model, str(file))


@torch.no_grad()
def _load_weights(model: nn.Module, file: Path) -> None:
    if not is_lora(model):
        load_model(model, str(file))
        return
    saved = load_file(file)
    for name, parameter in trained_weights(model).items():
        parameter.copy_(saved[name])


def _lora_of(model: nn.Module) -> list[Any] | None:
    if not is_lora(model):
        return None
    config = model.peft_config[model.active_adapter]
    return [config.r, config.lora_alpha, sorted(config.target_modules)]


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
