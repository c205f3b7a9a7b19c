"""Byte-level BPE (Sennrich et al. 2016 on bytes, as GPT-2), or one token a character, with a chat template and tokens
of its own for every role.

What BPE encodes always comes back, as every byte has an entry; so does what a character tokenizer encodes, which
refuses a character that it has no entry for. Padding is never an end token: pad == EOS corrupts masks, reward positions
and values (huggingface/trl#5303).

What a model is trained on, sampled from and scored on is rendered here and nowhere else: `prompt_ids`, `answered_ids`
and `scored_ids`, with the end of an answer found by `turn_end`.
"""

import datetime
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.text.counts import agreeing, counted
from pipeline.text.sources import is_local, one_line
from reward_data.formats import answer_to, text_of

PAD, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END_OF_TURN = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

ADAPTER = "adapter_config.json"
DAY = datetime.datetime(2024, 7, 26)
"""What a chat template that asks for the date is told, in every stage: Llama 3's own default."""

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


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], places: Sequence[str] = (), **options: Any
) -> list[list[int]]:
    """Token ids of every text; `options` are those of calling the tokenizer.

    Raises UserError with the characters that a character tokenizer has no entry for, and where they stand if `places`
    of the texts are known.
    """
    try:
        return tokenizer(texts, **options)["input_ids"] if texts else []
    except Exception as error:  # tokenizers has no class of its own for it
        if "[UNK]" not in str(error):
            raise
        special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        bare = [text if options.get("split_special_tokens") else special.sub("", text) for text in texts]
        known = tokenizer.get_vocab().keys()
        missing = sorted(set().union(*bare) - known)
    first = next((f"{place}: " for place, text in zip(places, bare, strict=False) if not set(text) <= known), "")
    shown = " ".join(map(repr, missing[:10])) + (" …" if len(missing) > 10 else "")
    raise UserError(
        f"{first}the text has characters that the tokenizer has no entry for ({shown}): train a character tokenizer on "
        "text that has them, or one with `algorithm: bpe`, which knows every byte"
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
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, with a pad token of its own, which keeps masks and values right: GPT-2, Llama and Pythia come
    without one."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        spare = (PAD, "<|finetune_right_pad_id|>", "<|padding|>", tokenizer.unk_token)
        ends = (tokenizer.eos_token, END_OF_TEXT)  # SmolLM2's unknown token ends its documents
        tokenizer.pad_token = next((t for t in spare if t in vocabulary and t not in ends), None)
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


def stop_ids(model: object, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> list[int]:
    """Ids that end an answer, the usual one first: those of the model's generation_config, else the tokenizer's end
    token. With `chat`, for conversations, the token that ends a turn in the chat template is always among them."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
    end = turn_end(tokenizer) if chat else None
    if end is not None and end not in ids:
        ids = [end, *ids]
    if not ids:
        raise UserError("neither the policy's generation_config nor its tokenizer names an end token; set eos_token_id")
    return ids


def answer_texts(tokenizer: PreTrainedTokenizerBase, answers: list[list[int]]) -> list[str]:
    """Answers (ids without their end token) as text, special tokens left out."""
    return tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- the one way from rows to tokens --------------------------------------------------------------------------------

PROBE = [{"role": "user", "content": "zqxk"}, {"role": "assistant", "content": "zqxkj"}]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that the chat template puts after an assistant's answer (`<|im_end|>`, `<end_of_turn>`, …).

    None where it puts none (white space or ordinary words), and where there is no template.
    """
    if tokenizer.chat_template is None:
        return None
    system = [{"role": "system", "content": "zq"}]
    for messages in (PROBE, [*system, *PROBE]):  # some templates want a system's word first
        try:
            text = conversation_text(tokenizer, messages)
        except UserError:
            continue
        _, found, ending = text.rpartition(PROBE[-1]["content"])
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ids = encode(tokenizer, [ending], add_special_tokens=False)[0] if found and ending else []
        return next((token for token in ids if token in special and str(tokenizer.decode([token])).strip()), None)
    return None


def conversation_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], place: str = "a conversation", **options: Any
) -> str:
    """A conversation as its chat template writes it, in transformers' sandbox; `options` are apply_chat_template's.

    Raises UserError, which names the `place` of the row, where there is no template or it refuses the conversation.
    """
    check_template(tokenizer)
    try:
        fixed: Any = {"strftime_now": DAY.strftime}  # or each run, and each row, might read another date
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **fixed, **options))
    except Exception as error:  # any at all: a template is a program that came with the model
        why = one_line(error) or type(error).__name__
    raise UserError(
        f"{place}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot write the conversation "
        f"({why}); change or drop the row, or take a tokenizer whose template can"
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list, places: Sequence[str] = ()) -> list[list[int]]:
    """Token ids of prompts, all text or all messages, the same in every stage.

    Text is encoded with the special tokens that the tokenizer puts before it; messages through the chat template, up to
    where the answer starts. Raises UserError, which names the place of a row that cannot be rendered.
    """
    places = places or numbered(prompts)
    if not prompts or isinstance(prompts[0], str):
        return _open_ids(tokenizer, prompts, places)
    texts = [
        conversation_text(tokenizer, prompt, place, add_generation_prompt=True)
        for prompt, place in zip(prompts, places, strict=True)
    ]
    return encode(tokenizer, texts, places, add_special_tokens=False)


class Answered(NamedTuple):
    """A prompt with its answer as a model is trained on them."""

    ids: list[int]
    """Token ids of both, the end of the answer included."""
    start: int
    """Where the answer begins."""
    as_sampled: bool
    """Whether the ids before `start` are those that an answer is sampled from."""


def answered_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list, completions: list, places: Sequence[str] = ()
) -> list[Answered]:
    """Prompts and their answers, up to the end of the answer: the token that ends a turn in the chat template, or where
    there is none, and after plain text, the tokenizer's end token.

    An answer is text, or one message of the assistant: nobody else's words are trained on. Raises UserError, which
    names the place of a row that cannot be rendered.
    """
    places = places or numbered(prompts)
    if prompts and isinstance(prompts[0], str):
        texts = [prompt + _ended(tokenizer, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        wholes, end = _open_ids(tokenizer, texts, places), None
    else:
        for answer, place in zip(completions, places, strict=True):
            if [message["role"] for message in answer] != ["assistant"]:
                raise UserError(f"{place}: an answer must be one message of the assistant; put earlier turns in prompt")
        rows = zip(prompts, completions, places, strict=True)
        texts = [conversation_text(tokenizer, [*prompt, *answer], place) for prompt, answer, place in rows]
        wholes, end = encode(tokenizer, texts, places, add_special_tokens=False), turn_end(tokenizer)
        end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answered = []
    for prompt, whole in zip(prompt_ids(tokenizer, prompts, places), wholes, strict=True):
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        if not isinstance(prompts[0], str):
            last = max((i for i in range(start, len(whole)) if whole[i] == end), default=None)
            whole = [*whole, *end_of_text] if last is None else whole[: last + 1]
        answered.append(Answered(whole, start, start == len(prompt)))
    return answered


def scored_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list, completions: list, places: Sequence[str] = ()
) -> list[list[int]]:
    """Token ids of whole rows as a reward model reads them, in training and afterwards.

    Conversations are what the chat template writes; plain text is prompt, completion and the tokenizer's end token, as
    in TRL's RewardTrainer. A completion is text, or messages. Raises UserError as `prompt_ids` does.
    """
    places, rows = places or numbered(prompts), zip(prompts, completions, strict=True)
    if prompts and isinstance(prompts[0], str):
        texts = [prompt + _ended(tokenizer, text_of(answer)) for prompt, answer in rows]
        return encode(tokenizer, texts, places)
    talks = [[*prompt, *(answer_to(prompt, said) if isinstance(said, str) else said)] for prompt, said in rows]
    texts = [conversation_text(tokenizer, talk, place) for talk, place in zip(talks, places, strict=True)]
    return encode(tokenizer, texts, places, add_special_tokens=False)


def oddities(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ids: Sequence[list[int]], places: Sequence[str], what: str
) -> list[str]:
    """Sentences on what nobody would guess from reading the texts, whose token ids are `ids`: special tokens that are
    spelt out become those tokens, and what the tokenizer has no entry for becomes the unknown one."""
    notes = []
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append(f"the chat template writes a date; here that is always {DAY:%d %B %Y}, so that it never changes")
    special = {token for token in tokenizer.all_special_tokens if token.strip()}
    spelt = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
    found = [
        (match[0], place) for text, place in zip(texts, places, strict=True) if spelt and (match := spelt.search(text))
    ]
    if found:
        notes.append(
            f"{len(found):,} of {counted(len(texts), what)} {agreeing(len(found), 'spells', 'spell')} out a special "
            f"token in the text (first: {found[0][0]} in {found[0][1]}); the model reads it as the token itself"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        lost = [(row.count(unknown), place) for row, place in zip(ids, places, strict=True) if unknown in row]
        if lost:
            tokens = sum(count for count, _ in lost)
            notes.append(
                f"{counted(tokens, 'tokens')} in {len(lost):,} of {counted(len(texts), what)} {agreeing(tokens)} "
                f"{tokenizer.unk_token} (first: {lost[0][1]}): the tokenizer has no entry for what stood there"
            )
    return notes


def is_chat(rows: Any) -> bool:
    """Whether the prompts of a data set are conversations."""
    return not isinstance(rows[0]["prompt"], str)


def numbered(rows: Sequence[Any]) -> list[str]:
    """Places of rows that come from no file, counted from 1."""
    return [f"row {i}" for i in range(1, len(rows) + 1)]


def _ended(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """An answer in plain text with the tokenizer's end token, once."""
    end = tokenizer.eos_token or ""
    return answer if answer.endswith(end) else answer + end


def _open_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], places: Sequence[str]) -> list[list[int]]:
    """Ids of texts with the special tokens that the tokenizer puts before a text, without those that it puts behind."""
    added = encode(tokenizer, [""])[0]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    closes = bool(added) and added[-1] in ends and added != [tokenizer.bos_token_id]
    ids = encode(tokenizer, texts, places)
    return [row[:-1] for row in ids] if closes else ids
