"""Byte-level BPE (Sennrich et al. 2016 on bytes, as GPT-2), or one token a character, with a chat template and tokens
of its own for every role.

What BPE encodes always comes back, as every byte has an entry; so does what a character tokenizer encodes, which
refuses a character that it has no entry for. Padding is never an end token: pad == EOS corrupts masks, reward positions
and values (huggingface/trl#5303).
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.text.sources import is_local, one_line

PAD, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END_OF_TURN = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

ADAPTER = "adapter_config.json"

# The markers tell TRL which tokens the assistant wrote; the end of its turn is one of them, or it never learns to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn merges from `texts` up to `vocab_size` entries (special tokens and bytes included)."""
    floor = len(SPECIAL_TOKENS) + 256
    if vocab_size < floor:
        raise UserError(f"vocab_size: {vocab_size} is too small; {floor} are needed for the bytes and special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return _finished(bpe)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One entry a character (Unicode code point) of `texts`, in the order of their codes, after the special tokens.

    There is no entry for "unknown", which would lose text in silence: the tokenizer raises on any other character, and
    `encode` says which.
    """
    characters = sorted(set().union(*texts))
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # `.` would leave newlines together
    words.decoder = decoders.Fuse()
    return _finished(words)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[list[int]]:
    """Token ids of every text; `options` are those of calling the tokenizer.

    Raises UserError with the characters that a character tokenizer has no entry for.
    """
    try:
        return tokenizer(texts, **options)["input_ids"] if texts else []
    except Exception as error:  # tokenizers has no class of its own for it
        if "[UNK]" not in str(error):
            raise
        special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        bare = [text if options.get("split_special_tokens") else special.sub("", text) for text in texts]
        missing = sorted(set().union(*bare) - tokenizer.get_vocab().keys())
    shown = " ".join(map(repr, missing[:10])) + (" …" if len(missing) > 10 else "")
    raise UserError(
        f"the text has characters that the tokenizer has no entry for ({shown}): train a character tokenizer on text "
        "that has them, or one with `algorithm: bpe`, which knows every byte"
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Open a tokenizer from a folder or the hub; its pad token is never an end token.

    Where it has no other (GPT-2's), `<|pad|>` is added at the end, for which `models.fit_embeddings` makes room.
    """
    path = os.path.expanduser(path)
    if is_local(path) and not Path(path).is_dir():
        raise UserError(f"no tokenizer can be opened from {path}: there is no such folder")
    if (Path(path) / ADAPTER).is_file() and not any(Path(path).glob("tokenizer*")):
        return load_tokenizer(base_of_adapter(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise cannot_open("tokenizer", path, error) from None
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):
        # What transformers makes of a config.json alone: it would turn every text into nothing
        raise UserError(f"{path} has no tokenizer (no tokenizer.json); save it beside the model, or give its folder")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # GPT-2, Llama, Pythia come without a pad token: a token of their own keeps masks and values right.
        spare = (PAD, "<|finetune_right_pad_id|>", "<|padding|>", tokenizer.unk_token)
        tokenizer.pad_token = next((t for t in spare if t in vocabulary and t != tokenizer.eos_token), None)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def base_of_adapter(path: str) -> str:
    """The folder or hub name of the model that a LoRA adapter's folder belongs to."""
    try:
        base = json.loads((Path(path) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise UserError(f"the adapter {path} cannot be opened: {ADAPTER} is damaged") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter {path} does not say which model it belongs to (base_model_name_or_path)")
    if Path(base).expanduser().resolve() == Path(path).resolve():
        raise UserError(f"the adapter {path} names itself as its model (base_model_name_or_path)")
    return base


def cannot_open(what: str, path: str, error: Exception) -> UserError:
    """A sentence about a model, adapter or tokenizer folder that the libraries refused."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{path} brings Python code of its own (auto_map), which is never run here; take a {what} of an "
            "architecture that transformers knows"
        )
    if "ignore_mismatched_sizes" in str(error):
        return UserError(
            f"no {what} can be opened from {path}: its weights have other shapes than its config.json says"
        )
    return UserError(f"no {what} can be opened from {path}: {one_line(error) or type(error).__name__}")


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int, what: str) -> None:
    """Refuse a tokenizer that can give ids which the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries but {what} has {vocab_size} embeddings; "
            "use the tokenizer that the model was trained with"
        )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations for a tokenizer that has no chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, which conversations "
            "need; give prompts as text, or a tokenizer with one"
        )


def stop_ids(model: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the model's generation_config, else the tokenizer's end token."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise UserError("neither the policy's generation_config nor its tokenizer names an end token; set eos_token_id")
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list) -> list[list[int]]:
    """Token ids of prompts, all text or all messages, the same in every stage.

    Text is encoded as TRL does in SFT, with the tokenizer's own special tokens; messages through the chat template, up
    to where the answer starts.
    """
    if not prompts or isinstance(prompts[0], str):
        return encode(tokenizer, prompts)
    check_template(tokenizer)
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, cast(list[str], texts), add_special_tokens=False)


def answer_texts(tokenizer: PreTrainedTokenizerBase, answers: list[list[int]]) -> list[str]:
    """Answers (ids without their end token) as text, special tokens left out."""
    return tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
