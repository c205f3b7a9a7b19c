"""Critic and reward model as adapters on a base model that is in memory already (`share_base` of the stage ppo).

Each is a tree of modules of its own, with its own low-rank updates and its own head, around the very tensors of the
base, which are frozen. So there is nothing to switch between two forward passes, optimizers and DistributedDataParallel
see each network's own weights alone, and the result is that of separate bases.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForSequenceClassification, GPTModel
from pipeline.model.load import draw_head
from pipeline.model.lora import START
from pipeline.text.tokenizer import ADAPTER, base_of_adapter, cannot_open

ROUNDING = 1e-6  # of a matrix's largest weight: what another machine may have merged otherwise


def critic_on(base: PreTrainedModel, path: str, head: str = "normal") -> nn.Module:
    """A value model on the weights of `base`, with a new head as `load_critic` draws it; `add_lora` is still to come.

    `path` is the folder of the base itself, or one with a LoRA adapter of it, such as a reward model's, which stays
    frozen beside what is trained. Raises UserError for any other folder.
    """
    critic = _classifier(base, path)
    if _same(path, base.name_or_path):
        # transformers draws a head that is missing before `load_critic` does: the random numbers after it are the same
        with torch.no_grad():
            critic._init_weights(critic.score)
        draw_head(critic, head)
        return critic
    adapted, _ = _adapted(critic, base, path)
    draw_head(critic, head)
    return adapted


def reward_on(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """The reward model in the folder `path`, which was trained with LoRA on `base`, on the base's weights; frozen.

    Raises UserError where the folder has no adapter, that of another model, or one without a head.
    """
    model = _classifier(base, path)
    _, head = _adapted(model, base, path)
    if head is None or head.shape != model.score.weight.shape:
        raise UserError(
            f"{path} is no trained reward model: its adapter brings no head `score` with one output; train one first"
        )
    with torch.no_grad():
        model.score.weight.copy_(head)
    return model.requires_grad_(False)


def _classifier(base: PreTrainedModel, path: str) -> Any:
    """A classifier with one output whose trunk is made of the tensors of `base`; its head holds nothing yet."""
    place, size = Path(path).expanduser(), base.config.get_text_config().vocab_size
    config: Any = copy.deepcopy(base.config)
    try:
        if (place / "config.json").is_file():
            config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise cannot_open("model", path, error) from None
    if config.model_type != base.config.model_type:
        raise _of_another(path, base, f"it is a {config.model_type}")
    config.num_labels, config.get_text_config().vocab_size = 1, size
    ours = type(base.base_model) is GPTModel
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = (
            GPTForSequenceClassification(config) if ours else AutoModelForSequenceClassification.from_config(config)
        )
    head = getattr(model, "score", None)
    if type(model.base_model) is not type(base.base_model) or not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"share_base: {type(model).__name__} is not {type(base.base_model).__name__} with a linear head `score`; "
            "set share_base to false"
        )
    tensors: dict[int, Any] = {id(p): p for p in base.base_model.parameters()}
    setattr(model, model.base_model_prefix, copy.deepcopy(base.base_model, tensors))
    model.score = nn.utils.skip_init(nn.Linear, head.in_features, 1, bias=False, device=base.device)
    model.name_or_path = path
    return model.eval()


def _adapted(model: Any, base: PreTrainedModel, path: str) -> tuple[nn.Module, Tensor | None]:
    """`model` in a peft wrapper with the adapter of the folder `path`, frozen; and the head that the adapter brings."""
    from peft import PeftConfig, PeftModel

    place = Path(path).expanduser()
    folder = place if (place / ADAPTER).is_file() else place / "adapter"
    if not (folder / ADAPTER).is_file():
        raise UserError(
            f"share_base: {path} has no LoRA adapter; train it on {base.name_or_path} with use_peft, or set share_base "
            "to false"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.task_type = config.modules_to_save = None  # a head is filled in by its name
        with torch.random.fork_rng(devices=[]):  # peft draws what it then fills
            adapted = PeftModel.from_pretrained(model, str(folder), START, config=config)
        head = next((value for name, value in _stored(folder) if name.endswith(".score.weight")), None)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise cannot_open("adapter", str(folder), error) from None
    if folder != place:
        _check_sum(model, base, path)
    elif not _same(named := base_of_adapter(path), base.name_or_path):
        raise _of_another(path, base, f"it names {named}")
    return adapted.requires_grad_(False), head


def _check_sum(model: nn.Module, base: PreTrainedModel, path: str) -> None:
    """Raise UserError where the weights in the folder `path` are not those of `base` with its adapter added."""
    left = {name.replace(".base_layer", "") for name, _ in model.named_parameters() if "lora_" not in name}
    for name, stored in _stored(Path(path).expanduser()):
        if name.startswith("score."):
            continue
        place, _, leaf = name.rpartition(".")
        try:
            layer: Any = model.get_submodule(place)
            expected = getattr(getattr(layer, "base_layer", layer), leaf)
            if hasattr(layer, "base_layer") and leaf == "weight":
                expected = expected + layer.get_delta_weight(START)
            stored = stored.to(expected.device)
            fits = torch.equal(stored, expected)  # a large table needs no copy for it, as it has no update
            fits = fits or bool((stored - expected).abs().max() <= ROUNDING * expected.abs().max())
        except (AttributeError, RuntimeError):
            raise _of_another(path, base, f"{name} is not there, or has another shape") from None
        if not fits:
            raise _of_another(path, base, f"{name} is not that of the base with the adapter added")
        left.discard(name)
    if left := {name for name in left if not name.startswith("score.")}:
        raise _of_another(path, base, f"it lacks {min(left)}")


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's weights, of which no more than one is in memory."""
    for file in sorted(folder.glob("*model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(file, framework="pt") as tensors:  # opened anew, as an open file keeps what was read
                yield name, tensors.get_tensor(name)


def _same(one: str, two: Any) -> bool:
    """Whether two names are of one folder, or of one model on the hub."""
    return one == two or Path(one).expanduser().resolve() == Path(two).expanduser().resolve()


def _of_another(path: str, base: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"share_base: {path} is no adapter of {base.name_or_path} ({why}); train it on that model with use_peft, or "
        "set share_base to false"
    )
