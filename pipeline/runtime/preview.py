"""What a stage is about to work on: two lines at the start of every run, and with `--show` the rows themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pipeline.runtime.console import console
from pipeline.runtime.record import Stage
from pipeline.text import data
from pipeline.text.counts import agreeing, counted
from pipeline.text.data import Loaded
from pipeline.text.lengths import Fit, Overlong, Reader, fit_prompts
from pipeline.text.tokenizer import oddities
from reward_data.formats import text_of

BEGIN, END = "[[", "]]"  # around what is marked: seen without colours too
CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}  # but tab and newline


@dataclass
class Part:
    """A row as the model sees it, or one side of a pair."""

    heading: str
    ids: list[int]
    marked: list[bool]
    """The tokens that are trained on, or where the score is read."""


@dataclass
class View:
    """One split of a stage's rows."""

    fit: Fit
    places: Sequence[str]
    """Of all rows given."""
    parts: Callable[[int], list[Part]]
    """What to show of the row with a number."""
    notes: list[str] = field(default_factory=list)
    """Sentences of the loader and the stage on what was read and made of it."""
    shown: Sequence[int] | None = None
    """Numbers of the rows to show, in this order; None: the rows that are used."""


def say(stage: Stage, views: Sequence[View], ends: str) -> None:
    """Open a run: the notes, then two lines. `ends` says which tokens end an answer, and what is trained on."""
    for line in _summary(views, ends):
        stage.say(line)


def show(stage: Stage, views: Sequence[View], ends: str, tokenizer: PreTrainedTokenizerBase, marks: str = "") -> None:
    """Print the first rows of the first split, as many as `--show` asks for, and the summary; nothing is written.

    `marks` says what it means that tokens are marked.
    """
    if not stage.is_main:
        return
    first, count = views[0], stage.show
    if marks:
        console.print(f"{marks} {BEGIN} and {END}", markup=False, soft_wrap=True)
    for number in (first.fit.kept if first.shown is None else first.shown)[:count]:
        console.print(f"\n{first.places[number]}", markup=False, style="bold", soft_wrap=True)
        for part in first.parts(number):
            console.print(part.heading, markup=False, style="dim", soft_wrap=True)
            console.print(marked_text(tokenizer, part.ids, part.marked), soft_wrap=True)
    console.print()
    for line in _summary(views, ends):
        console.print(line, markup=False, soft_wrap=True)


def _summary(views: Sequence[View], ends: str) -> list[str]:
    notes = dict.fromkeys(note for view in views for note in view.notes)  # each once
    rows = "; ".join(view.fit.sentence() for view in views)
    return [*notes, f"{rows}; {ends}", views[0].fit.percentiles()]


def plain(text: str) -> str:
    """Text that cannot move the cursor or change colours: control characters are written out."""
    return text.translate(CONTROL)


def marked_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], marked: list[bool]) -> Text:
    """Tokens as text, special ones included, marked runs between BEGIN and END and in colour."""
    text, shown, end = Text(), "", 0
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for mark, run in groupby(marked):
        start, end = end, end + len(list(run))
        whole = str(decode(ids[:end]))
        # By what it adds to the text before it: alone, a piece might lose the space that it begins with
        piece = whole[len(shown) :] if whole.startswith(shown) else str(decode(ids[start:end]))
        piece, shown = plain(piece), whole
        text.append(f"{BEGIN}{piece}{END}" if mark else piece, style="bold green" if mark else "")
    return text


def ends_told(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str:
    """A sentence on the tokens that end an answer, the usual one first."""
    usual, *others = (str(tokenizer.convert_ids_to_tokens(token)) for token in ends)
    return f"an answer ends with {usual}" + (f", or also {' or '.join(others)}" if others else "")


# ---- prompts --------------------------------------------------------------------------------------------------------


def open_prompts(
    stage: Stage,
    splits: dict[str, Loaded],
    readers: Sequence[Reader],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    room: tuple[str, int],
    overlong: Overlong,
) -> dict[str, Dataset]:
    """The prompts of each split that leave `room`, the setting for the length of answers, to all `readers`.

    Shows them, if that is asked for, or opens the run with the summary of them; `tokenizer` is the first reader's.
    Raises UserError as lengths.fit_prompts does.
    """
    rows, views = {}, []
    for name, loaded in splits.items():
        prompts = loaded.rows["prompt"][:]
        what = f"{name} prompts"
        fit, ids = fit_prompts(stage.name, what, prompts, loaded.places, readers, room, overlong)
        texts = [text_of(prompt) for prompt in prompts]
        notes = [*loaded.notes, *oddities(tokenizer, texts, ids, loaded.places, what)]
        views.append(View(fit, loaded.places, partial(_prompt, ids, readers[0].limit, room), notes))
        rows[name] = loaded.rows if len(fit.kept) == len(prompts) else loaded.rows.select(fit.kept)
    views[-1].notes += data.repeated_prompts(splits, "prompts")
    told = ends_told(tokenizer, ends)
    if stage.show:
        show(stage, views, told, tokenizer)
    else:
        say(stage, views, told)
    return rows


def _prompt(ids: list[list[int]], limit: int | None, room: tuple[str, int], number: int) -> list[Part]:
    row = ids[number]
    left = 0 if limit is None else limit - len(row)
    told = "" if limit is None else f", for which {left:,} {agreeing(left)} left"
    return [Part(f"{counted(len(row), 'tokens')}, then an answer of up to {room[1]:,}{told}", row, [False] * len(row))]


def of_texts(stage: Stage, splits: dict[str, Loaded], what: str) -> None:
    """Show rows that no model reads, if that is asked for; say how many there are."""
    lines = list(dict.fromkeys(note for loaded in splits.values() for note in loaded.notes))
    lines += data.repeated_prompts(splits, what)
    lines.append(", ".join(counted(len(loaded.rows), f"{name} {what}") for name, loaded in splits.items()))
    if not stage.show:
        for line in lines:
            stage.say(line)
        return
    first = next(iter(splits.values()))
    for place, row in zip(first.places, first.rows.select(range(min(stage.show, len(first.rows)))), strict=False):
        console.print(f"\n{place}", markup=False, style="bold", soft_wrap=True)
        for name, value in row.items():
            said = text_of(value) if isinstance(value, list) else str(value)
            console.print(plain(f"{name}: {said}"), markup=False, soft_wrap=True)
    console.print("", *lines, sep="\n", markup=False, soft_wrap=True)
