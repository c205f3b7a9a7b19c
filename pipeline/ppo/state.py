"""The whole state of a PPO run in a checkpoint folder: two models, two optimizers, counters, random numbers.

The order of prompts, the mini-batches and the sampled tokens are drawn from generators seeded by (seed, update,
process), so the number of updates done says where the data stands and no generator has to be kept for them. Python's,
NumPy's and torch's global generators are kept all the same, for rewards that draw from them.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from pipeline.checkpoint import save_checkpoint
from pipeline.errors import UserError
from pipeline.models import is_lora, trained_weights

if TYPE_CHECKING:
    from pipeline.ppo.trainer import PPOTrainer

COUNTERS = ("updates_done", "tokens", "seconds", "metrics", "kl_coef", "best", "baseline", "watched", "score_moments")
# What must not change between the parts of one run, or its result would be of neither.
FIXED = ("seed", "total_episodes", "batch_size", "num_mini_batches", "num_ppo_epochs", "per_device_train_batch_size",
         "num_generations", "response_length", "temperature", "ref_sync_updates",
         "ema_decay", "adaptive_kl_target", "share_trunk")  # fmt: skip


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
        torch.save(state, folder / "state.pt")

    if trainer.is_main:
        save_checkpoint(trainer.checkpoints, trainer.updates_done, write)
    trainer.accelerator.wait_for_everyone()


def load_state(trainer: "PPOTrainer", folder: Path) -> None:
    """Put a trainer that has just been built back to where `save_state` left it; UserError if it is of another run."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    now = _identity(trainer)
    for name, then in state["identity"].items():
        if now[name] != then:
            raise UserError(
                f"checkpoint {folder} was written with {name} {then}, now it is {now[name]}; "
                "set it back, or remove the checkpoints to start anew"
            )
    _load_weights(trainer.policy, folder / "policy.safetensors")
    _load_weights(trainer.critic, folder / "critic.safetensors")
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


def _identity(trainer: "PPOTrainer") -> dict[str, Any]:
    fixed = {name: getattr(trainer.args, name) for name in FIXED}
    lora = {"lora": _lora_of(trainer.policy), "critic's lora": _lora_of(trainer.critic)}
    return {**fixed, **lora, "processes": trainer.world, "prompts": len(trainer.prompts)}


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
