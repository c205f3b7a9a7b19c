"""How long a row may be, for every stage: what models can read, which rows are longer, and what becomes of them.

Lengths are in tokens. All are compared before the first expensive step, for all rows: `check_positions` holds a setting
against a model, `fit_rows` rows against a setting, `fit_prompts` prompts against everybody who will read them together
with an answer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from pipeline.errors import UserError
from pipeline.text.counts import agreeing, counted

Overlong = Literal["cut", "drop", "refuse"]
SHARES = (50, 90, 99)  # percentiles that are told


def positions_of(model: Any) -> int | None:
    """The longest row that a model can read; None where nothing limits it.

    That is `max_position_embeddings` of its configuration, by whatever name (GPT-2's is `n_positions`, MPT's
    `max_seq_len`). Where a model numbers its positions from behind the padding's id, as RoBERTa does, those before are
    of no use: 512 of 514.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says −1
        return None
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if table and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def check_positions(stage: str, name: str, tokens: int, model: Any, path: str) -> None:
    """Raise UserError where the setting `name` allows rows of more `tokens` than the model can read."""
    limit = positions_of(model)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{stage}: {name} {tokens} is more than the {limit} tokens that {path} can read; lower {name} to at most "
            f"{limit}, or take a model with more positions"
        )


@dataclass
class Fit:
    """What becomes of the rows of one split, by their lengths."""

    what: str
    """What the rows are: "training rows"."""
    lengths: list[int]
    """Of every row given."""
    limit: int | None
    """The longest that stays as it is; None: any."""
    limit_name: str
    """The setting or the model that the limit comes from, with its value."""
    kept: list[int] = field(default_factory=list)
    """Numbers, from 0, of the rows that are used."""
    cut: int = 0
    """How many of them lose their end."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows are not used, for each reason."""

    def sentence(self) -> str:
        """Rows given, used, dropped and cut."""
        given, kept = len(self.lengths), len(self.kept)
        if given == kept > 1 and not self.cut:
            return f"all {given:,} {self.what} are used"
        parts = [f"{kept:,} of {counted(given, self.what)} {agreeing(kept)} used"]
        parts += [f"{n:,} of {given:,} {agreeing(n)} dropped: {reason}" for reason, n in self.dropped.items()]
        if self.cut:
            ends = agreeing(self.cut, "answer loses its end", "answers lose their end")
            parts.append(f"{self.cut:,} of {given:,} {ends} at {self.limit_name}")
        return ", ".join(parts)

    def percentiles(self) -> str:
        """The distribution of the lengths of all rows given, against the limit."""
        limit = f"; {self.limit_name}" if self.limit is not None else ""
        return percentiles(f"tokens of {self.what}", self.lengths) + limit


def percentiles(what: str, values: Sequence[int]) -> str:
    """The distribution of whole numbers, none of them between two values."""
    limits = np.percentile(values, SHARES, method="inverted_cdf").astype(int)
    told = [f"{share} % up to {limit:,}" for share, limit in zip(SHARES, limits, strict=True)]
    return f"{what}: {', '.join(told)}, the longest {max(values):,}"


def fit_rows(
    stage: str,
    what: str,
    lengths: Sequence[int],
    limit: int,
    places: Sequence[str],
    overlong: Overlong,
    answers: Sequence[int] | None = None,
) -> Fit:
    """Hold rows against `max_length`.

    lengths   tokens of each row
    places    where each row stands, for the sentence of a refusal
    overlong  what becomes of longer rows; `cut` keeps their first `limit` tokens, and needs
    answers   the place of each row's first token that is trained on: a row that is cut before it is dropped

    Raises UserError at the first longer row if it is to be refused, and where no row is left.
    """
    fit = Fit(what, list(lengths), limit, f"max_length {limit}")
    for i, length in enumerate(lengths):
        if length <= limit:
            fit.kept.append(i)
        elif overlong == "refuse":
            raise UserError(_refusal(stage, fit, places[i], length, "drop" if answers is None else "cut or drop"))
        elif overlong == "drop" or answers is None:
            fit.dropped[f"longer than {fit.limit_name}"] += 1
        elif answers[i] >= limit:
            fit.dropped[f"the answer begins beyond {fit.limit_name}"] += 1
        else:
            fit.kept.append(i)
            fit.cut += 1
    if not fit.kept:
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in fit.dropped.items())
        raise UserError(
            f"{stage}: none of the {len(lengths):,} {what} is left ({reasons}); the shortest has {lengths[shortest]:,} "
            f"tokens ({places[shortest]}): raise max_length"
        )
    return fit


def _refusal(stage: str, fit: Fit, place: str, length: int, other: str) -> str:
    longer = sum(length > (fit.limit or 0) for length in fit.lengths)
    return (
        f"{stage}: {place} has {length:,} tokens, more than {fit.limit_name} allows ({longer:,} of "
        f"{counted(len(fit.lengths), fit.what)} {agreeing(longer)} longer); raise max_length, shorten the rows, or set "
        f"overlong to {other}"
    )


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Who reads prompts with answers after them: a policy, a critic, a reward model."""

    name: str
    """For sentences: "the policy runs/stories/sft"."""
    limit: int | None
    """The most tokens that it can read; None: any number."""
    encode: Callable[[list[Any], Sequence[str]], list[list[int]]]
    """Token ids of prompts, whose places are given beside them, as this one reads them."""


def fit_prompts(
    stage: str,
    what: str,
    prompts: list[Any],
    places: Sequence[str],
    readers: Sequence[Reader],
    room: tuple[str, int],
    overlong: Overlong,
) -> tuple[Fit, list[list[int]]]:
    """Hold prompts against everybody who reads them with an answer of the length of the setting `room`.

    An answer counts as many tokens for each reader; one with another vocabulary may need a few more. Returns what
    becomes of the prompts and the token ids of all of them for the first reader, by which lengths are told. Raises
    UserError at the first prompt that leaves too little room if it is to be refused, and where no prompt is left.
    """
    setting = f"{room[0]} {room[1]}"
    known = {encode: encode(prompts, places) for encode in {reader.encode for reader in readers}}  # each once
    encoded = [known[reader.encode] for reader in readers]
    ids, first = encoded[0], readers[0]
    limit = None if first.limit is None else first.limit - room[1]
    fit = Fit(what, [len(row) for row in ids], limit, f"{setting} leaves room for {limit}")
    for i, place in enumerate(places):
        full = [n for n, reader in enumerate(readers) if reader.limit and len(encoded[n][i]) + room[1] > reader.limit]
        if not full:
            fit.kept.append(i)
            continue
        reader, length = readers[full[0]], len(encoded[full[0]][i])
        if overlong == "refuse":
            raise UserError(
                f"{stage}: {place}: a prompt of {length:,} tokens and {setting} do not fit the {reader.limit:,} tokens "
                f"that {reader.name} can read; shorten the prompt, lower {room[0]}, or set overlong to drop"
            )
        fit.dropped[f"longer, with {setting}, than the {reader.limit:,} tokens that {reader.name} can read"] += 1
    if not fit.kept:
        reason, count = fit.dropped.most_common(1)[0]
        raise UserError(f"{stage}: none of the {count:,} {what} is left: {reason}; lower {room[0]}, or shorten them")
    return fit, ids
