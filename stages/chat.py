"""Talk with a model in the terminal: `python -m stages.chat --model_name_or_path runs/stories/ppo`.

Type a prompt and the answer streams in. `/exit` (or Ctrl-D) leaves, `/reset` forgets the conversation, `/temperature X`
sets how adventurous the sampling is. Prompts can also be piped in, one a line.
"""

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.chain import make_words
from pipeline.errors import UserError
from pipeline.identity import is_within
from pipeline.judging import plain_text
from pipeline.model.load import fit_embeddings, load_policy, parameter_count
from pipeline.model.sampler import Sampling, stream
from pipeline.runtime.arguments import ChatArguments
from pipeline.runtime.console import console, run
from pipeline.text import data
from pipeline.text.lengths import positions_of
from pipeline.text.tokenizer import END_OF_TURN, answer_texts, load_tokenizer, prompt_ids, stop_ids

COMMANDS = "/exit, /reset, /temperature X"


def stream_text(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text pieces of tokens as they come; joined they are the tokens' decoded text.

    A byte-level token may end inside a character. Such an end decodes to U+FFFD and is held back until the character
    is whole, or the tokens end.
    """
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        whole = answer_texts(tokenizer, [ids])[0].rstrip("\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
    rest = answer_texts(tokenizer, [ids])[0][len(shown) :]
    if rest:
        yield rest


@dataclass
class Chat:
    """A conversation with a model. `raw`: no template, the model goes on from the text alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    raw: bool
    history: bool
    sampling: Sampling
    max_new_tokens: int
    generator: torch.Generator
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def context(self) -> float:
        """Tokens that the model takes, prompt and answer together; inf where its configuration names no limit."""
        return positions_of(self.model) or math.inf

    def reply(self, text: str) -> Iterator[str]:
        """Stream the answer to `text`. Raises UserError, before the first piece, if it does not fit the context."""
        message = {"role": "user", "content": text}
        ids = self._fitting_prompt(message)
        tokens = stream(
            self.model,
            ids,
            max_new_tokens=int(min(self.max_new_tokens, self.context - len(ids))),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            eos_token_id=stop_ids(self.model, self.tokenizer, chat=not self.raw),
            generator=self.generator,
        )
        said = ""
        for piece in stream_text(tokens, self.tokenizer):
            said += piece
            yield piece
        if self.history:
            self.turns += [message, {"role": "assistant", "content": said}]

    def _fitting_prompt(self, message: dict[str, str]) -> list[int]:
        """The prompt's ids with as many of the latest turns as leave a quarter of the context for the answer."""
        while True:
            messages = [*self.turns, message]
            prompt = "".join(m["content"] for m in messages) if self.raw else messages
            ids = prompt_ids(self.tokenizer, [prompt])[0] or [self.tokenizer.eos_token_id]
            if self.turns and len(ids) > 0.75 * self.context:
                del self.turns[:2]
            elif len(ids) >= self.context:
                raise UserError(f"that has {len(ids)} tokens and the model's context {self.context}; say it shorter")
            else:
                return ids

    def command(self, line: str) -> str:
        """Obey `/reset` or `/temperature X` and say what was done. Raises UserError for anything else."""
        name, _, value = line[1:].strip().partition(" ")
        if name == "reset":
            self.turns.clear()
            return "the conversation starts anew"
        if name == "temperature":
            try:
                self.sampling = Sampling(float(value), top_p=self.sampling.top_p)
            except ValueError:
                raise UserError(f"/temperature needs a number, not {value!r}") from None
            return f"temperature {self.sampling.temperature:g}"
        raise UserError(f"unknown command /{name}; there are {COMMANDS}")


def open_chat(args: ChatArguments) -> Chat:
    """Load model and tokenizer. Raises UserError where they cannot talk."""
    path = Path(args.model_name_or_path)
    if is_within(args.model_name_or_path, args.run_dir) and not path.exists():
        raise UserError(
            f"chat: {path} does not exist; run `{make_words(path.name, args.run_dir)}` first, or set model_name_or_path"
        )
    model = load_policy(args.model_name_or_path, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model_name_or_path)
    fit_embeddings(model, tokenizer, args.model_name_or_path)
    sampling = Sampling(args.temperature, top_p=args.top_p)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    # Our tokenizer has the token that ends a turn before the model has learned to talk in turns.
    end = tokenizer.get_vocab().get(END_OF_TURN)
    talks = tokenizer.chat_template is not None and (end is None or end in stop_ids(model, tokenizer, chat=False))
    raw = args.raw or not talks
    return Chat(model, tokenizer, raw, args.history and not raw, sampling, args.max_new_tokens, generator)


def greet(chat: Chat, args: ChatArguments) -> None:
    """Say what the model is, what to type, and how to leave."""
    record = _record(Path(args.model_name_or_path))
    made = f"{record['stage']} of preset {record['preset']}, seed {record['seed']}, " if record else ""
    size = f"{parameter_count(chat.model) / 1e6:.1f} M parameters"
    way = "goes on from your text" if chat.raw else "answers instructions"
    say = partial(console.print, markup=False)
    say(f"{args.model_name_or_path}: {made}{size}; it {way}. {COMMANDS}", style="bold")
    if example := _example(record["config"].get("dataset") if record else None, chat.raw):
        say(f"for example: {example}")


def _record(folder: Path) -> dict[str, Any] | None:
    """The stage.json of a model folder; None where there is none that says how the model was made."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        kinds = {"stage": str, "preset": str, "seed": int, "config": dict}
        if isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
            return record
    return None


def _example(dataset: Any, raw: bool) -> str | None:
    """A held-out prompt of the data that the model comes from, or the first words of a document; generators only."""
    if not isinstance(dataset, str) or dataset not in data.GENERATORS:
        return None
    if raw:
        return " ".join(data.load_texts(dataset, split="validation", max_bytes=2000)[0].split()[:4])
    return plain_text(data.load_prompts(dataset, split="test", size=1).rows[0]["prompt"])


def talk(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Read lines until `/exit` or the end of input; stream answers to `out`. Ctrl-C stops an answer, then the chat."""
    typed = source.isatty()
    lines = iter(partial(input, "\n> "), "/exit") if typed else source
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for line in map(str.strip, lines):
            if line == "/exit":
                break
            if not line:
                continue
            try:
                for piece in [chat.command(line)] if line.startswith("/") else chat.reply(line):
                    print(piece, end="", flush=True, file=out)
            except UserError as error:
                print(f"error: {error}", end="", file=out)
            except KeyboardInterrupt:
                pass
            print(file=out, flush=True)
    if typed:
        print(file=out)


def main(args: ChatArguments) -> None:
    """Open the model and talk."""
    chat = open_chat(args)
    greet(chat, args)
    with contextlib.suppress(ImportError):  # arrow keys and history of what was typed, where the platform has them
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 must not end the talk
    talk(chat, sys.stdin, sys.stdout)


if __name__ == "__main__":
    run(main, ChatArguments, interactive=True)
