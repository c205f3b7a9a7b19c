"""How a model came to be, read from the stage.json files on the way to it: stages, data and their licences, base model.

Paths of the machine on which it was made stay there: `public` takes them out of whatever is shown.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pipeline.checkpoint import read_object
from pipeline.errors import UserError
from pipeline.report.gather import RECORD
from pipeline.text.sources import GENERATORS, is_local
from reward_data.generators import ORIGINS

NOT_RECORDED = "not recorded"
# An absolute path, or one from the home folder or above this one, wherever it stands in a text
PRIVATE = re.compile(r"(?<![\w.:/-])(?:~[\w-]*|\.{1,2})?/[^\s'\"`,;()\[\]{}]+|(?<![\w./-])[A-Za-z]:\\[^\s'\"`]+")


@dataclass
class Step:
    """A finished stage: its folder and what is in its stage.json."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["stage"]


@dataclass
class Data:
    """A data set as the card shows it."""

    name: str
    about: str
    licence: str
    stages: list[str] = field(default_factory=list)


@dataclass
class History:
    """`steps` in the order in which they ran, the model's own stage last; empty for a model from elsewhere.

    base          the model that it was trained from, a hub name or what a record says; None: random weights, or unknown
    base_licence  its licence where that is recorded
    """

    steps: list[Step]
    data: list[Data]
    base: str | None = None
    base_licence: str | None = None

    @property
    def language(self) -> str | None:
        """The language of the data; None where it is not known."""
        found = {ORIGINS[data.name].language if data.name in ORIGINS else None for data in self.data}
        return found.pop() if len(found) == 1 else None


def history_of(path: str) -> History:
    """The history of the model in a folder, or in one below a stage's (`ppo/adapter`). Raises UserError where a record
    on the way is damaged."""
    place = Path(path).expanduser()
    folder = next((above for above in (place, place.parent) if (above / "stage.json").is_file()), None)
    if folder is None:
        return History([], [], None if is_local(path) else path)
    steps: dict[Path, Step] = {}
    history = History([], [])
    _walk(folder, steps, history)
    history.steps = list(steps.values())
    history.data = data_of(history.steps)
    return history


def _walk(folder: Path, steps: dict[Path, Step], history: History) -> None:
    """Put what `folder` was made of, then itself, into `steps`."""
    key = folder.resolve()
    if key in steps:
        return
    record = read_record(folder)
    for name, given in record["inputs"].items():
        path = str(given.get("path", "")) if isinstance(given, dict) else ""
        above = _stage_folder(path, folder)
        if above is not None and above.resolve() != key:
            _walk(above, steps, history)
        elif name == "model" and history.base is None:
            history.base = public(path)
    source, licence = (_said(record, *names) for names in (("source",), ("licence", "license")))
    if source and history.base is None:
        history.base, history.base_licence = public(source), licence
    steps[key] = Step(folder, record)


def read_record(folder: Path) -> dict[str, Any]:
    """A stage.json with all that is read of it. Raises UserError."""
    file = folder / "stage.json"
    record = read_object(file)
    if record is None or not all(isinstance(record.get(key), kinds) for key, kinds in RECORD.items()):
        raise UserError(f"export: {file} is damaged, from which the model card is made; make that stage anew")
    return record


def _stage_folder(path: str, near: Path) -> Path | None:
    """The folder of a stage that an input names: as it is written, or beside `near`, where the run has been moved."""
    beside = [near.parent / PurePath(path).name] if path and is_local(path) else []
    for place in [Path(path), *beside] if path else []:
        for folder in (place, place.parent):  # ppo/best lies in a stage's folder
            if (folder / "stage.json").is_file():
                return folder
    return None


def _said(record: dict[str, Any], *names: str) -> str | None:
    """A text that a stage recorded under one of some names."""
    for part in (record, record["metrics"], record["config"]):
        for name in names:
            if isinstance(part.get(name), str):
                return part[name]
    return None


def data_of(steps: list[Step]) -> list[Data]:
    """The data sets of the stages, without those that a stage made itself."""
    found: dict[str, Data] = {}
    made = {step.folder.resolve() for step in steps}
    for step in steps:
        for key in ("dataset", "ptx_dataset"):
            path = step.record["config"].get(key)
            if isinstance(path, str) and Path(path).resolve() not in made and _stage_folder(path, step.folder) is None:
                data = found.setdefault(path, _data(path))
                data.stages += [step.name] if step.name not in data.stages else []
    return list(found.values())


def _data(path: str) -> Data:
    if path in ORIGINS:
        licences = [f"{name}: {licence}" for name, licence in ORIGINS[path].licences.items()]
        return Data(path, ORIGINS[path].about, ", ".join(licences) or "none needed")
    if path in GENERATORS:
        return Data(path, "a generator of this project", NOT_RECORDED)
    if is_local(path):
        return Data(PurePath(path).name, "a file or folder of whoever trained the model", NOT_RECORDED)
    return Data(path, "a data set on the hub", "see its page")


def public(text: str) -> str:
    """A text with the last part alone of each path that lies outside of the working folder."""
    return PRIVATE.sub(lambda found: _last_part(found[0]), text)


def public_command(step: Step) -> str:
    """The command of a stage, with the run's folder as `runs/<name>` and no other private path."""
    config, command = step.record["config"], step.record["command"]
    run_dir = str(config.get("run_dir", "")).rstrip("/")
    if PRIVATE.match(run_dir):
        command = command.replace(run_dir, f"runs/{PurePath(run_dir).name}")
    texts = [part for value in config.values() for part in (value if isinstance(value, list) else [value])]
    private = {text for text in texts if isinstance(text, str) and PRIVATE.match(text)}
    for text in sorted(private, key=len, reverse=True):  # also those with blanks, which the pattern cannot see whole
        command = command.replace(text, _last_part(text))
    return public(command)


def _last_part(path: str) -> str:
    return "…/" + re.split(r"[/\\]", path.rstrip("/\\"))[-1]
