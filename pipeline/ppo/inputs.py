"""What `PPOTrainer` is given from Python, looked at before any work: rows in their usual shapes, and arguments of the
right kind; every other thing is a sentence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.bounds import check_bounds
from pipeline.errors import UserError
from pipeline.ppo.config import PPOConfig


def check_kinds(
    policy: Any, reference: Any, critic: Any, args: Any, processing_class: Any, gold: Any, callbacks: Any
) -> list[Callable]:
    """Raise UserError for an argument of another kind than PPOTrainer takes; returns the callbacks as a list."""
    if not isinstance(args, PPOConfig):
        hint = "PPOConfig(**args)" if isinstance(args, dict) else "a PPOConfig"
        raise UserError(f"args is a {_kind(args)}; pass {hint}")
    check_bounds(args)
    for name, model in (("policy", policy), ("reference", reference), ("critic", critic)):
        if not isinstance(model, nn.Module) and not (model is None and name != "policy"):
            opener = "load_critic" if name == "critic" else "load_policy"
            raise UserError(
                f"{name} is a {_kind(model)}; pass a model ({opener} of pipeline.model.load opens a folder)"
            )
    if processing_class is None:
        raise UserError("processing_class is missing; pass the policy's tokenizer")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise UserError(
            f"processing_class is a {_kind(processing_class)}; pass the policy's tokenizer (load_tokenizer of "
            "pipeline.text.tokenizer opens a folder)"
        )
    if gold is not None and (isinstance(gold, type) or not callable(gold)):
        raise UserError(f"gold is a {_kind(gold)}; pass a function like a reward (load_function opens it by name)")
    called = [callbacks] if callable(callbacks) else list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    if not all(callable(callback) and not isinstance(callback, type) for callback in called):
        raise UserError("callbacks: pass functions of the trainer and its metrics")
    return called


def as_rows(given: Any, column: str, name: str) -> Any:
    """Rows that are dictionaries with one set of keys, from what `name` was given; a Dataset stays as it is.

    Taken are a Dataset (or anything with a length and rows by number), a list of dictionaries, of texts or of
    conversations, which become `column`, a dictionary of lists, a pandas DataFrame, and a DatasetDict of one split.
    Raises UserError for anything else, and where nothing is there.
    """
    if given is None:
        raise UserError(f"{name} is missing; give it rows with a column {column!r}")
    if isinstance(given, Mapping):
        given = _of_mapping(given, name)
    if hasattr(given, "to_dict") and hasattr(given, "iloc"):  # pandas: a table, or one column
        table = given.to_frame(column) if not hasattr(given, "columns") else given
        given = table.astype(object).where(table.notna(), None).to_dict("records")
    for method in ("to_pylist", "to_dicts"):  # tables of pyarrow and polars
        given = getattr(given, method)() if hasattr(given, method) else given
    if isinstance(given, str | bytes) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise UserError(f"{name} is a {_kind(given)}; give a list of rows or a Dataset that is not streamed")
    if len(given) == 0:
        raise UserError(f"{name} has no rows; give it at least one {column}")
    rows = _filled_up(given, column, name) if _is_plain(given) else given
    if not isinstance(rows[0], Mapping):
        raise UserError(f"{name}, row 0 is a {_kind(rows[0])}; give dictionaries with a column {column!r}, or texts")
    if wrong := [key for key in rows[0] if not isinstance(key, str)]:
        raise UserError(f"{name} has a column called {wrong[0]!r}, which is no text; rename it")
    if column not in rows[0]:
        raise UserError(f"{name} has no column {column!r} but {', '.join(map(repr, rows[0]))}; rename the column")
    return rows


def _is_plain(given: Any) -> bool:
    """A list, a tuple or an array of NumPy, of which each row can be looked at."""
    return isinstance(given, list | tuple) or type(given).__module__ == "numpy"


def _of_mapping(given: Mapping, name: str) -> Any:
    """The only split of a DatasetDict, or the rows of a dictionary of lists."""
    if not given:
        raise UserError(f"{name} is an empty {_kind(given)}; give it rows")
    values = list(given.values())
    if all(hasattr(value, "column_names") or hasattr(value, "iloc") for value in values):
        if len(values) > 1:
            splits = ", ".join(map(repr, given))
            raise UserError(f"{name} has the splits {splits}; pass one of them, such as data[{next(iter(given))!r}]")
        return values[0]
    for key, value in given.items():
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
            raise UserError(f"{name}: {key!r} is a {_kind(value)}; give a list for each column, or a list of rows")
        if len(value) != len(values[0]):
            first = next(iter(given))
            raise UserError(
                f"{name}: the column {key!r} has {len(value)} entries and {first!r} has {len(values[0])}; they must "
                "be as many"
            )
    return [dict(zip(given, row, strict=True)) for row in zip(*values, strict=True)]


def _filled_up(given: Sequence[Any], column: str, name: str) -> list[dict[str, Any]]:
    """A list's rows as dictionaries that all have the same keys, None where a row lacks one."""
    rows = [row if isinstance(row, Mapping) else {column: row} for row in given]
    mixed = {isinstance(row, Mapping) for row in given}
    if len(mixed) > 1:
        raise UserError(f"{name} mixes dictionaries and {_kind(next(r for r in given if not isinstance(r, Mapping)))}s")
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in names} for row in rows]


def as_list(given: Any, name: str) -> list[Any]:
    """What `PPOTrainer.step` is given, one thing an answer, as a list."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise UserError(f"step: {name} is a {_kind(given)}; give a list with one entry for each answer")
    return list(given)


def as_numbers(given: Any, name: str) -> list[float]:
    """Scores as numbers; UserError with the row for what is none."""
    numbers = []
    for i, value in enumerate(as_list(given, name)):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            raise UserError(f"step, row {i}: {_short(value)} in {name} is not a number") from None
    return numbers


def check_prompts(prompts: Sequence[Any], name: str) -> None:
    """Raise UserError with the row for a prompt that is neither text nor messages, or where both occur."""
    for i, prompt in enumerate(prompts):
        where = f"{name}, row {i}"
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            raise UserError(f"{where}: some prompts are text and some are messages; give all in one way")
        if isinstance(prompt, str):
            _check_text(prompt, where)
            continue
        if not isinstance(prompt, list) or not prompt:
            raise UserError(f"{where}: the prompt is {_short(prompt)}; give text or a list of messages")
        for message in prompt:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UserError(f"{where}: {_short(message)} is no message; give it a role and a content")
            if not isinstance(message["content"], str):
                raise UserError(f"{where}: the content {_short(message['content'])} is not text")
            _check_text(message["content"], where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text[error.start]!r} is half of a character, which no tokenizer reads") from None


def _kind(value: Any) -> str:
    return "None" if value is None else value.__name__ if isinstance(value, type) else type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
