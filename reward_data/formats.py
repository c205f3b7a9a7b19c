"""Adapters from the public formats of instruction and preference data to TRL's.

`adapt(rows, kind)` looks at the columns, finds the format and returns rows of one shape a kind:

    instructions   prompt, completion
    prompts        prompt (and every column that the format does not use itself)
    preferences    prompt, chosen, rejected (and every such column)

Conversations become lists of `{"role", "content"}` messages; columns that are plain text under TRL's own names
(`prompt`, `completion`, `chosen`, `rejected`) stay plain text. A row that is *wrong* (a missing or empty field) raises
ValueError with its number; a row that is merely *useless* (two equal answers, no shared prompt) is dropped and counted.
Pure functions, standard library only. The README beside this file shows a row of each format.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Message = dict[str, str]
Kind = Literal["instructions", "prompts", "preferences"]

NEEDS: dict[str, str] = {
    "instructions": "prompt and completion, messages, or instruction and output",
    "prompts": "prompt, messages, instruction or input",
    "preferences": "prompt, chosen and rejected, or chosen and rejected as transcripts",
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Useless(Exception):
    """A row that says nothing about a preference or holds no answer; its text is the reason, counted by `adapt`."""


@dataclass(frozen=True)
class Format:
    """A format of rows: it fits when all of `needs` are columns; `convert` maps a row to prompt and the answers it has.

    `uses` names the columns the conversion consumes; the others stay beside prompts and pairs. `refusal` says
    why a format that could be mistaken for a useful one is not.
    """

    name: str
    needs: frozenset[str]
    gives: frozenset[str]  # of {"completion", "pair"}
    convert: Callable[[Row], Row]
    uses: frozenset[str]
    fits: Callable[[Row], bool] = lambda row: True
    refusal: str = ""


@dataclass
class Adapted:
    """Rows in TRL's shape, the name of the format they came in, and how many were dropped for which reason."""

    rows: list[Row]
    format: str
    dropped: Counter = field(default_factory=Counter)


# ---- fields -------------------------------------------------------------------------------------------------------


def text_field(row: Row, name: str, *, empty_ok: bool = False) -> str:
    """The text in `row[name]`. Raises ValueError if it is missing, not text, or empty where it may not be."""
    value = row.get(name)
    if value is None and empty_ok:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' should be text, but is {type(value).__name__}")
    if not value.strip() and not empty_ok:
        raise ValueError(f"field '{name}' is empty")
    return whole_text(value, name)


def whole_text(value: str, name: str) -> str:
    """The text, if UTF-8 can hold it. Raises ValueError for half an emoji, as cut-off JSON escapes leave one."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field '{name}' has half a character ({value[error.start]!r}); mend or drop it") from None
    return value


def messages_field(row: Row, name: str) -> list[Message]:
    """The messages in `row[name]`, from `role`/`content` or ShareGPT's `from`/`value`. Raises ValueError."""
    value = row.get(name)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"field '{name}' should be a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError(f"field '{name}' should hold messages with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"field '{name}' has the role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"field '{name}' has a message of {role} without text")
        messages.append({"role": ROLES[role], "content": whole_text(content, name)})
    return messages


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


def text_of(answer: str | list[Message]) -> str:
    """The bare text of a prompt or answer: itself, or the contents of its messages."""
    return answer if isinstance(answer, str) else "\n".join(message["content"] for message in answer)


def answer_to(prompt: str | list[Message], text: str) -> str | list[Message]:
    """A sampled text in the form of its prompt: text, or one message of the assistant."""
    return text if isinstance(prompt, str) else assistant(text)


def pair(prompt: str | list[Message], chosen: str | list[Message], rejected: str | list[Message]) -> Row:
    """A preference row. Raises Useless for an empty or an equal pair of answers."""
    if not text_of(chosen).strip() or not text_of(rejected).strip():
        raise Useless("empty reply")
    if chosen == rejected:
        raise Useless("equal replies")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_of_conversations(chosen: list[Message], rejected: list[Message]) -> Row:
    """Two whole conversations that differ in their last, assistant's, turn. Raises Useless if they part earlier."""
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise Useless("no shared prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Useless("no reply by the assistant")
    return pair(chosen[:-1], chosen[-1:], rejected[-1:])


# ---- conversions, one a format --------------------------------------------------------------------------------------


def from_instruction(row: Row) -> Row:
    """Alpaca and rasbt's preference set: instruction, input (may be empty), output and/or chosen and rejected."""
    extra = text_field(row, "input", empty_ok=True)
    prompt = user(text_field(row, "instruction") + (f"\n\n{extra}" if extra.strip() else ""))
    if "chosen" in row:
        return pair(prompt, assistant(text_field(row, "chosen")), assistant(text_field(row, "rejected")))
    if "output" in row:
        return {"prompt": prompt, "completion": assistant(text_field(row, "output"))}
    return {"prompt": prompt}


def from_transcripts(row: Row) -> Row:
    """hh-rlhf: `chosen` and `rejected` are transcripts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns."""
    return pair_of_conversations(*(transcript(text_field(row, name)) for name in ("chosen", "rejected")))


def transcript(text: str) -> list[Message]:
    """The messages of a hh-rlhf transcript; an empty last turn stays, as an empty message."""
    head, *turns = re.split(r"\n\n(Human|Assistant):", text if text.startswith("\n\n") else f"\n\n{text}")
    if head.strip() or not turns:
        raise ValueError("a transcript should begin with 'Human:' and mark every turn by 'Human:' or 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def from_sharegpt_pair(row: Row) -> Row:
    prompt = messages_field(row, "conversations")
    return pair(prompt, messages_field(row, "chosen"), messages_field(row, "rejected"))


def from_message_pair(row: Row) -> Row:
    """UltraFeedback: chosen and rejected are whole conversations, `prompt` (if any) is their first turn as text."""
    chosen, rejected = messages_field(row, "chosen"), messages_field(row, "rejected")
    prompt = row.get("prompt")
    if isinstance(prompt, list):  # TRL's own form: prompt as messages, chosen and rejected as the answers alone
        return pair(messages_field(row, "prompt"), chosen, rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        return pair(user(text_field(row, "prompt")), chosen, rejected)
    return pair_of_conversations(chosen, rejected)


def from_text_pair(row: Row) -> Row:
    """TRL's prompt, chosen and rejected in plain text, as in TL;DR's comparisons: they stay text."""
    return pair(*(text_field(row, name) for name in ("prompt", "chosen", "rejected")))


def from_llmbar(row: Row) -> Row:
    """LLMBar: input, output_1, output_2 and the number of the better one in `label`."""
    label = str(row.get("label"))
    if label not in ("1", "2"):
        raise ValueError(f"field 'label' should be 1 or 2, but is {label}")
    chosen, rejected = text_field(row, f"output_{label}"), text_field(row, f"output_{3 - int(label)}")
    return pair(user(text_field(row, "input")), assistant(chosen), assistant(rejected))


def from_tldr_comparison(row: Row) -> Row:
    """OpenAI's summarize_from_feedback: a post in `info`, two `summaries`, the index of the better in `choice`."""
    info, summaries, choice = row.get("info"), row.get("summaries") or [], row.get("choice")
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(part, dict) for part in summaries)
    if not isinstance(info, dict) or not two or choice not in (0, 1):
        raise ValueError("fields 'info', 'summaries' and 'choice' should hold a post, two summaries and 0 or 1")
    post = info.get("post") or info.get("article") or ""
    heading = "".join(f"{name.upper()}: {info[name]}\n\n" for name in ("subreddit", "title") if info.get(name))
    better, worse = (text_field(summaries[index], "text") for index in (choice, 1 - choice))
    return pair(f"{heading}POST: {post}\n\nTL;DR:", f" {better.strip()}", f" {worse.strip()}")


def from_prompt_completion(row: Row) -> Row:
    """TRL's prompt and completion, both as text or both as messages."""
    if isinstance(row.get("prompt"), str):
        return {"prompt": text_field(row, "prompt"), "completion": text_field(row, "completion")}
    return {"prompt": messages_field(row, "prompt"), "completion": messages_field(row, "completion")}


def from_tldr(row: Row) -> Row:
    """TL;DR's demonstrations: the post in `prompt`, the summary in `label`."""
    return {"prompt": text_field(row, "prompt"), "completion": f" {text_field(row, 'label').strip()}"}


def from_messages(row: Row, name: str = "messages") -> Row:
    """A conversation: its last turn, if the assistant's, is the completion and all before it the prompt."""
    messages = messages_field(row, name)
    if messages[-1]["role"] != "assistant":
        return {"prompt": messages}
    if len(messages) < 2:
        raise Useless("no shared prompt")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def from_prompt(row: Row) -> Row:
    prompt = row.get("prompt")
    return {"prompt": text_field(row, "prompt") if isinstance(prompt, str) else messages_field(row, "prompt")}


def is_text(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def is_bool(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(name), bool)


UNPAIRED = (
    "the rows are unpaired (one answer with a true/false label, as for KTO), which serves for prompts alone: "
    "preferences need chosen and rejected answers to one prompt, instructions an answer that is to be imitated"
)


def _format(name: str, needs: str, gives: str, convert: Callable[[Row], Row], also: str = "", **options) -> Format:
    """A Format from lists of columns in words; `also` are columns it uses where they are there."""
    needed = frozenset(needs.split())
    return Format(name, needed, frozenset(gives.split()), convert, needed | frozenset(also.split()), **options)


ASKING = {"prompt", "instruction", "input", "conversations", "messages", "info"}  # columns that a prompt is made from

# The first that fits is taken: a format that needs more columns stands before one that needs fewer of them.
FORMATS: tuple[Format, ...] = (
    _format("unpaired messages (KTO)", "messages label", "", from_messages, fits=is_bool("label"), refusal=UNPAIRED),
    _format(
        "unpaired completions (KTO)",
        "prompt completion label",
        "",
        from_prompt_completion,
        fits=is_bool("label"),
        refusal=UNPAIRED,
    ),
    _format("instruction preferences", "instruction chosen rejected", "pair", from_instruction, also="input output"),
    _format("alpaca", "instruction output", "completion", from_instruction, also="input"),
    _format("sharegpt preferences", "conversations chosen rejected", "pair", from_sharegpt_pair),
    _format("sharegpt", "conversations", "completion", lambda row: from_messages(row, "conversations")),
    _format("llmbar", "input output_1 output_2 label", "pair", from_llmbar),
    _format("tl;dr comparisons", "info summaries choice", "pair", from_tldr_comparison),
    _format("text preferences", "prompt chosen rejected", "pair", from_text_pair, fits=is_text("prompt", "chosen")),
    _format("hh-rlhf transcripts", "chosen rejected", "pair", from_transcripts, fits=is_text("chosen", "rejected")),
    _format("message preferences", "chosen rejected", "pair", from_message_pair, also="prompt messages"),
    _format("prompt and completion", "prompt completion", "completion", from_prompt_completion),
    _format("tl;dr", "prompt label", "completion", from_tldr, fits=is_text("prompt", "label")),
    _format("messages", "messages", "completion", from_messages, also="prompt"),
    _format("prompt", "prompt", "", from_prompt),
    _format("instruction", "instruction", "", from_instruction, also="input"),
)


# ---- the one entrance -----------------------------------------------------------------------------------------------


def recognise(row: Row) -> Format | None:
    """The format that `row`'s columns belong to, or None."""
    return next((form for form in FORMATS if form.needs <= row.keys() and form.fits(row)), None)


def adapt(rows: Iterable[Row], kind: Kind) -> Adapted:
    """Rows of one known format as TRL rows of `kind`; the first row decides which format it is.

    A preference row serves as an instruction too (its chosen answer is the completion), and any row as a prompt.
    Raises ValueError naming the columns found and needed, or the number of the bad row (from 1) and its field.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows")
    form = recognise(rows[0]) if isinstance(rows[0], dict) else None
    useful = {"instructions": {"completion", "pair"}, "prompts": set(), "preferences": {"pair"}}[kind]
    if form is None or (useful and not form.gives & useful):
        if form and form.refusal:
            raise ValueError(form.refusal)
        found = ", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else "without names"
        known = ", ".join(known.name for known in FORMATS if not useful or known.gives & useful)
        raise ValueError(f"the columns are {found}, but {kind} need {NEEDS[kind]} (formats known: {known})")
    result = Adapted([], form.name)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: should be an object with named fields, but is {type(row).__name__}")
        try:
            made = _of_kind(form, row, kind)
            if result.rows and type(made["prompt"]) is not type(result.rows[0]["prompt"]):
                raise ValueError("field 'prompt' is text in one row and messages in another")
            result.rows.append(made)
        except Useless as reason:
            result.dropped[str(reason)] += 1
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    return result


def _of_kind(form: Format, row: Row, kind: Kind) -> Row:
    """One row in the shape of `kind`."""
    made = form.convert(row)
    beside = {name: value for name, value in row.items() if name not in form.uses and name not in made}
    if kind == "prompts":
        if not form.refusal:  # an answer that stands beside may be the key that a reward compares with
            beside = {name: value for name, value in row.items() if name not in ASKING}
        return {"prompt": made["prompt"], **beside}
    if kind == "instructions":
        if "completion" not in made and "chosen" not in made:
            raise Useless("no reply by the assistant")
        return {"prompt": made["prompt"], "completion": made.get("completion", made.get("chosen"))}
    return made | beside
