"""Bounds of settings, written beside each field: `max_steps: Count = 1000`, `lam: Share = 0.95`.

The marks are those of the package annotated_types, which pydantic and others read too. `check_bounds` looks at a
dataclass that is filled, whether from a YAML file, the command line or Python.
"""

import math
import operator
import os
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, MultipleOf

from pipeline.errors import UserError

Count = Annotated[int, Ge(1)]  # a whole number from 1 up
CountOrZero = Annotated[int, Ge(0)]  # 0 where that means none
Steps = Annotated[int, Interval(ge=1, lt=2**31)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]  # of a running average: at 1 it would never move
Even = Annotated[int, Ge(2), MultipleOf(2)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]

# By the name of the attribute in which a mark holds its limit; an Interval has the first four.
TESTS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
    "multiple_of": ("a multiple of", lambda value, limit: value % limit == 0),
}


def check_bounds(settings: Any) -> None:
    """Raise UserError for the first field of a dataclass that lies outside its bounds or is none of its choices."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if kind in (bool, str) and not isinstance(value, bool if kind is bool else str | os.PathLike):
            raise UserError(f"{name}: {value!r} is not {'true or false' if kind is bool else 'a text'}")
        options = (kind,) if get_origin(kind) in (Annotated, Literal) else get_args(kind)
        if value is None and options and type(None) not in options:
            raise UserError(f"{name}: none is not possible here; give a value")
        for option in options:
            if get_origin(option) is Literal and value not in get_args(option):
                raise UserError(f"{name}: {value!r} is none of {', '.join(map(repr, get_args(option)))}")
            if get_origin(option) is Annotated and value is not None:
                base, *marks = get_args(option)
                _check_type(name, value, base)
                _check(name, value, tuple(marks), ", or none" if type(None) in options else "")


def _check_type(name: str, value: Any, base: type) -> None:
    """Numbers of NumPy count as numbers; text and truth values do not."""
    numbers = Integral if base is int else Real
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise UserError(f"{name}: {value!r} is not {'a whole number' if base is int else 'a number'}")
    if math.isinf(value):
        raise UserError(f"{name}: {value} must be finite")


def _check(name: str, value: float, marks: tuple[Any, ...], or_none: str) -> None:
    found = [(TESTS[kind], getattr(mark, kind, None)) for mark in marks for kind in TESTS]
    limits = [(words, test, limit) for (words, test), limit in found if limit is not None]
    if not all(test(value, limit) for _, test, limit in limits):
        must = " and ".join(f"{words} {limit}" for words, _, limit in limits)
        raise UserError(f"{name}: {value} must be {must}{or_none}")
