"""From a YAML file and the command line to a stage's arguments, each value checked.

`parse(SFTArguments)` reads `--config file.yaml` first and `--field value` after it, so that the command line wins.
Both go through the same checks: an unknown name is an error that names the nearest one, a value of the wrong type is
an error that names the field and where it was set. YAML's own words (`no`, `null`, …) mean what the field takes.
"""

import dataclasses
import difflib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from pipeline.bounds import check_bounds
from pipeline.chain import run_name
from pipeline.errors import UserError
from pipeline.runtime.arguments import RunArguments, replace_text

ArgumentsT = TypeVar("ArgumentsT", bound=RunArguments)
# YAML's words, in a file as on the command line, for a field that takes such a value and not the word itself.
WORDS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("none", "null", "~", ""), None),
}
NO_PATHS = {"preset", "text_column"}  # text fields in which a ~ is a ~
ALONE = {"dry_run"}  # something to do, and no setting: `--dry_run` without a value means True


class Setting(NamedTuple):
    """A field as it was written: `words` is a list with one entry for each value, whether one was meant or several."""

    where: str
    name: str
    words: list[str]
    listed: bool = False
    """Written as a YAML list."""
    quoted: tuple[bool, ...] = ()
    """Of each word, whether it stands in quotes in a YAML file: then it is text, not one of YAML's words."""

    def error(self, fault: str) -> UserError:
        """A sentence that says where."""
        return UserError(f"{self.where}: {self.name}: {fault}")


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
    for name, words in options:
        if name != "config":
            settings.append(Setting("the command line", name, words or ["True"] * (name in ALONE)))
    return resolve(kind(**{setting.name: _value(kind, setting) for setting in settings}))


def resolve(args: ArgumentsT) -> ArgumentsT:
    """Put names and folders in place of `{run}`, `{run_dir}` and `~` in every text field.

    Raises UserError for a value out of bounds.
    """
    if "{run}" in args.run_dir:
        name = run_name(args.preset, args.seed)
        if not name.strip(".") or {"/", os.sep} & set(name):
            raise UserError(f"preset: {args.preset!r} cannot name the run's folder; set run_dir, or another preset")
        args.run_dir = args.run_dir.replace("{run}", name)
    args.run_dir = _expanded("run_dir", args.run_dir)
    for name, value in dataclasses.asdict(args).items():
        setattr(args, name, _expanded(name, replace_text(value, "{run_dir}", args.run_dir)))
    check_bounds(args)
    return args


def _expanded(name: str, value: Any) -> Any:
    """A field's value with the home folder in place of `~` or `~user` at the beginning of a path, in a list of each."""
    if "\0" in str(value):
        raise UserError(f"{name}: {value!r} has a null character, which no path or text can have; take it out")
    if name in NO_PATHS:
        return value
    if isinstance(value, list):  # members of an ensemble stand in one entry, with commas between
        return [_in_parts(name, part) if isinstance(part, str) else part for part in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        user = value[1:].partition("/")[0]
        raise UserError(f"{name}: {value}: there is no user {user!r} here; write ./{value} for what is named so")
    return path


def _in_parts(name: str, value: str) -> str:
    return value if Path(value).exists() else ",".join(_expanded(name, part) for part in value.split(","))


def _options(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each `--name` (or `--name=value`) with the words up to the next one."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word != word.encode(errors="replace").decode():
            raise UserError(f"the command line: {word!r} is not UTF-8 text")
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise UserError(f"the command line: {word!r} stands before any --field")
    return options


def _read_yaml(words: list[str]) -> list[Setting]:
    """The fields of the YAML file that `--config` names."""
    if not words:
        raise UserError("--config needs a YAML file after it")
    file, *rest = words
    if rest:
        raise UserError(f"the command line: {rest[0]!r} stands before any --field")
    path = Path(_expanded("config", file))
    if not path.is_file():
        raise UserError(f"configuration file {file} " + ("is a folder" if path.is_dir() else "does not exist"))
    try:
        # Composed, not loaded: every word stays as it is written, quotes and all. What `no` means is up to the field
        tree = yaml.compose(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return []
    if not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{file} must hold `key: value` lines")
    lines = [(key, value) for key, value in tree.value if isinstance(key, yaml.ScalarNode)]
    if len(lines) < len(tree.value):
        raise UserError(f"{file}: a key must be the name of a field, not a list or mapping")
    again = [name for name, count in Counter(key.value for key, _ in lines).items() if count > 1]
    for name in again:
        numbers = " and ".join(str(key.start_mark.line + 1) for key, _ in lines if key.value == name)
        raise UserError(f"{file}: {name} is set more than once, in lines {numbers}; keep one of them")
    return [_setting(file, key.value, value) for key, value in lines]


def _setting(file: str, name: str, value: yaml.Node) -> Setting:
    """A line of a YAML file. Raises UserError for anything but a value or a list of values."""
    parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
    words = [part for part in parts if isinstance(part, yaml.ScalarNode)]
    if len(words) < len(parts):
        raise UserError(f"{file}: {name}: a value or a list of values is needed, not a mapping or a list of lists")
    quoted = tuple(word.style is not None for word in words)  # None: a plain one
    return Setting(file, name, [word.value for word in words], isinstance(value, yaml.SequenceNode), quoted)


def _value(kind: type, given: Setting) -> Any:
    """What was written as the field takes it. Raises UserError where there is no such field, or not of such a type."""
    fields = get_type_hints(kind)
    if given.name not in fields:
        near = difflib.get_close_matches(given.name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the fields"
        raise UserError(f"{given.where}: unknown field {given.name!r}; {hint}")
    expected = fields[given.name]
    # A union's parts; of a single type, itself. A Literal is one type, whose parts are its choices
    types = (expected,) if get_origin(expected) in (Literal, list) else get_args(expected) or (expected,)
    quoted = given.quoted or (False,) * len(given.words)
    (*inner,) = (get_args(part)[0] for part in types if get_origin(part) is list)
    if inner:
        alone = len(given.words) == 1 and not given.listed
        if alone and type(None) in types and not quoted[0] and WORDS.get(given.words[0].lower(), "") is None:
            return None
        return [_one(given, word, (inner[0],), q) for word, q in zip(given.words, quoted, strict=True)]
    if given.listed or len(given.words) != 1:
        raise given.error(f"{_not_of_type(' '.join(given.words), types)}; give one value")
    return _one(given, given.words[0], types, quoted[0])


def _one(given: Setting, word: str, types: tuple[Any, ...], quoted: bool) -> Any:
    """A word as the first of the types that takes it, `null` and its like as None where that is one of them."""
    if quoted and str in types and (word or type(None) not in types):
        meaning: Any = word
    else:
        meaning = WORDS.get(word.lower(), word)
    for taken in types:
        choices = get_args(taken) if get_origin(taken) is Literal else ()
        if word in choices:
            return word
        if alike := [choice for choice in choices if meaning is not word and WORDS.get(choice, choice) is meaning]:
            return alike[0]  # `off`, where the choice is called `no`
    if meaning is None:
        if type(None) in types:
            return None
        raise given.error(f"{word!r} means none, which is not possible here; give a value")
    if bool in types and isinstance(meaning, bool):
        return meaning
    if str in types:
        if not word.strip():
            raise given.error("the text is empty; give a value")
        return word
    for number in (kind for kind in (int, float) if kind in types):
        try:
            return number(word)
        except ValueError:
            continue
    raise given.error(_not_of_type(word, types))


def _not_of_type(word: str, types: tuple[Any, ...]) -> str:
    for kind in types:
        if get_origin(kind) is Literal:
            return f"{word!r} is none of {', '.join(map(repr, get_args(kind)))}"
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in types)
    return f"{word!r} is not of type {names}"
