"""Low-rank updates beside a frozen model (LoRA, arXiv 2106.09685), and what a saved folder is then made of."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError

ALL_LINEAR = "all-linear"  # peft's word for every matrix but the output layer


def add_lora(
    model: PreTrainedModel, r: int = 16, alpha: int = 32, target_modules: Sequence[str] | str | None = None
) -> nn.Module:
    """Freeze a model and add trained low-rank updates W + (alpha/r)·BA beside its matrices (LoRA, arXiv 2106.09685).

    B starts at 0, so nothing changes at first. `target_modules` are the last parts of module names; None or
    "all-linear": every matrix of the blocks; any other text is a regular expression, as peft takes it. The head `score`
    of a classifier is trained whole. Raises UserError if no module has such a name.
    """
    from peft import LoraConfig, get_peft_model

    if target_modules is None or list(target_modules) == [ALL_LINEAR]:
        target_modules = ALL_LINEAR
    elif not isinstance(target_modules, str) and ALL_LINEAR in target_modules:
        raise UserError(f"lora_target_modules: {ALL_LINEAR} stands for every matrix of the blocks; give it alone")
    names = [] if isinstance(target_modules, str) else list(target_modules)
    if lost := [n for n in names if not any(f".{m}".endswith(f".{n}") for m, _ in model.named_modules())]:
        raise UserError(
            f"lora_target_modules: the model has no module {', '.join(lost)}; see its names with print(model)"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=0.0,  # PPO has dropout off everywhere
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config).eval()
    except ValueError as error:
        raise UserError(f"LoRA: {' '.join(str(error).split())[:300]}") from None


def is_lora(model: nn.Module) -> bool:
    """Whether peft is wrapped around a model."""
    return hasattr(model, "get_base_model")


def without_wrapper(model: nn.Module) -> PreTrainedModel:
    """The model of transformers in a peft wrapper: its own modules, the adapter's among them."""
    wrapped: Any = model
    return wrapped.get_base_model() if is_lora(model) else wrapped


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that an optimizer changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_whole(model: nn.Module, folder: str | Path) -> None:
    """Write a stock model folder that opens without peft.

    With LoRA the adapter is merged into the weights of a copy, and also kept by itself in the subfolder `adapter`.
    """
    whole: Any = model
    if is_lora(model):
        whole.save_pretrained(Path(folder) / "adapter", save_embedding_layers=False)
        whole = copy.deepcopy(whole).merge_and_unload()
    whole.save_pretrained(folder)
