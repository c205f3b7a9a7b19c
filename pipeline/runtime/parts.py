"""Work without a training loop, done in parts that are each kept on disk: a stage that was stopped does none again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from pipeline.checkpoint import fault_of, save_checkpoint, step_of
from pipeline.runtime import signals
from pipeline.runtime.record import Stage
from pipeline.text.counts import agreeing, counted

PART = "part.json"


class Parts:
    """The parts of a stage's work, in the order in which they are asked for; each is a checkpoint of its own.

    The work is `total` of `what`, say 200 "prompts"; each part does some of them.
    """

    def __init__(self, stage: Stage, total: int, what: str) -> None:
        self.stage, self.number = stage, 0
        self.total, self.what, self.done = total, what, 0
        self.last: Path | None = None  # the newest part's folder
        self.kept: list[Any] = []
        for number in range(1, 1 + (step_of(stage.resume_from) if stage.resume_from else 0)):
            folder = self._folder(number)
            if fault_of(folder):  # this one and those after it are made again
                break
            part = json.loads((folder / PART).read_text(encoding="utf-8"))
            self.kept.append(part["content"])
            stage.seconds_before = part["seconds"]

    def _folder(self, number: int) -> Path:
        return self.stage.checkpoints / f"step-{number:08d}"

    @property
    def is_kept(self) -> bool:
        """Whether the next part is there already."""
        return self.number < len(self.kept)

    def get(self, make: Callable[[], Any], size: int) -> Any:
        """The next part, which does `size` of the work: what an earlier run kept of it, or what `make` returns, as JSON
        gives it back. Raises Stopped, which says how much is done, after a signal."""
        try:
            part = self._get(make)
        except signals.Stopped as stopped:
            done = f"{self.done:,} of {counted(self.total, self.what)} {agreeing(self.done)} done"
            raise signals.Stopped(stopped.number, self.last, done) from None
        self.done, self.last = self.done + size, self._folder(self.number)
        return part

    def _get(self, make: Callable[[], Any]) -> Any:
        self.number += 1
        if self.number <= len(self.kept):
            return self.kept[self.number - 1]
        # A labeller or judge may draw: then the same numbers, whatever was made before
        set_seed(self.stage.args.seed + 1_000_003 * self.number)
        content = make()
        text = json.dumps({"content": content, "seconds": self.stage.seconds})

        def write(folder: Path) -> None:
            (folder / PART).write_text(text, encoding="utf-8")

        self.stage.begin()
        save_checkpoint(self.stage.checkpoints, self.number, write, keep=self.number)
        return json.loads(text)["content"]
