"""Adapters from the public formats of instruction and preference data to TRL's.

`adapt(rows, kind)` looks at the columns of each row, finds its format and returns rows of one shape a kind:

    instructions   prompt, completion
    prompts        prompt, and every column that the prompt is not made from, for the rewards
    preferences    prompt, chosen, rejected, and what the pairs of our own preferences stage have beside them

What a stage reads is described once, here. A `Format` says which columns it needs and uses; CONTEXT columns become part
of any prompt that is a conversation; REFUSED and WEIGHTS are columns and keys of messages that change what a row means
and that no stage can use, so that a row in which they say something is refused by name. All others are merely unused,
and named in `Adapted.unused`.

Conversations become lists of `{"role", "content"}` messages; columns that are plain text under TRL's own names
(`prompt`, `completion`, `chosen`, `rejected`) stay plain text. An answer is the assistant's last turn; the turns before
it belong to the prompt. A row that is *wrong* (a field of another type) raises BadRow with its number; a row that is
merely *useless* (a field that is empty or missing, two equal answers, no shared prompt) is dropped and counted.
Pure functions, standard library only. The README beside this file shows a row of each format.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Message = dict[str, str]
Answer = str | list[Message]
Kind = Literal["instructions", "prompts", "preferences"]

NEEDS: dict[str, str] = {
    "instructions": "prompt and completion, messages, or instruction and output",
    "prompts": "prompt, messages, instruction or input",
    "preferences": "prompt, chosen and rejected, or chosen and rejected as transcripts",
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
ANSWERS = ("completion", "chosen", "rejected")

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "persona")
CONTEXT = (*SYSTEM, "history")
"""Columns that are part of a conversation's prompt, in every format."""
ASKED_BESIDE = ("input", "context", "instruction", "passage", "document", "suffix")
"""Columns that are part of what is asked: refused in SFT and reward where the format does not use them."""
ASKING = {"prompt", "instruction", "input", "context", "conversations", "messages", "info", "question"}
"""Columns that a prompt is made from, where the format uses them; rewards are given all others."""
REFUSED = frozenset(
    {
        "tools",
        "functions",
        "tool_calls",
        "function_call",
        "documents",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "chat_template_kwargs",
    }
)
"""Columns and keys of messages that are part of what the model is asked or says, and that no stage can use."""
REFUSED_KEYS = REFUSED | {"reasoning_content", "reasoning", "thinking"}
WEIGHTS = frozenset({"weight", "sample_weight", "loss_weight", "loss_mask"})
"""Columns and keys that say how much is learned of a row or turn: refused where they are not 1."""
WEIGHT_KEYS = WEIGHTS | {"train", "loss"}
MESSAGE_KEYS = {"role", "from", "content", "value"}
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "eval", "test"}
LABELS = ("label", "labels", "kto_tag", "is_chosen", "is_good", "is_safe", "desirable", "feedback")
FLAG = re.compile(
    r"-?[01](\.0)?|true|false|t|f|yes|no|y|n|(un)?desirable|(un)?safe|good|bad|chosen|rejected|positive|negative",
    re.IGNORECASE,
)
"""What a label of unpaired data (KTO) says of an answer."""
KEPT_WITH_PAIRS: dict[str, type | tuple[type, ...]] = {
    "flipped": bool,
    "chosen_score": (int, float),
    "rejected_score": (int, float),
}
"""Columns of our preferences stage, which the reward stage reads; kept where they have these types."""
UNPAIRED = (
    "the rows are unpaired (one answer with a true/false label, as for KTO), which serves for prompts alone: "
    "preferences need chosen and rejected answers to one prompt, instructions an answer that is to be imitated; "
    "drop the column '{label}' if every answer is good, and call it completion if it is the answer itself"
)
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


class Useless(Exception):
    """A row that says nothing about a preference or holds no answer; its text is the reason, counted by `adapt`."""


class BadRow(ValueError):
    """A row that is wrong: `index` among the rows given, from 0, and the `reason`."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"row {index + 1}: {reason}")
        self.index, self.reason = index, reason


@dataclass(frozen=True)
class Format:
    """A format of rows: it fits when all of `needs` are columns; `convert` maps a row to prompt and the answers it has.

    `uses` names the columns that the conversion reads.
    """

    name: str
    needs: frozenset[str]
    gives: frozenset[str]  # of {"completion", "pair"}
    convert: Callable[[Row], Row]
    uses: frozenset[str]
    fits: Callable[[Row], bool] = lambda row: True


@dataclass
class Adapted:
    """Rows in TRL's shape, and what became of the rows given."""

    rows: list[Row] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """The index, among the rows given, of each of `rows`."""
    formats: Counter = field(default_factory=Counter)
    """Rows of each format."""
    dropped: Counter = field(default_factory=Counter)
    """Rows dropped, by reason."""
    repeated: int = 0
    """Kept rows in which an answer in text began with the prompt, which was taken off."""
    contradicted: int = 0
    """Kept rows whose `prompt` is not in the conversation beside it, which was used."""
    unused: list[str] = field(default_factory=list)
    """Columns, and keys of messages ("messages.id"), that are not used."""
    other_prompts: list[Answer] = field(default_factory=list)
    """Prompts of rows that have no answer of the kind asked for, but serve for another kind."""

    @property
    def format(self) -> str:
        """The names of the formats, the commonest first."""
        return " and ".join(name for name, _ in self.formats.most_common())


# ---- fields -------------------------------------------------------------------------------------------------------


def text_field(row: Row, name: str) -> str:
    """The text in `row[name]`, "" where there is none. Raises ValueError if it is something else than text."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' should be text, but is {type(value).__name__}")
    return whole_text(value, name)


def whole_text(value: str, name: str) -> str:
    """The text, if UTF-8 can hold it. Raises ValueError for half an emoji, as cut-off JSON escapes leave one."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field '{name}' has half a character ({value[error.start]!r}); mend or drop it") from None
    return value


def one_text_of(row: Row, names: Sequence[str]) -> str:
    """The text of the one column among `names` that has any, or "". Raises ValueError if two of them say something."""
    said = {name: text for name in names if (text := text_field(row, name)).strip()}
    if len(set(said.values())) > 1:
        raise ValueError(f"fields {' and '.join(map(repr, said))} say two different things; keep one of them")
    return next(iter(said.values()), "")


def messages_field(row: Row, name: str) -> list[Message]:
    """The messages in `row[name]`, from `role`/`content` or ShareGPT's `from`/`value`; none where it is empty.

    A message without content has the content "". Raises ValueError.
    """
    value = row.get(name)
    if value is None:
        return []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError(f"field '{name}' should be a list of messages, but is {type(value).__name__}")
    return [_message(turn, name) for turn in value]


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"field '{name}' should hold messages with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"field '{name}' has the role {role!r}; known are {', '.join(ROLES)}")
    if not turn.keys() <= MESSAGE_KEYS:
        where = f"field '{name}' has a message of {role} with"
        _refuse(turn, sorted(turn.keys() & REFUSED_KEYS), sorted(turn.keys() & WEIGHT_KEYS), where)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_text_part(part, name) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"field '{name}' has a message of {role} without text")
    return {"role": ROLES[role], "content": whole_text(content or "", name)}


def _text_part(part: Any, name: str) -> str:
    """The text of a part of a message in OpenAI's form, {"type": "text", "text": …}."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"field '{name}' has a message with a part of type {kind!r}; only text can be used")
    return part["text"]


def _answer_field(row: Row, name: str) -> Answer:
    """A prompt or answer as it stands: text, or messages. Raises ValueError."""
    if not isinstance(row.get(name), str | list | dict | None):
        raise ValueError(f"field '{name}' should be text or messages, but is {type(row[name]).__name__}")
    if not isinstance(row.get(name), str):
        return messages_field(row, name)
    text = text_field(row, name)
    if WRITTEN_MESSAGES.match(text):
        raise ValueError(
            f"field '{name}' has a list of messages written out as text, as a CSV file makes of one; "
            "keep such rows as .jsonl or .parquet"
        )
    return text


def _refuse(values: Row, refused: Iterable[str], weights: Iterable[str], where: str) -> None:
    """Raise ValueError if one of the names says something that no stage can use."""
    for name in refused:
        if not _is_blank(values[name]):
            raise ValueError(f"{where} '{name}', which no stage can use; take it out, or drop the row")
    for name in weights:
        if not _is_one(values[name]):
            raise ValueError(
                f"{where} '{name}' {values[name]!r}, but every row and turn counts alike here; drop what is not to be "
                f"learned, then the column or key"
            )


def _is_blank(value: Any) -> bool:
    """Whether a value says nothing; "[]" is how a CSV writes an empty list."""
    return value is None or value in ([], {}, ()) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def _is_one(value: Any) -> bool:
    return _is_blank(value) or str(value).strip().lower() in ("1", "1.0", "true")


def shown(names: Iterable[object]) -> str:
    """Names for a sentence, which half a character must not keep from being printed."""
    return ", ".join(map(str, names)).encode("utf-8", "backslashreplace").decode()


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


def text_of(answer: Answer) -> str:
    """The bare text of a prompt or answer: itself, or the contents of its messages."""
    return answer if isinstance(answer, str) else "\n".join(message["content"] for message in answer)


def answer_to(prompt: Answer, text: str) -> Answer:
    """A sampled text in the form of its prompt: text, or one message of the assistant."""
    return text if isinstance(prompt, str) else assistant(text)


# ---- conversions, one a format: the prompt and the answers as they stand, empty where they are missing ---------------


def from_instruction(row: Row) -> Row:
    """Alpaca, Dolly and rasbt's preference set: instruction, input or context (may be empty), output or response
    and/or chosen and rejected."""
    extra = one_text_of(row, ("input", "context"))
    instruction = text_field(row, "instruction")
    asked = instruction + (f"\n\n{extra}" if extra.strip() else "") if instruction.strip() else ""
    made: Row = {"prompt": user(asked)}
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return made | {"chosen": _answer_field(row, "chosen"), "rejected": _answer_field(row, "rejected")}
    if row.get("output") is None and row.get("response") is None:
        return made
    return made | {"completion": assistant(one_text_of(row, ("output", "response")))}


def from_transcripts(row: Row) -> Row:
    """hh-rlhf: `chosen` and `rejected` are transcripts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns."""
    return {"prompt": [], **{name: transcript(text_field(row, name)) for name in ("chosen", "rejected")}}


def transcript(text: str) -> list[Message]:
    """The messages of a hh-rlhf transcript; an empty last turn stays, as an empty message. Raises Useless."""
    if not text.strip():
        return []
    head, *turns = TRANSCRIPT_TURN.split(text if text.startswith("\n\n") else f"\n\n{text.lstrip()}")
    if head.strip() or not turns:
        raise Useless("no prompt, and no transcript that begins with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def from_pair(row: Row, prompt: str = "prompt") -> Row:
    """TRL's and UltraFeedback's pairs: the prompt (may be missing) as text or messages; chosen and rejected as text, as
    the answer's messages, or as whole conversations."""
    return {"prompt": _answer_field(row, prompt), **{name: _answer_field(row, name) for name in ("chosen", "rejected")}}


def from_text_pair(row: Row) -> Row:
    """Prompt, chosen and rejected in plain text, as in TL;DR's comparisons: they stay text, but for whole transcripts
    beside a prompt that is the bare question."""
    made = {name: text_field(row, name) for name in ("prompt", "chosen", "rejected")}
    answers = [made["chosen"], made["rejected"]]
    if all(re.match(r"\s*Human:", text) and "\n\nAssistant:" in text for text in answers) and not any(
        after_prompt(made["prompt"], text) for text in answers
    ):
        return from_transcripts(row) | {"prompt": made["prompt"]}
    return made


def from_llmbar(row: Row) -> Row:
    """LLMBar: input, output_1, output_2 and the number of the better one in `label`."""
    label = str(row.get("label")).removesuffix(".0")
    if label not in ("1", "2"):
        raise ValueError(f"field 'label' should be 1 or 2, but is {label}")
    chosen, rejected = text_field(row, f"output_{label}"), text_field(row, f"output_{3 - int(label)}")
    return {"prompt": user(text_field(row, "input")), "chosen": assistant(chosen), "rejected": assistant(rejected)}


def from_tldr_comparison(row: Row) -> Row:
    """OpenAI's summarize_from_feedback: a post in `info`, two `summaries`, the index of the better in `choice`."""
    info, summaries, choice = row.get("info"), row.get("summaries") or [], row.get("choice")
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(part, dict) for part in summaries)
    if not isinstance(info, dict) or not two or choice not in (0, 1):
        raise ValueError("fields 'info', 'summaries' and 'choice' should hold a post, two summaries and 0 or 1")
    post = text_field(info, "post") or text_field(info, "article")
    if not post.strip():
        raise Useless("empty prompt")
    heading = "".join(f"{name.upper()}: {info[name]}\n\n" for name in ("subreddit", "title") if info.get(name))
    better, worse = (text_field(summaries[index], "text").strip() for index in (choice, 1 - choice))
    return {"prompt": f"{heading}POST: {post}\n\nTL;DR:", "chosen": f" {better}", "rejected": f" {worse}"}


def from_prompt_completion(row: Row) -> Row:
    """TRL's prompt and completion, each as text or as messages."""
    return {"prompt": _answer_field(row, "prompt"), "completion": _answer_field(row, "completion")}


def from_tldr(row: Row) -> Row:
    """TL;DR's demonstrations: the post in `prompt`, the summary in `label`."""
    return {"prompt": text_field(row, "prompt"), "completion": f" {text_field(row, 'label').strip()}"}


def from_messages(row: Row, name: str = "messages") -> Row:
    """A conversation, which holds an answer if its last turn is the assistant's. A `prompt` beside it is its first turn
    (UltraChat), or what comes before it."""
    prompt, messages = _answer_field(row, "prompt"), messages_field(row, name)
    if messages and messages[-1]["role"] == "assistant":
        return {"prompt": prompt, "completion": messages}
    return {"prompt": joined(prompt, messages)}


def from_question(row: Row) -> Row:
    """GSM8K: a question and its worked answer; as a prompt, the answer goes to the rewards."""
    return {"prompt": user(text_field(row, "question")), "completion": assistant(text_field(row, "answer"))}


def from_prompt(row: Row) -> Row:
    return {"prompt": _answer_field(row, "prompt")}


# ---- what holds for every format ------------------------------------------------------------------------------------


def finish(made: Row, row: Row, *, answers_repeat_prompts: bool = False) -> Row:
    """A converted row as prompt and last answers, the context of `row` in the prompt and the prompt standing once.

    `answers_repeat_prompts`: that is the custom of the file, so that an answer which begins with its prompt is no
    accident however short the prompt is. Raises Useless.
    """
    names = [name for name in ANSWERS if name in made]
    prompt, answers = made["prompt"], [made[name] for name in names]
    if all(isinstance(text, str) for text in (prompt, *answers)):
        if not prompt.strip():
            raise Useless("empty prompt")
        prompt, answers = last_text_turns(prompt, without_prompt(prompt, answers, answers_repeat_prompts))
    elif answers:
        prompt, answers = last_turns(prompt, [_as_answer(answer) for answer in answers])
    prompt = with_context(prompt, row)
    if not all(text_of(answer).strip() for answer in answers):
        raise Useless("empty reply")
    if not isinstance(prompt, str) and not _all_say_something(prompt):
        raise Useless("empty prompt")
    if len(answers) == 2 and answers[0] == answers[1]:
        raise Useless("equal replies")
    return {"prompt": prompt, **dict(zip(names, answers, strict=True))}


def _as_answer(answer: Answer) -> list[Message]:
    if not isinstance(answer, str):
        return answer
    return assistant(answer) if answer.strip() else []


def _all_say_something(prompt: list[Message]) -> bool:
    """Whether there is a prompt and every turn of it has text; an empty system message is one that says nothing."""
    spoken = [message for message in prompt if message["role"] != "system"]
    return bool(spoken) and all(message["content"].strip() for message in spoken)


def last_turns(prompt: Answer, answers: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The last turn of each answer, the assistant's, and the prompt with the turns before it, which all answers must
    share. Raises Useless."""
    if not all(answers):
        raise Useless("empty reply")
    whole = [joined(prompt, answer) for answer in answers]
    if any(talk[-1]["role"] != "assistant" for talk in whole):
        raise Useless("no reply by the assistant")
    first = whole[0][:-1]
    if not all(_same_turns(first, talk[:-1]) for talk in whole):
        raise Useless("no shared prompt")
    if not first:
        raise Useless("empty prompt" if len(answers) == 1 else "no shared prompt")
    return first, [talk[-1:] for talk in whole]


def joined(prompt: Answer, turns: list[Message]) -> list[Message]:
    """One conversation of a prompt and the turns beside it, which may go on after it, repeat it, or hold all of it.

    A prompt in text is the user's first turn, unless the turns have one. Raises Useless where a prompt of several
    messages and the turns contradict each other.
    """
    if isinstance(prompt, str):
        if not prompt.strip() or holds_its_own_prompt(turns):
            return turns
        head = [turn for turn in turns[:1] if turn["role"] == "system"]
        return [*head, *user(prompt), *turns[len(head) :]]
    if not prompt or not turns:
        return turns or prompt
    if turns[0]["role"] == "assistant" and prompt[-1]["role"] != "assistant":
        return [*prompt, *turns]
    for count in range(min(len(prompt), len(turns)), 0, -1):
        if _same_turns(prompt[-count:], turns[:count]):
            return [*prompt, *turns[count:]]
    rest = iter(turns)
    if all(any(_same_turns([turn], [other]) for other in rest) for turn in prompt):  # each of them, in this order
        return turns
    if turns[0]["role"] == "system":
        raise Useless("the prompt is not in the conversation")
    return [*prompt, *turns]


def holds_its_own_prompt(turns: list[Message]) -> bool:
    """Whether the user speaks before the assistant does."""
    return next((turn["role"] == "user" for turn in turns if turn["role"] != "system"), False)


def contradicts(made: Row) -> bool:
    """Whether a prompt in text stands beside conversations that begin with something else, and is not used."""
    prompt, answers = made["prompt"], [made[name] for name in ANSWERS if name in made]
    return (
        isinstance(prompt, str)
        and bool(prompt.strip())
        and any(
            isinstance(turns, list)
            and holds_its_own_prompt(turns)
            and not any(turn["content"].strip() == prompt.strip() for turn in turns)
            for turns in answers
        )
    )


def _same_turns(some: list[Message], others: list[Message]) -> bool:
    """Whether two conversations say the same, but for blanks around the turns."""
    return len(some) == len(others) and all(
        one["role"] == other["role"] and one["content"].strip() == other["content"].strip()
        for one, other in zip(some, others, strict=True)
    )


def after_prompt(prompt: str, answer: str) -> str | None:
    """What follows the prompt in an answer that begins with the whole of it, so that prompt + rest is the text that
    stood there; None where it does not. Blanks around the prompt may differ."""
    bare, said = prompt.strip(), answer.lstrip()
    if not said.startswith(bare):
        return None
    rest = said[len(bare) :]
    if bare[-1:].isalnum() and rest[:1].strip():  # 'Hello' and 'Hello, …': a word that both begin with
        return None
    space = prompt[len(prompt.rstrip()) :]
    return rest.removeprefix(space) if rest.startswith(space) else rest.lstrip()


def without_prompt(prompt: str, answers: list[str], certain: bool) -> list[str]:
    """The answers without a prompt that they begin with.

    One that begins with a short prompt may do so by accident ("Hi" and "Hi there"): then it is only taken off if all
    answers of the row begin with it, or if that is `certain`.
    """
    rests = [after_prompt(prompt, answer) for answer in answers]
    bare = prompt.strip()
    certain = certain or (len(rests) > 1 and all(rests))
    long = len(bare.split()) > 2 or bare[-1:] in (":", "=") or "\n" in bare
    return [
        rest if rest is not None and (certain or (long and rest.strip())) else answer
        for rest, answer in zip(rests, answers, strict=True)
    ]


def last_text_turns(prompt: str, answers: list[str]) -> tuple[str, list[str]]:
    """As `last_turns`, of text in which hh-rlhf's marks tell the turns. Raises Useless."""
    if not answers or "\n\nAssistant:" not in prompt or not any(TRANSCRIPT_TURN.search(a) for a in answers):
        return prompt, answers
    parts = [answer.rpartition("\n\nAssistant:") for answer in answers]
    if any("\n\nHuman:" in last for _, _, last in parts):
        raise Useless("no reply by the assistant")
    earlier, mark, _ = parts[0]
    if any(part[0] != earlier for part in parts):
        raise Useless("no shared prompt")
    return prompt + earlier + mark, [last for _, _, last in parts]


def with_context(prompt: Answer, row: Row) -> Answer:
    """The prompt with the row's system message and earlier turns. Raises ValueError where it has no place for them."""
    if row.keys().isdisjoint(CONTEXT):
        return prompt
    system, history = one_text_of(row, SYSTEM), row.get("history")
    if not system.strip() and _is_blank(history):
        return prompt
    if isinstance(prompt, str):
        name = next(name for name in CONTEXT if not _is_blank(row.get(name)))
        raise ValueError(
            f"field '{name}' stands beside a prompt in plain text, which has no place for it; "
            "write it into the prompt, or give the prompt as messages"
        )
    head = [message for message in prompt[:1] if message["role"] == "system" and message["content"].strip()]
    if head and system.strip() and head[0]["content"].strip() != system.strip():
        raise ValueError("the system message of the conversation and the column beside it differ; keep one of them")
    if system.strip() and not head:
        head = [{"role": "system", "content": system}]
    spoken = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    return [*head, *(_earlier_turns(history) if not _is_blank(history) else []), *spoken]


def _earlier_turns(history: Any) -> list[Message]:
    """The turns of Alpaca's `history`, a list of [question, answer], or of messages."""
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return messages_field({"history": history}, "history")
    turns: list[Message] = []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise ValueError("field 'history' should be a list of [question, answer] in text, or of messages")
        turns += user(whole_text(turn[0], "history")) + assistant(whole_text(turn[1], "history"))
    return turns


# ---- the formats ----------------------------------------------------------------------------------------------------


def is_text(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def is_tldr(row: Row) -> bool:
    """Whether the label is a summary: of any other prompt it is what a labeller says."""
    return is_text("prompt", "label")(row) and row["prompt"].rstrip().endswith("TL;DR:")


def _format(name: str, needs: str, gives: str, convert: Callable[[Row], Row], also: str = "", **options) -> Format:
    """A Format from lists of columns in words; `also` are columns it uses where they are there."""
    needed = frozenset(needs.split())
    return Format(name, needed, frozenset(gives.split()), convert, needed | frozenset(also.split()), **options)


# The first that fits is taken: a format that needs more columns stands before one that needs fewer of them.
FORMATS: tuple[Format, ...] = (
    _format(
        "instruction preferences",
        "instruction chosen rejected",
        "pair",
        from_instruction,
        also="input context output response",
    ),
    _format("alpaca", "instruction output", "completion", from_instruction, also="input context"),
    _format("dolly", "instruction response", "completion", from_instruction, also="input context"),
    _format(
        "sharegpt preferences", "conversations chosen rejected", "pair", lambda row: from_pair(row, "conversations")
    ),
    _format("sharegpt", "conversations", "completion", lambda row: from_messages(row, "conversations"), also="prompt"),
    _format("llmbar", "input output_1 output_2 label", "pair", from_llmbar),
    _format("tl;dr comparisons", "info summaries choice", "pair", from_tldr_comparison),
    _format(
        "text preferences",
        "prompt chosen rejected",
        "pair",
        from_text_pair,
        fits=is_text("prompt", "chosen", "rejected"),
    ),
    _format("message preferences", "prompt chosen rejected", "pair", from_pair, also="messages"),
    _format("hh-rlhf transcripts", "chosen rejected", "pair", from_transcripts, fits=is_text("chosen", "rejected")),
    _format("message preferences", "chosen rejected", "pair", from_pair, also="messages"),
    _format("prompt and completion", "prompt completion", "completion", from_prompt_completion),
    _format("tl;dr", "prompt label", "completion", from_tldr, fits=is_tldr),
    _format("messages", "messages", "completion", from_messages, also="prompt"),
    _format("question and answer", "question answer", "completion", from_question),
    _format("prompt", "prompt", "", from_prompt),
    _format("instruction", "instruction", "", from_instruction, also="input context"),
)


def recognise(row: Row) -> Format | None:
    """The format of the columns in which `row` has a value, or None."""
    columns = {name for name, value in row.items() if value is not None}
    return next((form for form in FORMATS if form.needs <= columns and form.fits(row)), None)


# ---- the one entrance -----------------------------------------------------------------------------------------------


def adapt(rows: Iterable[Row], kind: Kind) -> Adapted:
    """Rows of known formats as TRL rows of `kind`.

    A preference row serves as an instruction too (its chosen answer is the completion), and any row as a prompt.
    Raises ValueError naming the columns found and needed, and BadRow for a row that is wrong.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadRow(index, f"should be an object with named fields, but is {type(row).__name__}")
    forms = _formats_of(rows)
    _check_useful(rows, {form.name: form for form in forms if form}, kind)
    result = Adapted(formats=Counter(form.name for form in forms if form))
    converted = [_converted(index, row, form, kind) for index, (row, form) in enumerate(zip(rows, forms, strict=True))]
    custom = _answers_repeat_prompts([made for made in converted if isinstance(made, dict)])
    for index, made in enumerate(converted):
        try:
            if isinstance(made, Useless):
                raise made
            whole = finish(made, rows[index], answers_repeat_prompts=custom)
            _keep(result, index, whole, kind)
            same_text = isinstance(made["prompt"], str) and made["prompt"] == whole["prompt"]
            result.repeated += same_text and any(made[name] != whole[name] for name in ANSWERS if name in whole)
            result.contradicted += contradicts(made)
        except Useless as reason:
            result.dropped[str(reason)] += 1
        except ValueError as error:
            raise BadRow(index, str(error)) from None
    result.unused = _complete(result, rows, [form for form in dict.fromkeys(forms) if form], kind)
    return result


def _formats_of(rows: list[Row]) -> list[Format | None]:
    """The format of each row; rows of the same columns and types have the same one."""
    known: dict[tuple, Format | None] = {}
    forms = []
    for row in rows:
        look = tuple([(name, type(value)) for name, value in row.items()])
        if look not in known:
            known[look] = recognise(row)
        forms.append(known[look])
    return forms


def _check_useful(rows: list[Row], forms: dict[str, Format], kind: Kind) -> None:
    """Raise ValueError if no row has what `kind` needs, or the answers are labelled good and bad."""
    useful = {"instructions": {"completion", "pair"}, "prompts": set(), "preferences": {"pair"}}[kind]
    gives = set().union(*(form.gives for form in forms.values()))
    splits = {str(row["split"]).lower() for row in rows if row.get("split")} & SPLITS
    if len(splits) > 1:
        raise ValueError(
            f"the column 'split' says {' and '.join(sorted(splits))}, which is not looked at; write one file for each, "
            "named for it (train.jsonl, test.jsonl), or drop the column"
        )
    label = next((name for name in LABELS if _has_flags(rows, name)), None)
    if kind != "prompts" and label and "pair" not in gives:
        raise ValueError(UNPAIRED.format(label=label))
    if not forms or (useful and not gives & useful):
        found = shown(rows[0]) or "none"
        known = ", ".join(dict.fromkeys(form.name for form in FORMATS if not useful or form.gives & useful))
        raise ValueError(f"the columns are {found}, but {kind} need {NEEDS[kind]} (formats known: {known})")


def _has_flags(rows: list[Row], name: str) -> bool:
    """Whether all there is in a column are words for good and bad."""
    values = [value for row in rows if not _is_blank(value := row.get(name))]
    return bool(values) and all(
        isinstance(value, bool | int | float | str) and FLAG.fullmatch(str(value).strip()) for value in values
    )


def _converted(index: int, row: Row, form: Format | None, kind: Kind) -> Row | Useless:
    """The row as its format reads it, or why it is of no use. Raises BadRow."""
    if form is None:
        return Useless("no columns of a known format")
    try:
        refused, weights = row.keys() & REFUSED, row.keys() & WEIGHTS
        if kind == "prompts":
            weights = set()  # a reward may want them
        else:
            refused |= {name for name in ASKED_BESIDE if name in row and name not in form.uses}
        _refuse(row, sorted(refused), sorted(weights), "the row has")
        return form.convert(row)
    except Useless as reason:
        return reason
    except ValueError as error:
        raise BadRow(index, str(error)) from None


def _answers_repeat_prompts(made: list[Row]) -> bool:
    """Whether most answers in text begin with their prompt: then that is how the file is written."""
    answers = [
        (row["prompt"], row[name])
        for row in made
        for name in ANSWERS
        if isinstance(row.get(name), str) and isinstance(row["prompt"], str) and row["prompt"].strip()
    ]
    return 2 * sum(after_prompt(*pair) is not None for pair in answers) > len(answers)


def _keep(result: Adapted, index: int, made: Row, kind: Kind) -> None:
    """Add a row in the shape of `kind`. Raises Useless where it has no answer, ValueError for text beside messages."""
    prompt = made["prompt"]
    if result.rows and type(prompt) is not type(result.rows[0]["prompt"]):
        raise ValueError("field 'prompt' is text in one row and messages in another")
    if kind == "prompts":
        row = {"prompt": prompt}
    elif kind == "instructions" and (answer := made.get("completion", made.get("chosen"))):
        row = {"prompt": prompt, "completion": answer}
    elif kind == "preferences" and "chosen" in made:
        row = made
    else:
        result.other_prompts.append(prompt)
        raise Useless("no reply by the assistant" if kind == "instructions" else "no pair of replies")
    result.rows.append(row)
    result.kept.append(index)


def _complete(result: Adapted, rows: list[Row], forms: list[Format], kind: Kind) -> list[str]:
    """Give each kept row the columns beside it, None where it lacks one; returns the names of what is not used."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    uses = {*CONTEXT}.union(*(form.uses for form in forms))
    if kind == "prompts":
        asking = {*ASKING, *CONTEXT} & uses
        if any("completion" in form.gives for form in forms) and _all_are(rows, "label", bool):
            asking.add("label")  # of KTO: it judges the answer that stands there, not one that will be sampled
        beside = [name for name in columns if name not in asking]
    elif kind == "preferences":
        kept = [rows[index] for index in result.kept]
        beside = [name for name, types in KEPT_WITH_PAIRS.items() if name in columns and _all_are(kept, name, types)]
    else:
        beside = []
    for index, made in zip(result.kept, result.rows, strict=True):
        made.update((name, rows[index].get(name)) for name in beside)
        if kind == "preferences":  # no integer is too large for a float
            made.update((name, float(made[name])) for name in beside if type(made[name]) is int)
        if made.get("flipped", False) is None and kind == "preferences":  # a pair without the mark is not marked
            made["flipped"] = False
    return [name for name in columns if name not in uses and name not in beside] + _unused_keys(rows, uses)


def _all_are(rows: list[Row], name: str, types: type | tuple[type, ...]) -> bool:
    return all(row.get(name) is None or isinstance(row[name], types) for row in rows)


def _unused_keys(rows: list[Row], uses: set[str]) -> list[str]:
    """Keys of messages that say something and are not used, as "messages.name"."""
    found: dict[str, None] = {}
    for name in sorted(uses & {"prompt", "messages", "conversations", *ANSWERS}):
        for row in rows:
            turns = row.get(name)
            for turn in turns if isinstance(turns, list) else [turns]:
                if isinstance(turn, dict) and (others := turn.keys() - MESSAGE_KEYS):
                    found.update((f"{name}.{key}", None) for key in sorted(others) if not _is_blank(turn[key]))
    return list(found)
