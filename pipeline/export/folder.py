"""A stock model folder: weights, configuration, generation_config, tokenizer with its chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy, load_reward
from pipeline.text.sources import is_local
from pipeline.text.tokenizer import ADAPTER, END_OF_TURN, base_of_adapter, cannot_open, load_tokenizer, stop_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = "q8_0"  # 32 weights share a scale; only GGUF has it
POLICIES = ("ppo", "sft", "pretrain")


@dataclass
class Exported:
    """A model as it was opened: in fp32, an adapter merged.

    path   where it comes from
    talks  whether it answers in the turns of its chat template; a pretrained model only goes on from a text
    held   the precision of the weights in its folder: fp32, bf16 or fp16
    """

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_reward: bool
    talks: bool
    held: str


def last_policy(run_dir: str) -> str:
    """The folder of the last policy that a run has finished; PPO's, which will then be missed, if it has none."""
    done = (name for name in POLICIES if (Path(run_dir) / name / "stage.json").is_file())
    return f"{run_dir}/{next(done, POLICIES[0])}"


def open_model(path: str) -> Exported:
    """Open a policy, a reward model, or an adapter of either. Raises UserError as the openers do."""
    adapter = is_local(path) and (Path(path).expanduser() / ADAPTER).is_file()
    base = base_of_adapter(path) if adapter else path
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise cannot_open("model", base, error) from None
    is_reward = _is_reward_adapter(path) if adapter else _classifies(config)
    model = load_reward(path) if is_reward else load_policy(path)
    tokenizer = load_tokenizer(path)
    fit_embeddings(model, tokenizer, path)
    # Our tokenizer has the token that ends a turn before the model has learned to talk in turns
    end = tokenizer.get_vocab().get(END_OF_TURN)
    talks = tokenizer.chat_template is not None
    if not is_reward:
        talks = talks and (end is None or end in stop_ids(model, tokenizer, chat=False))
    held = {dtype: name for name, dtype in DTYPES.items()}.get(config.dtype, "fp32")
    return Exported(path, model, tokenizer, is_reward, talks, held)


def _classifies(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


def _is_reward_adapter(path: str) -> bool:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(path).task_type == "SEQ_CLS"
    except Exception as error:
        raise cannot_open("adapter", path, error) from None


def write_folder(exported: Exported, folder: Path, dtype: str) -> None:
    """Save a stock folder in `dtype` (a key of DTYPES). The weights of `exported.model` stay fp32, but are rounded as
    the file's are, so that outputs can be compared."""
    model, tokenizer = exported.model, exported.tokenizer
    if not exported.is_reward:
        set_ends(exported)
    for parameter in model.parameters():  # not model.to(): buffers such as rotary frequencies must stay exact
        parameter.data = parameter.data.to(DTYPES[dtype])
    try:
        model.save_pretrained(folder)
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    for trace in ("is_local", "local_files_only", "name_or_path"):  # of how it was opened here
        tokenizer.init_kwargs.pop(trace, None)
    tokenizer.save_pretrained(folder)


def set_ends(exported: Exported) -> None:
    """generation_config names all tokens that end an answer, so that any program stops where ours does."""
    generation: Any = exported.model.generation_config
    ends = stop_ids(exported.model, exported.tokenizer, chat=exported.talks)
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.pad_token_id = exported.tokenizer.pad_token_id
    generation._from_model_config = False


def dtype_for(to: str, asked: str, held: str) -> str:
    """The precision to write: what the folder holds where `asked` is auto. Raises UserError for one that `to` lacks."""
    if asked == QUANTIZED and to != "gguf":
        raise UserError(f"dtype: {QUANTIZED} is for `--to gguf`; a stock folder takes {', '.join(DTYPES)}")
    return held if asked == "auto" else asked
