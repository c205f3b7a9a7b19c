"""Where metrics go beside metrics.jsonl: trackio, TensorBoard, Weights & Biases, MLflow, through Accelerate's trackers.

A tracker gets the lines of metrics.jsonl under their names, tables of answers, and, at the end, what stage.json records
as `final/…`. What it writes on this machine lies in `<output_dir>/trackers`. All stages and PPO report here, so that
names and steps are the same everywhere; transformers' own callbacks would rename them and log steps again on resume.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FOLDER = "trackers"
# The packages that serve each tracker; the first is the one to install.
PACKAGES = {
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
OWN = {"step", "time"}  # which every tracker has of its own for each line
TABLE_ROWS = 64  # of a table of answers; trackers keep every table of a run


@dataclass(kw_only=True)
class TrackingFields:
    """Fields of everything that logs metrics, under the names of transformers' TrainingArguments."""

    report_to: list[str] | None = None
    """Trackers that get the metrics too: trackio, tensorboard, wandb, mlflow; none: metrics.jsonl alone. Their files
    are in `<output_dir>/trackers`; nothing leaves this machine unless a tracker that is named here is set up for it."""
    project: str = "rlhf-pipeline"
    """Name under which a tracker keeps runs together; only with report_to."""
    run_name: str | None = None
    """Name of this run in a tracker; none: the folders of run and stage (`stories-seed1/ppo`). Only with report_to."""


def names_of(report_to: Sequence[str] | str | None) -> list[str]:
    """The trackers that are named, each once; from Python also one name alone, and TRL's "none"."""
    given = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in dict.fromkeys(given) if name != "none"]


def check_installed(report_to: Sequence[str] | str | None) -> None:
    """Raise UserError for a tracker that is not known or not installed."""
    for name in names_of(report_to):
        if name not in PACKAGES:
            raise UserError(f"report_to: {name!r} is none of {', '.join(PACKAGES)}")
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"report_to: {name} is not installed; `pip install {PACKAGES[name][0]}`, or take it out")


class Trackers:
    """The trackers of one run, on the main process; without `report_to` it does nothing.

    output_dir  the folder of the run; the trackers' files go to `trackers` in it
    say         prints a sentence

    A tracker that fails while the run goes on is left out from then on, and that is said: metrics.jsonl has everything.
    """

    def __init__(
        self, fields: TrackingFields, output_dir: Path, default_name: str, say: Callable[[str], None] = print
    ) -> None:
        self.names = names_of(fields.report_to)
        self.project, self.run_name = fields.project, fields.run_name or default_name
        self.config = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in dataclasses.asdict(fields).items()
        }
        self.folder, self.say = output_dir / FOLDER, say
        self.step = 0
        self._open: dict[str, Any] = {}

    @property
    def due(self) -> bool:
        """Whether `start` has something to do."""
        return bool(self.names) and not self._open

    def start(self, step: int) -> None:
        """Open the trackers for a run whose next lines are of `step` and later; further calls do nothing.

        Where an earlier part of the run had reported already, TensorBoard goes on in the same run, without what that
        part had logged of these steps. The others cannot take anything back: the earlier part keeps its run, and a new
        one says by its name where it begins. Raises UserError where a tracker cannot be opened.
        """
        if not self.due:
            return
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # Accelerate's trackers ask it which process they are in
        again, self.step = self.folder.exists(), max(0, step - 1)
        name = f"{self.run_name} from step {step}" if again else self.run_name
        self.folder.mkdir(parents=True, exist_ok=True)
        for tracker in self.names:
            try:
                with _quiet(tracker):
                    made = self._made(tracker, name, step)
                    made.start()
                    self._open[tracker] = made
                    if not (again and tracker == "tensorboard"):  # it has them, and would show them as one more run
                        made.store_init_configuration(self.config)
            except Exception as error:  # each library raises kinds of its own
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise UserError(
                    f"report_to: {tracker} cannot be opened ({why}); set it up, or take it out of report_to"
                ) from error
        atexit.register(self.finish)
        self.say(f"metrics go to {', '.join(map(self._place, self.names))} too")

    def _made(self, tracker: str, name: str, step: int) -> Any:
        """Accelerate's tracker, not started."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        made = LOGGER_TYPE_TO_CLASS[tracker]
        folder = (self.folder / tracker).absolute()
        if tracker == "tensorboard":
            return made("", self.folder / tracker, purge_step=step)
        if tracker == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(folder))
            return made(self.project, name=name, embed=False, auto_log_cpu=False, auto_log_gpu=False)
        if tracker == "wandb":
            folder.mkdir(exist_ok=True)
            return made(self.project, name=name, dir=str(folder))
        if "MLFLOW_TRACKING_URI" in os.environ:  # a server or database of the user's, which has a place for files
            return made(self.project, run_name=name)
        folder.mkdir(exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        return made(self.project, run_name=name, logging_dir=folder.as_uri())

    def _place(self, tracker: str) -> str:
        """The tracker's name, and where on this machine it writes if its variable names no other place."""
        place = {"trackio": "TRACKIO_DIR", "mlflow": "MLFLOW_TRACKING_URI"}.get(tracker)
        return f"{tracker} ({os.environ[place] if place else self.folder / tracker})"

    def log(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; one without `step` counts for the last step."""
        if not self._open:
            return
        self.step = row.get("step", self.step)
        values = {name: value for name, value in flat(row).items() if name not in OWN}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}

        def send(name: str, tracker: Any) -> None:
            tracker.log(numbers if name == "mlflow" else numbers | texts, step=self.step)

        self._each(send)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int = 0) -> None:
        """The first TABLE_ROWS rows, which have the same keys, as a table."""
        if not rows or not self._open:
            return
        columns = list(rows[0])
        cells = [[row[column] for column in columns] for row in rows[:TABLE_ROWS]]

        def send(tracker_name: str, tracker: Any) -> None:
            if tracker_name == "tensorboard":
                tracker.log({name: markdown(columns, cells)}, step=step)
            elif tracker_name == "trackio":
                from trackio import Table

                tracker.log({name: Table(columns=columns, data=cells)}, step=step)
            elif tracker_name == "wandb":
                tracker.log_table(name, columns=columns, data=cells, step=step)
            else:
                import mlflow

                content = dict(zip(columns, map(list, zip(*cells, strict=True)), strict=True))
                mlflow.log_table(content, f"{name}-step-{step}.json")

        self._each(send)

    def finish(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Log the final metrics and close all; further calls do nothing."""
        if metrics:
            self.log({f"final/{name}": value for name, value in flat(metrics).items()})

        def close(name: str, tracker: Any) -> None:
            if name == "trackio":
                import trackio

                trackio.finish()  # Accelerate's would leave the run open for trackio's own exit handler
            else:
                tracker.finish()

        self._each(close)
        self._open, self.names = {}, []

    def _each(self, act: Callable[[str, Any], None]) -> None:
        """Do something with every tracker; one that fails is left out from then on."""
        for name, tracker in list(self._open.items()):
            try:
                with _quiet(name):
                    act(name, tracker)
            except Exception as error:  # a run of hours does not end because of it
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                del self._open[name]
                self.names.remove(name)
                self.say(f"warning: {name} failed at step {self.step} ({why}) and gets no more; metrics.jsonl goes on")


def _quiet(tracker: str) -> contextlib.AbstractContextManager:
    """trackio prints several lines where one says as much; wandb may have to ask for a key, which must be seen."""
    return contextlib.redirect_stdout(io.StringIO()) if tracker == "trackio" else contextlib.nullcontext()


def flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and texts under one name each: dictionaries and lists within become `name/key`, `name/0`."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": inner for key, inner in flat(value).items()}
        elif value is not None:
            found[str(name)] = value
    return found


def markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, which TensorBoard shows as one."""

    def line(values: Sequence[Any]) -> str:
        shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", "<br>") for text in shown) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, cells)])
