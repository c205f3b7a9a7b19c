"""From a YAML file and the command line to a stage's arguments, each value checked.

`parse(SFTArguments)` reads `--config file.yaml` first and `--field value` after it, so that the command line wins.
Both go through the same checks: an unknown name is an error that names the nearest one, a value of the wrong type is
an error that names the field and where it was set.
"""

import contextlib
import dataclasses
import difflib
import io
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from pipeline.bounds import check_bounds
from pipeline.errors import UserError
from pipeline.runtime.arguments import RunArguments, replace_text

ArgumentsT = TypeVar("ArgumentsT", bound=RunArguments)
# YAML's words, in a file as on the command line, for a field that takes such a value and not the word itself.
WORDS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("none", "null", "~", ""), None),
}


def parse(kind: type[ArgumentsT], argv: list[str] | None = None) -> ArgumentsT:
    """Fill `kind` from `--config FILE` (YAML) and then from the command line, which wins.

    Raises UserError for an unknown name, a wrong type, a missing or malformed YAML file. `--help` prints and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print("Every field can also stand in a YAML file, given first: --config FILE\n")
        one_word = (tyro.conf.FlagConversionOff,)  # --flag True, as in the file, not --flag and --no-flag
        tyro.cli(kind, args=["--help"], description=kind.__doc__, config=one_word, use_underscores=True)
    options = _options(argv)
    settings = [setting for name, words in options if name == "config" for setting in _read_yaml(words)]
    settings += [("the command line", name, words) for name, words in options if name != "config"]
    return resolve(kind(**{name: _value(kind, where, name, words) for where, name, words in settings}))


def resolve(args: ArgumentsT) -> ArgumentsT:
    """Put the run's folder in place of `{run_dir}` in every text field. Raises UserError for a value out of bounds."""
    for name, value in dataclasses.asdict(args).items():
        setattr(args, name, replace_text(value, "{run_dir}", args.run_dir))
    check_bounds(args)
    return args


def _options(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each `--name` (or `--name=value`) with the words up to the next one."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise UserError(f"the command line: {word!r} stands before any --field")
    return options


def _read_yaml(words: list[str]) -> list[tuple[str, str, list[str]]]:
    """File, name and words of each field of the YAML file that `--config` names."""
    if not words:
        raise UserError("--config needs a YAML file after it")
    file, *rest = words
    if rest:
        raise UserError(f"the command line: {rest[0]!r} stands before any --field")
    if not Path(file).is_file():
        raise UserError(f"configuration file {file} does not exist")
    try:
        # BaseLoader leaves every word as it is written: what `no` means is up to the field
        content = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold `key: value` lines")
    settings = []
    for name, value in content.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{file}: {name}: a value or a list of values is needed, not a mapping")
        settings.append((file, str(name), parts))
    return settings


def _value(kind: type, where: str, name: str, words: list[str]) -> Any:
    """`words` as the field `name` takes them. Raises UserError where there is no such field, or not of such a type."""
    fields = get_type_hints(kind)
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the fields"
        raise UserError(f"{where}: unknown field {name!r}; {hint}")
    expected = fields[name]
    taken = get_args(expected) or (expected,)
    meant = [WORDS.get(word.lower(), word) if word not in taken else word for word in words]
    said = [str(value) if type(value) in taken else word for value, word in zip(meant, words, strict=True)]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(expected, args=said)
    except SystemExit:
        written = repr(" ".join(words))
        if get_origin(expected) is Literal:
            raise UserError(f"{where}: {name}: {written} is none of {', '.join(map(repr, taken))}") from None
        of_type = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
        raise UserError(f"{where}: {name}: {written} is not of type {of_type}") from None
