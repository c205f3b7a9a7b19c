"""Whether what was exported gives the outputs that the model gives here: it is opened in a fresh process, without our
code, and its tokens, logits and greedy answer are compared with ours."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.folder import Exported
from pipeline.model.sampler import generate
from pipeline.text.lengths import positions_of
from pipeline.text.tokenizer import conversation_text, prompt_ids, scored_ids, stop_ids

SAID = "Write a short story about Ben, a kite and the river."
REPLY = "Ben found a kite near the river. He was happy."
ANSWER = 32  # tokens of the greedy answer
STOCK = 1e-5  # of the largest logit: what another order of fp32 sums leaves


class CannotOpen(UserError):
    """A fresh process could not open what was written."""


@dataclass
class Ours:
    """What the model gives here: `prompt` as text, messages or ids, its `ids`, `logits` (T, V), of a reward model (1,),
    and the `greedy` answer's ids."""

    prompt: Any
    ids: list[int]
    logits: Tensor
    greedy: list[int]


@torch.inference_mode()
def ours(exported: Exported, ends: list[int]) -> Ours:
    """Outputs of the model on a fixed text. A tokenizer that lacks its characters gets its own entries instead."""
    tokenizer, model = exported.tokenizer, exported.model
    ask = [{"role": "user", "content": SAID}]
    try:
        if exported.is_reward:
            prompt: Any = [*ask, {"role": "assistant", "content": REPLY}] if exported.talks else SAID + REPLY
            ids = scored_ids(tokenizer, [ask if exported.talks else SAID], [REPLY])[0]
            prompt = prompt if exported.talks else ids  # plain text has an end token put after it
        else:
            prompt = ask if exported.talks else SAID
            ids = prompt_ids(tokenizer, [prompt])[0]
    except UserError:  # a character tokenizer, or a template that refuses the words
        ids = [token for token in range(min(len(tokenizer), 40)) if token not in set(tokenizer.all_special_ids)]
        prompt = ids
    room = positions_of(model)
    if room is not None and len(ids) + ANSWER > room:
        prompt = ids = ids[: max(1, room - ANSWER)]
    logits = model(torch.tensor([ids])).logits[0].float().clone()
    return Ours(prompt, ids, logits, [] if exported.is_reward else greedy_answer(exported, ids, ends))


def greedy_answer(exported: Exported, ids: list[int], ends: list[int]) -> list[int]:
    """The answer's ids by our own sampler, the end token included."""
    most = min(ANSWER, (positions_of(exported.model) or 10**9) - len(ids))
    drawn = generate(exported.model, [ids], max_new_tokens=most, temperature=0, eos_token_id=ends, pad_token_id=ends[0])
    return drawn.answers(with_end=True)[0]


def ends_of(exported: Exported) -> list[int]:
    """Ids that end an answer; none are needed of a reward model."""
    return [] if exported.is_reward else stop_ids(exported.model, exported.tokenizer, chat=exported.talks)


def opened_alone(script: str, words: list[str], request: dict[str, Any]) -> dict[str, Tensor]:
    """What a script beside this file answers in a fresh Python that was started with `words`.

    Raises CannotOpen with the last line of what it said where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, out = Path(scratch) / "request.json", Path(scratch) / "out.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, *words, str(Path(__file__).with_name(script)), str(asked), str(out)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not out.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CannotOpen(f"export: what was written cannot be opened in a fresh process: {last[:300]}")
        return load_file(out)


def in_transformers(
    exported: Exported, here: Ours, folder: Path, gguf: dict[str, Any] | None = None, tolerance: float = STOCK
) -> float:
    """The largest difference of logits when transformers alone opens `folder`, or a file in it (`gguf`: what alone.py
    wants to know of that).

    A folder is given the text, and must make the same tokens of it; a file is given the tokens, as transformers builds
    a tokenizer of its own for it. Raises UserError where tokens or the greedy answer are others, or the difference is
    above `tolerance` times the largest logit (and 1).
    """
    request = {
        "folder": str(folder.resolve()),
        "is_reward": exported.is_reward,
        "prompt": here.ids if gguf else here.prompt,
        "max_new_tokens": len(here.greedy),
        **(gguf or {}),
    }
    found = opened_alone("alone.py", ["-I"], request)
    return compare(here, found, "transformers alone", tolerance * scale(here))


def scale(here: Ours) -> float:
    """The largest logit, at least 1: rounding grows with it."""
    return max(1.0, float(here.logits.abs().max()))


def compare(here: Ours, found: dict[str, Tensor], by: str, tolerance: float) -> float:
    """The largest difference of logits. Raises UserError where it, the tokens or the greedy answer are too far off."""
    if found["ids"].tolist() != here.ids:
        raise UserError(f"export: {by} makes other tokens of the text; what was written is not the same model")
    if found["logits"].shape != here.logits.shape:
        raise UserError(f"export: {by} gives logits of another shape; what was written is not the same model")
    difference = float((found["logits"] - here.logits).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"export: opened by {by}, logits differ by {difference:.2g}, and {tolerance:.2g} are allowed; what was "
            "written is not the same model"
        )
    if here.greedy and found["greedy"].tolist() != here.greedy:
        raise UserError(f"export: {by} gives another greedy answer; what was written is not the same model")
    return difference


def prompt_text(exported: Exported, here: Ours) -> str:
    """The prompt as one text, special tokens spelt out."""
    if isinstance(here.prompt, str):
        return here.prompt
    if isinstance(here.prompt[0], dict):
        return conversation_text(exported.tokenizer, here.prompt, add_generation_prompt=True)
    return str(exported.tokenizer.decode(here.ids))
