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
from safetensors.torch import load_model, save_model

from pipeline.checkpoint import save_checkpoint
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.ppo.trainer import PPOTrainer

COUNTERS = ("updates_done", "tokens", "seconds", "metrics")
# What must not change between the parts of one run, or its result would be of neither.
FIXED = ("seed", "total_episodes", "batch_size", "num_mini_batches", "num_ppo_epochs", "per_device_train_batch_size",
         "response_length", "temperature")  # fmt: skip


def save_state(trainer: "PPOTrainer") -> None:
    """Write `checkpoints/step-<updates>`; complete or absent, by one process."""
    random_states = gather_object([_random_state()])

    def write(folder: Path) -> None:
        save_model(trainer.policy, str(folder / "policy.safetensors"))
        save_model(trainer.critic, str(folder / "critic.safetensors"))
        state = {
            "policy_optimizer": trainer.policy_optimizer.state_dict(),
            "critic_optimizer": trainer.critic_optimizer.state_dict(),
            "counters": {name: getattr(trainer, name) for name in COUNTERS},
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
    load_model(trainer.policy, str(folder / "policy.safetensors"))
    load_model(trainer.critic, str(folder / "critic.safetensors"))
    trainer.policy_optimizer.load_state_dict(state["policy_optimizer"])
    trainer.critic_optimizer.load_state_dict(state["critic_optimizer"])
    for name, value in state["counters"].items():
        setattr(trainer, name, value)
    _set_random_state(state["random"][trainer.rank])


def _identity(trainer: "PPOTrainer") -> dict[str, Any]:
    fixed = {name: getattr(trainer.args, name) for name in FIXED}
    return {**fixed, "processes": trainer.world, "prompts": len(trainer.prompts)}


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
