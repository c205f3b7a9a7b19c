"""The state of a PPO run, and its checkpoints: the networks, the optimizers and a RunState.

The order of prompts, the mini-batches and the sampled tokens are drawn from generators seeded by (seed, update,
process), so the number of updates done says where the data stands and no generator has to be kept for them. Python's,
NumPy's and torch's global generators are kept all the same, for rewards that draw from them.
"""

import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from pipeline.checkpoint import save_checkpoint
from pipeline.errors import UserError
from pipeline.identity import differences, may_change
from pipeline.model.lora import is_lora, trained_weights
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.learner import Learner


@dataclass
class RunState:
    """All that changes while a run goes on, but for the weights and the optimizers."""

    kl_coef: float
    """β, which adaptive_kl_target moves."""
    updates_done: int = 0
    updating: bool = False
    """An update has begun to change weights and is not counted yet."""
    evaluated: int | None = None
    """Updates done at the last held-out evaluation."""
    tokens: int = 0
    """Tokens of all answers so far."""
    seconds: float = 0.0
    """Seconds of all updates so far."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last update."""
    best: dict[str, Any] | None = None
    """Figure and step of the best held-out evaluation."""
    baseline: list[float] | None = None
    """Held-out scores of the first reference's answers, which the win rate compares with."""
    watched: dict[str, Any] = field(default_factory=dict)
    """What watch.py has seen and said."""
    score_moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Count, mean and Σ(x − mean)² of all scores so far, for normalize_scores."""


def networks_of(learner: Learner) -> dict[str, nn.Module]:
    """What a checkpoint keeps of the networks: those that change."""
    models = learner.models
    networks = {"policy": models.policy, "critic": models.critic}
    if learner.args.ref_sync_updates:
        networks["reference"] = models.reference
    return {name: model for name, model in networks.items() if model is not None}


def save_state(checkpoints: Path, learner: Learner, state: RunState, identity: dict[str, Any]) -> None:
    """Write `checkpoints/step-<updates>`; complete or absent, by one process."""
    random_states = gather_object([_random_state()])

    def write(folder: Path) -> None:
        for name, model in networks_of(learner).items():
            _save_weights(model, folder / f"{name}.safetensors")
        content = {
            "state": asdict(state),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()},
            "identity": identity,
            "random": random_states,
        }
        torch.save(_plain(content), folder / "state.pt")

    if learner.accelerator.is_main_process:
        save_checkpoint(checkpoints, state.updates_done, write)
    learner.accelerator.wait_for_everyone()


def load_state(folder: Path, learner: Learner, identity: dict[str, Any]) -> RunState:
    """Put a learner that has just been built back to where `save_state` left it; UserError if it is of another run."""
    content = _content_of(folder)
    try:
        state, then, optimizers = RunState(**content["state"]), content["identity"], content["optimizers"]
        random_state = content["random"][learner.rank]
    except (KeyError, TypeError, IndexError):
        sentence = f"checkpoint {folder} is of another version of this project; choose another output_dir"
        raise UserError(sentence) from None
    now = _plain(identity)
    if changed := differences({name: value for name, value in then.items() if name in now}, now):
        raise UserError(
            f"checkpoint {folder} was written with other settings: {'; '.join(changed)}. Set them back, or choose "
            "another output_dir"
        )
    try:
        for name, model in networks_of(learner).items():
            _load_weights(model, folder / f"{name}.safetensors")
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"checkpoint {folder} is of other models: {' '.join(str(error).split())[:200]}; give the models that the "
            "run began with, or choose another output_dir"
        ) from None
    try:
        for name, optimizer in learner.optimizers.items():
            optimizer.load_state_dict(optimizers[name])
            optimizer.zero_grad()
        _set_random_state(random_state)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        sentence = f"checkpoint {folder} has a state that cannot be taken up ({' '.join(str(error).split())[:200]})"
        raise UserError(
            f"{sentence}; move it away to go on from the one before, or choose another output_dir"
        ) from None
    return state


def _content_of(folder: Path) -> dict[str, Any]:
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception:  # as many kinds as there are kinds of rubbish; what torch says advises to open it unsafely
        raise UserError(
            f"checkpoint {folder} cannot be read (state.pt); move it away to go on from the one before"
        ) from None


def identity_of(learner: Learner, prompts: int, held_out: int) -> dict[str, Any]:
    """What must be equal in all parts of a run: settings, LoRA's shape, processes, numbers of prompts."""
    fixed = {f.name: getattr(learner.args, f.name) for f in fields(PPOConfig) if not may_change(f.name, "ppo")}
    models = {"lora": learner.models.policy, "critic's lora": learner.models.critic}
    lora = {name: None if model is None else _lora_of(model) for name, model in models.items()}
    return {**fixed, **lora, "processes": learner.world, "prompts": prompts, "held-out prompts": held_out}


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
    adapted: Any = model
    config = adapted.peft_config[adapted.active_adapter]
    return [config.r, config.lora_alpha, sorted(config.target_modules)]


def _random_state() -> dict[str, Any]:
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
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
