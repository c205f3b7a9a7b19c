"""Open a model folder as policy, reward model or critic, with LoRA where it is asked for, and save one.

A folder of the Llama family opens as our own GPT (pipeline/model/gpt.py), which is faster where it counts; any other
architecture of transformers, and what our GPT does not compute, opens as its stock class. All come in fp32 and in eval
mode: autocast chooses the precision of products.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.family import why_not_ours
from pipeline.model.fast_cpu import projections
from pipeline.model.gpt import Block, GPTForCausalLM, GPTForSequenceClassification, GPTModel
from pipeline.model.lora import without_wrapper
from pipeline.text.sources import is_local
from pipeline.text.tokenizer import ADAPTER, base_of_adapter, cannot_open, check_fits

log = logging.getLogger(__name__)


def load_policy(path: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A causal language model from a folder or the hub; an adapter is merged into its base.

    Raises UserError where weights are missing, which transformers would draw at random.
    """
    model, info = _load(path, GPTForCausalLM, AutoModelForCausalLM, device)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path} lacks weights of its language model ({_some(missing)}); give a complete folder")
    if heads := sorted({"score.weight", "classifier.weight"} & set(info["unexpected_keys"])):
        raise UserError(f"{path} is a classifier ({heads[0]}), such as a reward model, and no language model")
    _check_ends(model, path)
    return model


def _check_ends(model: PreTrainedModel, path: str) -> None:
    """Refuse a generation_config.json that transformers passed over, and end tokens that are no ids."""
    file = Path(path).expanduser() / "generation_config.json"
    try:
        if file.is_file() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("no object")
    except ValueError:
        raise UserError(f"{file} is damaged; it names the tokens that end an answer") from None
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ends == [] or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise UserError(f"{file}: eos_token_id {ends!r} must be the number of a token, or a list of them")


def load_reward(path: str, device: torch.device | str | None = None, trained: bool = True) -> PreTrainedModel:
    """A sequence classifier with one output: the score of a whole conversation.

    Raises UserError if the folder lacks weights, as a language model lacks the head; `trained=False` draws them anew.
    """
    kinds = GPTForSequenceClassification, AutoModelForSequenceClassification
    model, info = _load(path, *kinds, device, num_labels=1)
    missing = sorted(info["missing_keys"])
    if trained and missing:
        some = _some(missing)
        raise UserError(f"{path} is no trained reward model: it has no weights for {some}; train one on it first")
    if trunk := [name for name in missing if not name.startswith("score.")]:
        raise UserError(f"{path} lacks weights ({_some(trunk)}); give a complete folder")
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_critic(path: str, device: torch.device | str | None = None, head: str = "normal") -> PreTrainedModel:
    """A value model: the trunk of `path` (a policy or a reward model) and a new head.

    head  normal: weights N(0, 1/(d+1)) (arXiv 2403.17031); zero: all values are 0 at first
    """
    critic = load_reward(path, device, trained=False)
    linear: Any = getattr(critic, "score", None)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{path} opens as {type(critic).__name__}, which has no linear head `score` for a critic")
    draw_head(critic, head)
    return critic


def draw_head(critic: Any, head: str = "normal") -> None:
    """Give a critic a new head, as `load_critic` says."""
    nn.init.normal_(critic.score.weight, std=(critic.score.in_features + 1) ** -0.5 if head == "normal" else 0.0)
    forget_scale(critic)


def states_at(model: nn.Module, ids: Tensor, places: Tensor) -> Tensor:
    """Last hidden states (N, D) at `places` (b, t) bool of right-padded rows `ids` (b, t) long, row by row.

    No mask is needed: padding comes after every real token, so under causal attention none can see it. Our own GPT
    leaves out the work that only other places would need.
    """
    trunk = trunk_of(model)
    if type(trunk) is GPTModel:
        return trunk(ids, keep=places).last_hidden_state
    return trunk(input_ids=ids, use_cache=False).last_hidden_state[places]


def trunk_of(model: nn.Module) -> Any:
    """The part of a model that makes hidden states of tokens."""
    return without_wrapper(model).base_model


def fit_embeddings(model: PreTrainedModel, tokenizer: Any, path: str) -> None:
    """Make room for the pad token that `load_tokenizer` had to add; UserError for any other entry beyond the model's.

    The new row is drawn around the mean of the others, so that its logit is an ordinary one.
    """
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.num_embeddings
    if len(tokenizer) == size + 1 and tokenizer.pad_token_id == size:
        model.resize_token_embeddings(len(tokenizer))
    check_fits(tokenizer, model.config.get_text_config().vocab_size, path)


def keep_products_in_bf16(model: nn.Module) -> None:
    """Keep the matrices of a frozen GPT's blocks in bf16, in half of the memory: bf16 autocast reads them so anyway.

    Under it every result stays the same to the bit. Embedding, norms and heads stay as they are, and queries too, which
    fast_cpu.py scales before it casts. Other classes than our GPT are left alone: they may compute with their weights.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for part in (*projections(block.self_attn)[1:], *block.mlp.children()):
            if part.weight.dtype == torch.float32:
                part.to(torch.bfloat16)
    # A single parameter that lies in the file it was read from keeps the whole file in memory
    for parameter in model.parameters() if blocks else ():
        parameter.data = parameter.data.clone()


def parameter_count(model: nn.Module) -> int:
    """Parameters, a tied matrix counted once."""
    return sum(p.numel() for p in model.parameters())


def _load(
    path: str, ours: Any, stock: Any, device: torch.device | str | None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' report on what was missing in the folder."""
    path = os.path.expanduser(path)
    if is_local(path) and not (Path(path) / "config.json").is_file():
        if (Path(path) / ADAPTER).is_file():
            return _load_adapter(path, ours, stock, device, **kwargs)
        raise UserError(f"{path} is no model folder (it has no config.json)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = stock if why_not_ours(config) else ours
        classifies = any("SequenceClassification" in name for name in config.architectures or ())
        if kwargs.get("num_labels") == 1 and classifies and config.num_labels != 1:
            raise ValueError(f"it is a classifier with {config.num_labels} labels, and a reward needs one")
        options = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
        model, info = kind.from_pretrained(path, **options, **kwargs)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise cannot_open("model", path, error) from None
    if getattr(config, "auto_map", None):
        log.warning(
            "%s brings Python code of its own (auto_map), which is not run: it opens as %s", path, type(model).__name__
        )
    return (model.to(device) if device is not None else model).eval(), info


def _load_adapter(path: str, *kinds: Any, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A LoRA adapter merged into its base model; what the adapter brings whole, such as a head, is not missing."""
    from peft import PeftConfig, PeftModel

    model, info = _load(base_of_adapter(path), *kinds, **kwargs)
    try:
        with safe_open(Path(path) / "adapter_model.safetensors", framework="pt") as tensors:
            names = {name.removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118
        brought = {name for name in names if "lora_" not in name}
        if strange := sorted(brought - model.state_dict().keys()):
            raise ValueError(f"it has weights for {_some(strange)}, which {type(model).__name__} has not")
        config = PeftConfig.from_pretrained(path)
        if config.task_type != "SEQ_CLS":
            config.task_type = None  # a policy's adapter fits a critic's trunk, too
        merged = PeftModel.from_pretrained(model, path, config=config).merge_and_unload().eval()
    except Exception as error:
        raise cannot_open("adapter", path, error) from None
    if brought & {"score.weight", "classifier.weight"}:
        forget_scale(merged)
    return merged, info | {"missing_keys": set(info["missing_keys"]) - brought}


def forget_scale(model: PreTrainedModel) -> None:
    """Take a reward model's standardisation out of its config: it is of a head that is gone."""
    for name in ("reward_mean", "reward_std"):
        if hasattr(model.config, name):
            delattr(model.config, name)
