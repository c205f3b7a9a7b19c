"""Work without a training loop, done in parts that are each kept on disk: a stage that was stopped does none again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from pipeline.checkpoint import fault_of, save_checkpoint, step_of
from pipeline.runtime.record import Stage

PART = "part.json"


class Parts:
    """The parts of a stage's work, in the order in which they are asked for; each is a checkpoint of its own."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.number = stage, 0
        self.kept: list[Any] = []
        for number in range(1, 1 + (step_of(stage.resume_from) if stage.resume_from else 0)):
            folder = stage.checkpoints / f"step-{number:08d}"
            if fault_of(folder):  # this one and those after it are made again
                break
            part = json.loads((folder / PART).read_text(encoding="utf-8"))
            self.kept.append(part["content"])
            stage.seconds_before = part["seconds"]

    @property
    def is_kept(self) -> bool:
        """Whether the next part is there already."""
        return self.number < len(self.kept)

    def get(self, make: Callable[[], Any]) -> Any:
        """The next part: what an earlier run kept of it, or what `make` returns, as JSON gives it back."""
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
