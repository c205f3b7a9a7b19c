"""The tokenizer: every byte round-trips, roles have tokens of their own, the answer's mask holds its end."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.tokenizer import SPECIAL_TOKENS, check_fits, load_tokenizer, prompt_ids, train_tokenizer

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
