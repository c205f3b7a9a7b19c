"""Where rewards come from: reward models with their own tokenizers, Python functions, ensembles, weighted sums.

A reward is any `f(prompts, completions, **columns) -> list[float]`. Prompts and completions come as in the data set,
text or lists of messages; the set's other columns come by name. Each reward gets copies of its own, so that none reads
what another one did to them. No token ids cross this border, so a reward model may have another tokenizer and chat
template than the policy.
"""

import copy
import importlib
import inspect
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.model.hardware import use_bf16
from pipeline.model.load import fit_embeddings, keep_products_in_bf16, load_reward
from pipeline.model.shared import reward_on
from pipeline.text.lengths import Reader, positions_of
from pipeline.text.tokenizer import load_tokenizer, scored_ids
from reward_data.formats import text_of

log = logging.getLogger(__name__)
RewardFunction = Callable[..., list[float]]
Combine = Literal["mean", "min", "uwo"]
PAUSES = (1.0, 5.0)
"""Seconds before a reward that failed is asked again, as a judge behind a network is up again a little later."""
MISTAKES = (TypeError, LookupError, AttributeError, NameError, ArithmeticError, AssertionError, ImportError, SystemExit)
"""What is a mistake in the reward's code and fails again at once."""
QUICK = 1.0
"""Seconds: the row is looked for only in a reward that fails sooner than this."""


class RewardModel:
    """A sequence classifier with one label as a reward: text in, score out.

    A conversation is rendered by the model's own chat template; plain text is prompt + completion + its end token, as
    TRL's RewardTrainer trains it. The score is read at the last real token, found by length. If config.json has
    `reward_mean` and `reward_std`, the score is (r − mean)/std.

    context  the most tokens that it reads; None: any number. A row that has more loses the beginning of its prompt, but
             none of the special tokens that the tokenizer puts around it (BERT's score is read at the first of them);
             `cut_rows` counts them, and a warning tells of them
    """

    def __init__(
        self,
        path: str,
        device: torch.device | str | None = None,
        mixed_precision: str = "auto",
        batch_size: int = 64,
        base: PreTrainedModel | None = None,
    ) -> None:
        self.path, self.batch_size = str(path), batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = use_bf16(mixed_precision)
        self.tokenizer = load_tokenizer(path)
        model = load_reward(path) if base is None else reward_on(base, path)
        self.model = cast(Any, model).to(self.device).requires_grad_(False)
        config = self.model.config
        if config.num_labels != 1:
            raise UserError(f"{path} is a classifier with {config.num_labels} labels; a reward needs one")
        fit_embeddings(self.model, self.tokenizer, self.path)
        if self.bf16 and base is None:  # a base that is given is others' too
            keep_products_in_bf16(self.model)
        self.mean, self.std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in (self.mean, self.std)) or self.std <= 0:
            raise UserError(
                f"{path}: reward_mean {self.mean!r} and reward_std {self.std!r} in config.json must be finite numbers, "
                "the second above 0; train the reward model again"
            )
        self.context, self.cut_rows = self._context(), 0

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list) -> list[float]:
        """One score a row."""
        rows = self._encode(prompts, completions)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for i, score in zip(chosen, self._forward([rows[i] for i in chosen]).tolist(), strict=True):
                scores[i] = (score - self.mean) / self.std
        return scores

    @property
    def reader(self) -> Reader:
        """This model as one that reads prompts: rows without their answers."""

        def encode(prompts: list[Any], places: Sequence[str]) -> list[list[int]]:
            return scored_ids(self.tokenizer, prompts, [""] * len(prompts), places)

        return Reader(f"the reward model {self.path}", self.context, encode)

    def _context(self) -> int | None:
        """What the model can read, or less where its tokenizer says so; special tokens count."""
        limits = [positions_of(self.model), self.tokenizer.model_max_length]
        known = [int(limit) for limit in limits if limit is not None and limit < 10**9]  # without one, 10**30 is named
        return min(known, default=None)

    def _encode(self, prompts: list[Any], completions: list[Any]) -> list[list[int]]:
        rows = scored_ids(self.tokenizer, prompts, completions)
        for i, row in enumerate(rows):
            if self.context is not None and len(row) > self.context:
                # Where a bidirectional model's score is read, or what a decoder's attention rests on
                head = row[:1] if row[0] in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id) else []
                rows[i] = head + row[len(row) - self.context + len(head) :]
                self.cut_rows += 1
                if math.log10(self.cut_rows).is_integer():  # the first, the tenth, the hundredth, …
                    log.warning(
                        f"the reward model {self.path} reads {self.context} tokens: longer rows ({self.cut_rows} so "
                        "far) were scored without the beginning of their prompts; shorten prompts or answers"
                    )
        return rows

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.tokenizer.pad_token_id).to(self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if not isinstance(getattr(self.model, "score", None), nn.Linear):
                return self.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        return self.model.score(last.float()).squeeze(-1)


class Ensemble:
    """Several rewards for the same thing as one, so that what a single one is wrong about earns less (2310.02743).

        mean: the mean over members;    min: the lowest of them;    uwo: mean − uwo_coef · variance

    The variance is that of the members on one answer, divided by their number. Members should be on one scale, as
    reward models with `reward_mean` and `reward_std` are.
    """

    def __init__(self, members: Sequence[RewardFunction], combine: Combine = "mean", uwo_coef: float = 0.1) -> None:
        if len(members) < 2:
            raise UserError(f"an ensemble needs at least two rewards, not {len(members)}")
        if combine not in ("mean", "min", "uwo"):
            raise UserError(f"reward_ensemble: {combine!r} is none of mean, min, uwo")
        self.members, self.combine, self.uwo_coef = list(members), combine, uwo_coef

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list) -> list[float]:
        """One score a row; UserError names the member and the row that went wrong."""
        rows = [checked(name_of(member), member, prompts, completions, columns) for member in self.members]
        scores = torch.tensor(rows, dtype=torch.double)  # (members, rows)
        if self.combine == "min":
            return scores.amin(0).tolist()
        mean = scores.mean(0)
        if self.combine == "uwo":
            mean = mean - self.uwo_coef * scores.var(0, correction=0)
        return mean.tolist()


class WeightedRewards:
    """Σ weight · reward, each source checked: it must not raise and must give one finite number a row."""

    def __init__(self, sources: Sequence[tuple[str, RewardFunction, float]]) -> None:
        self.sources = list(sources)

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list) -> list[float]:
        """The weighted sum for each row; UserError names the source and the row that went wrong."""
        totals = [0.0] * len(prompts)
        for name, function, weight in self.sources:
            for i, value in enumerate(checked(name, function, prompts, completions, columns)):
                totals[i] += weight * value
        return totals


def checked(
    name: str, function: RewardFunction, prompts: list[Any], completions: list[Any], columns: dict[str, list]
) -> list[float]:
    """Call a reward with copies of what it scores and check what comes back.

    Where it raises, it is asked again after each of PAUSES, but not for one of MISTAKES. Raises UserError with the row.
    """
    batch = _Batch(name, function, prompts, completions, columns)
    values = _answered(batch)
    # A dictionary would be scored by its keys, a text by its letters; a set has no order
    if isinstance(values, dict | str | bytes | set | frozenset) or not hasattr(values, "__iter__"):
        raise UserError(f"reward {name} returned {_short(values)} instead of a list of numbers; return one a row")
    values = values if isinstance(values, list) else list(values)
    if len(values) != len(prompts):
        raise UserError(f"reward {name} returned {len(values)} values for {len(prompts)} rows; return one a row")
    return [_number(value, i, name, prompts, completions) for i, value in enumerate(values)]


@dataclass
class _Batch:
    """A reward and what it is to score."""

    name: str
    function: RewardFunction
    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list]

    def score(self, start: int = 0, end: int | None = None) -> Any:
        """What the reward returns for a run of rows; a generator's values as a list, for it fails while it is read."""
        given = [_copies(part[start:end]) for part in (self.prompts, self.completions, *self.columns.values())]
        values = self.function(given[0], given[1], **dict(zip(self.columns, given[2:], strict=True)))
        return list(values) if isinstance(values, Iterator) else values


def _copies(values: list[Any]) -> list[Any]:
    """Each entry copied on its own: one prompt may stand in several rows."""
    return [copy.deepcopy(value) if isinstance(value, list | dict) else value for value in values]


def _answered(batch: _Batch) -> Any:
    """What a reward returns, tried up to 1 + len(PAUSES) times. Raises UserError with the row that it fails on.

    A model of ours is asked once: what fails in it has nothing to wait for.
    """
    pauses = () if isinstance(batch.function, RewardModel) else PAUSES
    for pause in (*pauses, None):
        start = time.perf_counter()
        try:
            return batch.score()
        except UserError:
            raise  # a member of an ensemble, which has named its row
        except (Exception, SystemExit) as error:  # any at all: the function is the user's
            said = f"reward {batch.name} raised {type(error).__name__}: {error}"
            if pause is None or isinstance(error, MISTAKES):
                quick = time.perf_counter() - start < QUICK and not isinstance(error, OSError)
                where = _failing_row(batch) if quick else _row_range(batch)
                tries = f" after {1 + len(pauses)} tries" if pauses and pause is None else ""
                raise UserError(f"{said}, on {where}{tries}; mend the reward") from error
            log.warning("%s; it is tried again in %g s", said, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _failing_row(batch: _Batch) -> str:
    """The row that a reward fails on, by halves: at most two calls for each halving of the batch."""
    start, end = 0, len(batch.prompts)
    if end > 1:
        most = 2 * math.ceil(math.log2(end))
        log.warning(
            "reward %s failed; it is asked for parts of the batch, at most %d, to find the row", batch.name, most
        )
    while end - start > 1:
        middle = (start + end) // 2
        failing = next((half for half in ((start, middle), (middle, end)) if _fails(batch, *half)), None)
        if failing is None:
            return "the whole batch, no single row alone"
        start, end = failing
    return _row(start, batch.prompts, batch.completions)


def _fails(batch: _Batch, start: int, end: int) -> bool:
    try:
        batch.score(start, end)
    except (Exception, SystemExit):  # the caller reports what the whole batch raised
        return True
    return False


def _row_range(batch: _Batch) -> str:
    first = _row(0, batch.prompts, batch.completions)
    return first if len(batch.prompts) == 1 else f"the rows 0 to {len(batch.prompts) - 1} of the batch, first {first}"


def _number(value: Any, i: int, name: str, prompts: list[Any], completions: list[Any]) -> float:
    """A reward's value for row `i` as a finite number."""
    where = f"on {_row(i, prompts, completions)}"
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise UserError(f"reward {name} returned {_short(value)} instead of a number {where}")
    if not math.isfinite(number):
        raise UserError(f"reward {name} returned {number} {where}; it must be finite")
    return number


def combined(rewards: RewardFunction | Sequence[RewardFunction]) -> RewardFunction:
    """One reward, or several added up, with every value checked."""
    if isinstance(rewards, WeightedRewards):
        return rewards
    functions: list[Any] = [rewards] if callable(rewards) or not isinstance(rewards, list | tuple) else list(rewards)
    if any(isinstance(f, type) or not callable(f) for f in functions):
        raise UserError("rewards: pass a function or reward model, or a list of them; load_rewards opens them by name")
    if not functions:
        raise UserError("no reward is given; pass at least one function or reward model")
    return WeightedRewards([(name_of(f), f, 1.0) for f in functions])


def check_takes(rewards: RewardFunction, columns: Sequence[str], name: str = "") -> None:
    """Raise UserError for a reward, in a sum or an ensemble too, that cannot be called with these columns by name."""
    if isinstance(rewards, WeightedRewards):
        for source, function, _ in rewards.sources:
            check_takes(function, columns, source)
    elif isinstance(rewards, Ensemble):
        for member in rewards.members:
            check_takes(member, columns)
    else:
        name = name or name_of(rewards)
        try:
            signature = inspect.signature(rewards)
        except (TypeError, ValueError):  # a function of C says nothing of itself
            return
        try:
            signature.bind([], [], **{column: [] for column in columns})
        except TypeError as error:
            given = ", ".join(("prompts", "completions", *columns))
            raise UserError(
                f"reward {name} cannot be called with {given} ({error}); give it the parameters prompts, completions "
                "and **columns"
            ) from None
        if inspect.iscoroutinefunction(rewards):
            raise UserError(f"reward {name} is an async function, which nobody awaits here; give a plain one")


def name_of(function: RewardFunction) -> str:
    """What a reward is called in a sentence: its folder or its function's name."""
    return getattr(function, "path", getattr(function, "__name__", type(function).__name__))


def models_of(*rewards: Any) -> list[RewardModel]:
    """The reward models among rewards, and within sums and ensembles of them."""
    models: list[RewardModel] = []
    for reward in rewards:
        if isinstance(reward, RewardModel):
            models.append(reward)
        elif isinstance(reward, Ensemble):
            models += models_of(*reward.members)
        elif isinstance(reward, WeightedRewards):
            models += models_of(*(function for _, function, _ in reward.sources))
    return models


def readers_of(*rewards: Any) -> list[Reader]:
    """The reward models among rewards as readers of prompts."""
    return [model.reader for model in models_of(*rewards)]


# --- by name ----------------------------------------------------------------------------------------------------------


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    mixed_precision: str = "auto",
    ensemble: Combine = "mean",
    uwo_coef: float = 0.1,
    base: PreTrainedModel | None = None,
) -> WeightedRewards:
    """Rewards by name: `module:function` is imported, anything else is the folder or hub name of a reward model.

    Several names in one, with commas between, are an ensemble, which counts as one reward with one weight. With `base`
    all reward models are adapters on it (RewardModel).
    """
    if not names:
        raise UserError("no reward is given; name at least one reward model or function")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} reward_weights for {len(names)} rewards; give one weight a reward")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"reward_weights: {', '.join(map(str, weights))} must be finite numbers")
    sources = []
    for name, weight in zip(names, weights, strict=True):
        members = [_load_reward(part, device, mixed_precision, base) for part in reward_names([name])]
        if not members:
            raise UserError(f"reward {name!r} names no reward model and no function")
        reward = members[0] if len(members) == 1 else Ensemble(members, ensemble, uwo_coef)
        sources.append((name, reward, weight))
    return WeightedRewards(sources)


def _load_reward(
    name: str, device: torch.device | str | None, mixed_precision: str, base: PreTrainedModel | None
) -> RewardFunction:
    if is_function_name(name):
        return load_function(name)
    file, _, function = name.partition(":")
    if file.endswith(".py"):
        module = file[:-3].strip("./").replace("/", ".")
        raise UserError(
            f"reward {name}: a reward is a model's folder or `module:function`; write {module}:{function or 'name'}, "
            "and start in a folder where Python finds the module"
        )
    if ":" in name and "/" not in name and not Path(name).exists():
        raise UserError(f"reward {name}: there is no such folder, and a function is named module:function")
    return RewardModel(name, device, mixed_precision, base=base)


def reward_names(names: Sequence[str]) -> list[str]:
    """The single rewards in a list of names, members of ensembles each on its own."""
    parts = [[name] if Path(name).exists() else name.split(",") for name in names]
    return [part.strip() for group in parts for part in group if part.strip()]


def is_function_name(name: str) -> bool:
    """Whether a name is `package.module:function` and not a path."""
    module, colon, function = name.partition(":")
    return bool(colon and module) and function.isidentifier() and not Path(name).exists() and "/" not in module


def load_function(name: str) -> RewardFunction:
    """Import `package.module:function`; the current folder is searched too."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"{name!r} is no function; write module:function")
    if "" not in sys.path and "." not in sys.path:
        sys.path.append(".")
    try:
        reward = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        hint = f"write {module[:-3]}:{function}, without .py" if module.endswith(".py") else "check the spelling"
        raise UserError(f"reward {name}: importing {module} failed ({error}); {hint}") from error
    except (Exception, SystemExit) as error:  # any at all: the module is the user's
        raise UserError(f"reward {name}: importing {module} failed ({type(error).__name__}: {error})") from error
    if not callable(reward):
        raise UserError(f"reward {name}: the module {module} has no function {function}")
    return reward


def _row(i: int, prompts: list[Any], completions: list[Any]) -> str:
    return f"row {i} ({_short(completions[i])}, the answer to {_short(prompts[i])})"


def _short(value: Any) -> str:
    text = text_of(value) if isinstance(value, list) and value and isinstance(value[0], dict) else str(value)
    return repr(text if len(text) <= 60 else text[:57] + "…")
