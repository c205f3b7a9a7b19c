"""From a YAML file and the command line to a stage's arguments, each value checked.

`parse(SFTArguments)` reads `--config file.yaml` first and `--field value` after it, so that the command line wins.
Both go through the same checks: an unknown name is an error that names the nearest one, a value of the wrong type is
an error that names the field and where it was set.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro
import yaml

from pipeline.errors import UserError
from pipeline.ppo.config import PPOConfig
from pipeline.runtime.arguments import RunArguments

RANGES = {"seed": (0, 2**32), "adam_beta1": (0, 1), "adam_beta2": (0, 1), "weight_decay": (0, math.inf)}
ArgumentsT = TypeVar("ArgumentsT", bound=RunArguments)


def parse(kind: type[ArgumentsT], argv: list[str] | None = None) -> ArgumentsT:
    """Fill `kind` from `--config FILE` (YAML) and then from the command line, which wins.

    Raises UserError for an unknown name, a wrong type, a missing or malformed YAML file. `--help` prints and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print("Every field can also stand in a YAML file, given first: --config FILE\n")
        tyro.cli(_typed(kind), args=["--help"], description=kind.__doc__, config=_TYRO, use_underscores=True)
    config_file, rest = _split_config(argv)
    names = [f.name for f in dataclasses.fields(kind)]
    items = [(config_file, *item) for item in _yaml_items(config_file, names)] if config_file else []
    items += [("the command line", *item) for item in _command_line_items(rest, names)]
    # One item a field, the last one wins; tyro then converts text to the field's type.
    last = {name: (where, name, [_word(kind, name, word) for word in words]) for where, name, words in items}
    values = [word for _, name, words in last.values() for word in (f"--{name}", *words)]
    try:
        args = _quiet_cli(kind, values)
    except SystemExit:
        for where, name, words in last.values():
            _check_one(kind, where, name, words)
        raise
    return resolve(args)


def resolve(args: ArgumentsT) -> ArgumentsT:
    """Put the run's folder in place of `{run_dir}` in every text field, and check that counts are positive."""
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        if isinstance(value, str):
            value = value.replace("{run_dir}", args.run_dir)
        elif isinstance(value, list):
            value = [v.replace("{run_dir}", args.run_dir) if isinstance(v, str) else v for v in value]
        setattr(args, f.name, value)
        counts = ("_steps", "_size", "_bytes", "batch_size", "num_", "max_new_tokens", "max_length")
        may_be_zero = ("warmup", "validation", "test_", "eval_size", "dataset_size")
        if isinstance(args, PPOConfig):  # 0: none
            may_be_zero += ("eval_steps", "save_steps", "ref_sync")
        least = 0 if any(z in f.name for z in may_be_zero) else 1
        if type(value) is int and value < least and any(c in f.name for c in counts):
            raise UserError(f"{f.name}: {value} is too small; give a whole number from {least} up")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < high:
            raise UserError(f"{name}: {value} must be from {low:g} to below {high:g}")
    rate = getattr(args, "learning_rate", 1.0)
    if not rate > 0:
        raise UserError(f"learning_rate: {rate} must be above 0")
    if getattr(args, "head_dim", 2) % 2:
        raise UserError(f"head_dim: {args.head_dim} must be even, as rotary positions turn pairs of numbers")
    return args


_TYRO = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)


def _typed(kind: type) -> Any:
    return Annotated[kind, tyro.conf.FlagConversionOff]


def _quiet_cli(kind: type[ArgumentsT], values: list[str]) -> ArgumentsT:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return tyro.cli(_typed(kind), args=values, config=_TYRO, use_underscores=True)


def _check_one(kind: type, where: str, name: str, words: list[str]) -> None:
    try:
        _quiet_cli(kind, [f"--{name}", *words])
    except SystemExit:
        expected = str(next(f.type for f in dataclasses.fields(kind) if f.name == name))
        expected = expected.removeprefix("<class '").removesuffix("'>").replace("typing.", "")
        raise UserError(f"{where}: {name}: {' '.join(words)!r} is not of type {expected}") from None


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` (or `--config=FILE`) out of the arguments."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config needs a YAML file after it")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


def _yaml_items(file: str, names: list[str]) -> list[tuple[str, list[str]]]:
    if not Path(file).is_file():
        raise UserError(f"configuration file {file} does not exist")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold `key: value` lines")
    items = []
    for key, value in content.items():
        _check_name(file, str(key), names)
        if isinstance(value, dict):
            raise UserError(f"{file}: {key}: a value or a list is needed, not a mapping")
        items.append((str(key), [str(v) for v in (value if isinstance(value, list) else [value])]))
    return items


def _command_line_items(words: list[str], names: list[str]) -> list[tuple[str, list[str]]]:
    items: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            _check_name("the command line", name, names)
            items.append((name, [value] if equals else []))
        elif not items:
            raise UserError(f"the command line: {word!r} stands before any --field")
        else:
            items[-1][1].append(word)
    return items


def _word(kind: type, name: str, word: str) -> str:
    """YAML's true, false, none and null as Python's, where the field takes such a value and not the word itself."""
    expected = get_type_hints(kind)[name]
    options = get_args(expected) or (expected,)
    if word in options:
        return word
    meant = {"true": bool, "false": bool, "none": type(None), "null": type(None)}.get(word.lower())
    return {"null": "None"}.get(word.lower(), word.capitalize()) if meant in options else word


def _check_name(where: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; --help lists the fields"
        raise UserError(f"{where}: unknown field {name!r}{hint}")
