"""The tokenizers: every byte round-trips, or every character; roles have tokens of their own, the answer's mask holds
its end."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast, Qwen3Config

from pipeline.errors import UserError
from pipeline.runtime.arguments import TokenizerArguments
from pipeline.text.tokenizer import (
    SPECIAL_TOKENS,
    answered_ids,
    character_tokenizer,
    check_fits,
    encode,
    load_tokenizer,
    oddities,
    prompt_ids,
    scored_ids,
    stop_ids,
    train_tokenizer,
    turn_end,
)
from stages.tokenizer import main

TEXTS = ["Ben found a kite near the river. He was happy.", "Ann lost the fox. She was sad."] * 40
CHAT = [{"role": "user", "content": "Write a story."}, {"role": "assistant", "content": "Ben found a kite."}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def test_special_tokens_are_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1


def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    texts = ["", " ", "\n\t  a  b ", "日本 🙂 é\x00\x7f", "don't stop . , !", bytes(range(256)).decode("latin-1")]
    texts += ["".join(chr(rng.choice([*range(0xD800), *range(0xE000, 0x11000)])) for _ in range(20)) for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_has_an_entry(tokenizer: PreTrainedTokenizerFast) -> None:
    # Bytes 0x80–0xFF never stand alone in UTF-8: each must still be reachable inside some character.
    for code in [*range(0x80), 0xE9, 0x7FF, 0xFFFD, 0x1F642, 0x10FFFF]:
        assert tokenizer.unk_token is None and tokenizer.decode(tokenizer(chr(code))["input_ids"]) == chr(code)


def test_the_mask_of_an_answer_decodes_to_answer_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    out = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    masked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(masked) == "Ben found a kite.<|end|>"
    assert tokenizer.decode(out["input_ids"]) == "<|user|>Write a story.<|end|><|assistant|>Ben found a kite.<|end|>"


def test_prompts_open_the_assistants_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    (chat,), (text,) = prompt_ids(tokenizer, [CHAT[:1]]), prompt_ids(tokenizer, ["Once"])
    assert tokenizer.decode(chat) == "<|user|>Write a story.<|end|><|assistant|>"
    assert tokenizer.decode(text) == "Once"
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert whole[: len(chat)] == chat  # so that training and sampling see the same prompt


def test_saved_and_opened_again(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.is_fast and again.chat_template == tokenizer.chat_template
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


def test_refusals(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    with pytest.raises(UserError, match="vocab_size: 100 is too small"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(UserError, match="has 200 embeddings"):
        check_fits(tokenizer, 200, "the model")
    with pytest.raises(UserError, match="no tokenizer can be opened"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "<|pad|>"', '"pad_token": "<|endoftext|>"'))
    # <|pad|> is in the vocabulary: a token of its own is found for padding
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


LINES = "First Citizen:\n  Speak, speak.\r\n\n\tné 日🙂 e\u0301\x00 <|>Writeasoynd"


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    return character_tokenizer([LINES, ""])


def test_every_character_is_one_token_in_order_of_its_code(letters: PreTrainedTokenizerFast) -> None:
    alphabet = sorted(set(LINES))
    assert len(letters) == 6 + len(alphabet)
    assert letters.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert character_tokenizer(["ba\n a"])("\n ab")["input_ids"] == [6, 7, 8, 9]
    assert letters(LINES)["input_ids"] == [6 + alphabet.index(c) for c in LINES]


def test_characters_come_back_exactly_also_when_opened_again(letters: PreTrainedTokenizerFast, tmp_path) -> None:
    letters.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.is_fast and again.chat_template == letters.chat_template and again.unk_token is None
    rng = random.Random(0)
    texts = ["", " ", "\n", "\r\n\r", "  .", LINES, *("".join(rng.choices(LINES, k=30)) for _ in range(50))]
    for text in texts:
        ids = again(text)["input_ids"]
        assert ids == letters(text)["input_ids"] and len(ids) == len(text)
        assert again.decode(ids) == text and again.batch_decode([ids], skip_special_tokens=True) == [text]
    spelt = "k<|end|>"  # in a document they are characters like any other, in a chat one token
    assert encode(again, [spelt], split_special_tokens=True)[0] == letters.convert_tokens_to_ids(list("k<|end|>"))
    assert again(spelt)["input_ids"][1:] == [5]


def test_a_character_without_an_entry_is_named(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"no entry for \('Q' 'ß'\).*algorithm: bpe"):
        prompt_ids(letters, ["k", "ßQk"])
    with pytest.raises(UserError, match=r"no entry for \('Q'\)"):
        prompt_ids(character_tokenizer(["abc"]), [[{"role": "user", "content": "aQ"}]])
    with pytest.raises(UserError, match=r"no entry for \('<' '>' '\|'\)"):
        encode(character_tokenizer(["end"]), ["<|end|>"], split_special_tokens=True)
    with pytest.raises(UserError, match=r"\('A' .* 'K' 'L' …\)"):
        encode(letters, ["ABCDEFGHIJKLM".replace("C", "").replace("F", "")])
    with pytest.raises(ValueError, match="str"):  # any other failure stays what it is
        encode(letters, [5])


def test_a_chat_of_characters(letters: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "Write a\nsay."}, {"role": "assistant", "content": "Speak:"}]
    (prompt,) = prompt_ids(letters, [chat[:1]])
    assert prompt == [3, *letters("Write a\nsay.")["input_ids"], 5, 4]
    out = letters.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    assert out["input_ids"] == [*prompt, *letters("Speak:")["input_ids"], 5]
    assert [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m] == out["input_ids"][-7:]


def test_the_stage_learns_the_alphabet_of_the_whole_text_from_its_column(tmp_path) -> None:
    corpus, rows = tmp_path / "corpus.jsonl", [f"speak {i:02d}" for i in range(40)]
    corpus.write_text("".join(json.dumps({"play": row}) + "\n" for row in rows))
    given = {"run_dir": str(tmp_path), "output_dir": str(tmp_path / "tokenizer"), "dataset": str(corpus)}
    for streaming in (False, True):
        main(TokenizerArguments(**given, algorithm="char", text_column="play", max_bytes=None, streaming=streaming))
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
        assert "".join(sorted(vocabulary, key=vocabulary.get)[6:]) == " 0123456789aekps"
        metrics = json.loads((tmp_path / "tokenizer" / "stage.json").read_text())["metrics"]
        assert metrics == {"vocab_size": 22, "bytes_per_token": 1.0}
    with pytest.raises(UserError, match="has no text column 'text'"):
        main(TokenizerArguments(**given))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would make an empty one out of config.json, and turn every text into nothing."""
    for config in (GPT2Config(), Qwen3Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="has no tokenizer"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
            "System",
        ),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),  # it runs in a sandbox
    ],
)
def test_a_template_that_fails_is_a_sentence_with_the_row(template: str, why: str) -> None:
    tokenizer, system = train_tokenizer(["a b c"], 300), [{"role": "system", "content": "Be brief."}, *CHAT[:1]]
    tokenizer.chat_template, places = template, ["rows.jsonl, line 7", "rows.jsonl, line 9"]
    sentence = rf"rows.jsonl, line [79]: the chat template of .* cannot write the conversation \(.*{why}.*\); change or"
    for function, rows in ((prompt_ids, ()), (answered_ids, (CHAT[1:], CHAT[1:])), (scored_ids, (CHAT[1:], CHAT[1:]))):
        with pytest.raises(UserError, match=sentence):
            function(tokenizer, [CHAT[:1], system], *([rows] if rows else []), places)
    assert turn_end(tokenizer) is None


def test_what_a_tokenizer_makes_of_texts_unseen_is_said() -> None:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2, "a": 3, "b": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer, texts = PreTrainedTokenizerFast(tokenizer_object=words, **names), ["a b", "a <end> b", "c a d"]
    ids, places = encode(tokenizer, texts), ["line 1", "line 2", "line 3"]
    assert oddities(tokenizer, texts, ids, places, "rows") == [
        "1 of 3 rows spells out a special token in the text (first: <end> in line 2); the model reads it as the token "
        "itself",
        "2 tokens in 1 of 3 rows are <unk> (first: line 3): the tokenizer has no entry for what stood there",
    ]
    assert oddities(tokenizer, texts[:1], ids[:1], places[:1], "rows") == []
    assert oddities(tokenizer, texts[1:2] * 2, ids[2:] * 2, places[:2], "rows") == [
        "2 of 2 rows spell out a special token in the text (first: <end> in line 1); the model reads it as the token "
        "itself",
        "4 tokens in 2 of 2 rows are <unk> (first: line 1): the tokenizer has no entry for what stood there",
    ]
    ids = encode(tokenizer, ["a c"])
    assert oddities(tokenizer, ["a c"], ids, places[:1], "rows") == [
        "1 token in 1 of 1 row is <unk> (first: line 1): the tokenizer has no entry for what stood there"
    ]


def test_a_list_of_ends_is_never_narrowed(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the model names stays; the token that ends a turn in the template comes first where it is not there."""
    for named, chat, text in (
        ([1, 9], [5, 1, 9], [1, 9]),
        ([9, 5], [9, 5], [9, 5]),
        (7, [5, 7], [7]),
        (None, [5, 1], [1]),
    ):
        model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=named))
        assert stop_ids(model, tokenizer) == chat and stop_ids(model, tokenizer, chat=False) == text


def test_the_place_of_a_character_without_an_entry_is_named(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"^rows.txt, line 4: the text has characters .*\('Q'\)"):
        prompt_ids(letters, ["k", "Qk"], ["rows.txt, line 2", "rows.txt, line 4"])


def test_an_end_that_the_tokenizer_puts_behind_every_text_is_not_behind_a_prompt() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A <|endoftext|>", special_tokens=[("<|system|>", 2), ("<|endoftext|>", 1)]
    )
    tokenizer.bos_token = "<|system|>"
    (ids,), (whole,) = prompt_ids(tokenizer, ["Ben"]), answered_ids(tokenizer, ["Ben"], [" ran"])
    assert ids[0] == 2 and 1 not in ids and whole.ids[: whole.start] == ids
    assert tokenizer.decode(whole.ids) == "<|system|>Ben ran<|endoftext|>"


def test_conversations_need_a_chat_template() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, ["a b"])
    with pytest.raises(UserError, match="has no chat template, which conversations need; give prompts as text"):
        prompt_ids(tokenizer, [[{"role": "user", "content": "a"}]])
