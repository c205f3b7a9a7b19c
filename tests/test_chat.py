"""Chat: what streams is what was generated, whole characters only, and every way out is clean."""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import END_OF_TEXT, END_OF_TURN, tiny_policy, tiny_tokenizer, write_models
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.model.sampler import Sampling, generate
from pipeline.runtime.arguments import ChatArguments
from pipeline.runtime.command_line import resolve
from pipeline.text.tokenizer import prompt_ids
from stages import chat as stage
from stages.chat import Chat, open_chat, stream_text, talk

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("run"))


def chat_of(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Chat:
    settings = {
        "model": tiny_policy(1, [END_OF_TURN, END_OF_TEXT]),
        "tokenizer": tokenizer,
        "raw": False,
        "history": False,
        "sampling": Sampling(1.0),
        "max_new_tokens": 30,
        "generator": torch.Generator().manual_seed(0),
    }
    return Chat(**settings | changes)


def converse(chat: Chat, typed: str) -> str:
    out = io.StringIO()
    talk(chat, io.StringIO(typed), out)
    return out.getvalue()


# ---- streaming ------------------------------------------------------------------------------------------------------


def test_a_character_of_several_bytes_comes_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("aé日🙂b")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 4 + 1  # none of these bytes were merged
    assert list(stream_text(ids, tokenizer)) == ["a", "é", "日", "🙂", "b"]


def test_bytes_that_are_no_text_come_out_as_decode_shows_them(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a🙂b")["input_ids"]
    cut = [*ids[:3], ids[-1], *ids[1:3]]  # half a face, b, half a face at the end
    pieces = list(stream_text(cut, tokenizer))
    assert "".join(pieces) == tokenizer.decode(cut) and pieces[0] == "a" and "b" in "".join(pieces)
    assert pieces[-1].strip("\ufffd") == ""


def test_streamed_text_is_the_decoded_text_for_any_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(300) for _ in range(rng.randrange(40))]  # special tokens and broken characters among them
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(stream_text(ids, tokenizer)) == whole


def test_streamed_characters_are_whole_for_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(1)
    alphabet = "ab é日本語🙂👩‍🚀ñ\n"
    for _ in range(50):
        text = "".join(rng.choice(alphabet) for _ in range(30))
        pieces = list(stream_text(tokenizer(text)["input_ids"], tokenizer))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_a_reply_is_what_generate_says(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chat_of(tokenizer, sampling=Sampling(0.0))
    ids = prompt_ids(tokenizer, [[{"role": "user", "content": "Ben?"}]])
    samples = generate(
        chat.model, ids, max_new_tokens=30, temperature=0.0, eos_token_id=[END_OF_TURN, END_OF_TEXT], pad_token_id=0
    )
    first = samples.prompt_lengths[0]
    whole = tokenizer.decode(samples.sequences[0, first:].tolist(), skip_special_tokens=True)
    assert whole and "".join(chat.reply("Ben?")) == whole


# ---- what the model is asked ----------------------------------------------------------------------------------------


def asked(chat: Chat, monkeypatch: pytest.MonkeyPatch, answer: str = "He ran.") -> list[str]:
    """Replace the sampler by one that answers `answer`; the prompts it was given gather in the list."""
    prompts: list[str] = []

    def say(model: object, ids: list[int], **_: object) -> list[int]:
        prompts.append(chat.tokenizer.decode(ids))
        return chat.tokenizer(answer)["input_ids"]

    monkeypatch.setattr(stage, "stream", say)
    return prompts


def test_template_raw_and_history(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, second in (
        ({}, "<|user|>Ann?<|end|><|assistant|>"),
        ({"raw": True}, "Ann?"),
        ({"history": True}, "<|user|>Ben?<|end|><|assistant|>He ran.<|end|><|user|>Ann?<|end|><|assistant|>"),
    ):
        chat = chat_of(tokenizer, **changes)
        prompts = asked(chat, monkeypatch)
        assert converse(chat, "Ben?\n\nAnn?\n") == "He ran.\nHe ran.\n"
        assert prompts[1] == second
    assert converse(chat, "/reset\nAnn?\n") == "the conversation starts anew\nHe ran.\n"
    assert prompts[2] == "<|user|>Ann?<|end|><|assistant|>"


def test_history_drops_the_oldest_turns_that_do_not_fit(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_of(tokenizer, history=True)  # 128 positions: a quarter stays free for the answer
    prompts = asked(chat, monkeypatch, answer="He ran. " * 4)
    converse(chat, "".join(f"Ben {i}?\n" for i in range(12)))
    assert all(len(tokenizer(prompt)["input_ids"]) <= 96 for prompt in prompts)
    assert "Ben 11?" in prompts[-1] and "Ben 10?" in prompts[-1] and "Ben 0?" not in prompts[-1]


def test_a_prompt_longer_than_the_context_is_a_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    said = converse(chat_of(tokenizer), "Ben " * 200 + "\nBen?\n")
    assert said.startswith("error: that has ") and "the model's context 128" in said.splitlines()[0]
    assert said.count("error") == 1 and said.count("\n") >= 2  # and the talk goes on


# ---- commands and ways out ------------------------------------------------------------------------------------------


def test_commands(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(tokenizer, sampling=Sampling(1.0, top_p=0.9))
    asked(chat, monkeypatch)
    typed = "/temperature 0.5\n/temperature hot\n/temperature -1\n/temprature 1\n/exit\nBen?\n"
    said = converse(chat, typed).splitlines()
    assert said[0] == "temperature 0.5" and chat.sampling == Sampling(0.5, top_p=0.9)
    assert said[1] == "error: /temperature needs a number, not 'hot'"
    assert said[2].startswith("error:") and "temperature and top_k must be at least 0" in said[2]
    assert said[3] == "error: unknown command /temprature; there are /exit, /reset, /temperature X"
    assert len(said) == 4  # nothing after /exit


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_of(tokenizer, history=True)

    def interrupted(*_: object, **__: object):
        yield from tokenizer("He")["input_ids"]
        raise KeyboardInterrupt

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["Ben?", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr(stage, "stream", interrupted)
    monkeypatch.setattr("builtins.input", typed)
    out = io.StringIO()
    talk(chat, Terminal(), out)
    assert out.getvalue() == "He\n\n" and chat.turns == []  # half an answer is not remembered


# ---- opening --------------------------------------------------------------------------------------------------------


def arguments(run: Path, **changes: object) -> ChatArguments:
    return resolve(ChatArguments(**{"run_dir": str(run), **changes}))


def test_a_pretrained_model_goes_on_from_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"stage": "pretrain", "preset": "stories", "seed": 3, "config": {"dataset": "stories"}}
    (run / "pretrain/stage.json").write_text(json.dumps(record))
    args = arguments(run, model_name_or_path=f"{run}/pretrain", history=True)
    chat = open_chat(args)
    assert chat.raw and not chat.history
    stage.greet(chat, args)
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("pretrain of preset stories, seed 3", "goes on from your text", "for example: "):
        assert words in shown
    assert not open_chat(arguments(run, history=True)).raw
    assert open_chat(arguments(run, raw=True)).raw


def test_a_missing_model_is_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ppo does not exist; run `make ppo"):
        open_chat(arguments(tmp_path))
    with pytest.raises(UserError, match="no model"):
        open_chat(arguments(run, model_name_or_path=str(tmp_path)))


@pytest.mark.slow
def test_prompts_can_be_piped_in(run: Path) -> None:
    words = [sys.executable, "-m", "stages.chat", "--run_dir", str(run), "--temperature", "0", "--max_new_tokens", "8"]
    done = subprocess.run(words, cwd=ROOT, input="Ben?\n/exit\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    chat = open_chat(arguments(run, temperature=0.0, max_new_tokens=8))
    assert done.stdout.endswith("".join(chat.reply("Ben?")) + "\n")
    assert "answers instructions" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "text", ["{}", "{", "[]", '{"stage": 1}', '{"stage":"a","preset":"b","seed":0,"config":{"dataset":[1]}}']
)
def test_a_damaged_record_does_not_stop_the_talk(run: Path, tmp_path: Path, text: str, capsys) -> None:
    shutil.copytree(run / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "stage.json").write_text(text)
    args = arguments(run, model_name_or_path=str(tmp_path / "sft"))
    stage.greet(open_chat(args), args)
    assert "answers instructions" in capsys.readouterr().out
