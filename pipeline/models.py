"""Open a model folder as policy, reward model or critic.

A Qwen3 folder opens as our own GPT (pipeline/gpt.py), which is faster where it counts; any other architecture of
transformers opens as its stock class. All come in fp32 and in eval mode: autocast chooses the precision of products.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.errors import UserError
from pipeline.gpt import GPTForCausalLM, GPTForSequenceClassification
from pipeline.sources import is_local


def load_policy(path: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A causal language model from a folder or the hub."""
    return _load(path, GPTForCausalLM, AutoModelForCausalLM, device)


def load_reward(path: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A sequence classifier with one output: the score of a whole conversation."""
    return _load(path, GPTForSequenceClassification, AutoModelForSequenceClassification, device, num_labels=1)


def load_critic(path: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A value model: the trunk of `path` (a policy or a reward model), a new head N(0, 1/(d+1)) (arXiv 2403.17031)."""
    critic = load_reward(path, device)
    head = critic.score
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    # The reward model's standardisation is of its own head, which is gone.
    for name in ("reward_mean", "reward_std"):
        if hasattr(critic.config, name):
            delattr(critic.config, name)
    return critic


def parameter_count(model: nn.Module) -> int:
    """Parameters, a tied matrix counted once."""
    return sum(p.numel() for p in model.parameters())


def _load(path: str, ours: type, stock: type, device: torch.device | str | None, **kwargs: object) -> PreTrainedModel:
    if is_local(path) and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is no model folder (it has no config.json)")
    try:
        config = AutoConfig.from_pretrained(path)
        kind = ours if config.model_type == "qwen3" else stock
        model = kind.from_pretrained(path, dtype=torch.float32, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be opened from {path}: {' '.join(str(error).split())[:300]}") from None
    return model.to(device).eval() if device is not None else model.eval()
