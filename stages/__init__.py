"""One module a stage; each runs alone: `python -m stages.sft --config configs/stories/sft.yaml`."""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name} before the work began\n".encode())
    os._exit(128 + number)


if sys.argv[:1] == [
    "-m"
]:  # run by `python -m`: the libraries take seconds to load, pipeline.runtime.signals takes over
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler, which counts memory, prints lines of its own
