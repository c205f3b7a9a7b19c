"""Low-rank updates beside a frozen model (LoRA, arXiv 2106.09685), and what a saved folder is then made of."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError

ALL_LINEAR = "all-linear"  # peft's word for every matrix but the output layer
DEFAULT, START = "default", "start"  # names of the adapter that is trained, and of a frozen one that it begins on


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: int = 32,
    target_modules: Sequence[str] | str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Freeze a model and add trained low-rank updates W + (alpha/r)·BA beside its matrices (LoRA, arXiv 2106.09685).

    B starts at 0, so nothing changes at first. `target_modules` are the last parts of module names; None or
    "all-linear": every matrix of the blocks; any other text is a regular expression, as peft takes it. The head `score`
    of a classifier is trained whole. `dropout` is the share of x that is left out of BAx in training; PPO has none. A
    model that has a frozen adapter, as `shared.critic_on` gives it, keeps it: its update is added too. Raises UserError
    if no module has such a name.
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
        lora_dropout=dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    try:
        if is_lora(model):
            return _beside(model, config)
        return get_peft_model(cast(PreTrainedModel, model), config).eval()
    except ValueError as error:
        raise UserError(f"LoRA: {' '.join(str(error).split())[:300]}") from None


def _beside(model: Any, config: Any) -> nn.Module:
    """Add the adapter `default`, which is trained, to those that a model has, which stay frozen; all count."""
    from peft.tuners.lora import LoraLayer

    config.modules_to_save = ["score"]
    config.base_model_name_or_path = model.get_base_model().name_or_path
    frozen = list(model.peft_config)
    model.add_adapter(DEFAULT, config)
    model.set_adapter(DEFAULT)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([*frozen, DEFAULT])
    for name, parameter in model.named_parameters():  # set_adapter has let all of them learn
        if any(f".{adapter}." in name for adapter in frozen):
            parameter.requires_grad_(False)
    return model.eval()


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


def lora_told(model: nn.Module) -> str:
    """How many parameters are trained of how many, for the opening of a run; a tied matrix counts once."""
    whole, trained = (sum(p.numel() for p in of) for of in (model.parameters(), trained_weights(model).values()))
    return f"LoRA: {trained:,} of {whole:,} parameters are trained ({trained / whole:.2%})"


def save_whole(model: nn.Module, folder: str | Path) -> None:
    """Write a stock model folder that opens without peft.

    With LoRA the adapter is merged into the weights of a copy, and also kept by itself in the subfolder `adapter`.
    """
    whole: Any = model
    if is_lora(model):
        own = [name for name in whole.peft_config if name != START]
        whole.save_pretrained(Path(folder) / "adapter", selected_adapters=own, save_embedding_layers=False)
        whole = merged(model)
    whole.save_pretrained(folder)


def merged(model: nn.Module) -> PreTrainedModel:
    """A copy of a LoRA model with its updates added to its matrices; what no update belongs to is not copied."""
    layers: Any = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    changed = {id(p) for layer in layers for p in layer.parameters()}
    kept = {id(p): p for p in model.parameters() if id(p) not in changed}
    whole: Any = copy.deepcopy(model, kept)
    return whole.merge_and_unload()
