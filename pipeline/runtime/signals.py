"""SIGTERM, Ctrl-C, a closed terminal, a launcher that is gone: the run keeps what it has, says so and ends.

The first signal raises Stopped where the main thread is. Inside `deferred` it waits: a training loop looks at `asked`
after each step, saves, and raises Stopped itself. A second signal ends the process at once. That is the work of a
thread, which also hears of a signal while the main thread is inside a long computation of a library.
"""

import contextlib
import functools
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PERIOD = 1.0  # seconds between two looks at the launcher
GRACE = 10.0  # seconds in which the main thread leaves by itself, where no step has to be finished
GRACE_OF_AN_ORPHAN = 30.0  # the same, a step included, once the launcher is gone
# Seconds within which a second signal is an echo of the first: `timeout` signals a process and then its whole group, a
# launcher hands on what its workers got too.
ECHO, ECHO_OF_A_LAUNCHER = 0.3, 2.0
# Who takes over the children of a process that is gone; in a container, process 1 may be the launcher itself.
INIT = re.compile(r"systemd|init|launchd|tini|dumb-init|docker-init|catatonit|s6-svscan")


class Stopped(KeyboardInterrupt):
    """A signal ended the run. `kept` is the checkpoint that was saved for it, None where there was nothing to save;
    `done` says how much of the work is in it, where its name does not."""

    def __init__(self, number: int, kept: Path | None = None, done: str = "") -> None:
        super().__init__()
        self.number, self.kept, self.done, self.code = number, kept, done, 128 + number

    def __str__(self) -> str:
        done = f"{self.done}, " if self.done else ""
        kept = f"{done}saved {self.kept}; the same command goes on from there" if self.kept else _WITHOUT_A_SAVE
        return f"stopped by {signal.Signals(self.number).name}; {kept}"


_WITHOUT_A_SAVE = "the same command goes on from the last checkpoint, if there is one"


class _Watch:
    """The signals of this process, from `begin` to `end`; made by the main thread."""

    def __init__(self, launched: bool) -> None:
        self.asked = 0  # number of the first signal
        self.deferring = self.raised = self.ended = False
        self.launcher = _launcher() if launched else None
        self.echo = ECHO_OF_A_LAUNCHER if launched else ECHO
        self.deadline = 0.0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def begin(self) -> None:
        _reset_in_children()
        watched = [signal.SIGTERM, signal.SIGINT]  # also where a shell has a job in the background ignore Ctrl-C
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            watched.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._handle) for number in watched}
        self.descriptor_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread.start()

    def end(self) -> None:
        self.deferring = True  # nothing is raised any more
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self.descriptor_before)
        self.ended = True
        os.write(self.writer, b"\0")  # wakes the thread
        self.thread.join()
        os.close(self.reader)
        os.close(self.writer)

    def end_in_child(self) -> None:
        """A forked process is no part of the run: a pool ends it with SIGTERM, and the pipe is its parent's."""
        signal.set_wakeup_fd(-1)
        for number in self.before:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def leave_deferred(self, deferring: bool) -> None:
        self.deferring, self.deadline = deferring, time.monotonic() + GRACE

    def stop_if_asked(self) -> None:
        if self.asked and not self.raised:
            self.raised = True
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if not self.deferring:
            self.stop_if_asked()

    def _listen(self) -> None:
        heard: list[float] = []
        number, orphaned, told = 0, 0.0, False
        while not self.ended:
            ready, _, _ = select.select([self.reader], [], [], PERIOD)
            now = time.monotonic()
            for signalled in os.read(self.reader, 64) if ready else b"":
                if signalled in self.before:
                    if not heard:
                        number, self.deadline = signalled, now + GRACE
                    heard.append(now)
            if heard and heard[-1] - heard[0] > self.echo:
                _leave(number, "a second signal: left at once, nothing was saved")
            if heard and self.deferring and not (ready or told):
                told = True
                _print_once(
                    f"{signal.Signals(number).name}: the run stops as soon as it can; a second signal ends it at once"
                )
            if heard and not self.deferring and now > self.deadline:
                _leave(number, _WITHOUT_A_SAVE)
            if self.launcher is not None and not orphaned and os.getppid() != self.launcher:
                orphaned = now
                _print_once("the launcher of this process is gone: the run stops")
                os.kill(os.getpid(), signal.SIGTERM)
            if orphaned and now > orphaned + GRACE_OF_AN_ORPHAN:
                _leave(signal.SIGTERM, _WITHOUT_A_SAVE)


_watch: _Watch | None = None


@contextlib.contextmanager
def watching(launched: bool = False) -> Iterator[None]:
    """Signals inside it end the run as the module says; with `launched`, so does the death of the parent process.

    Only the main thread of a POSIX process can watch; in any other, and inside another `watching`, nothing changes.
    """
    global _watch
    main = threading.current_thread() is threading.main_thread()
    if _watch is not None or os.name != "posix" or not main:
        yield
        return
    _watch = _Watch(launched)
    _watch.begin()
    try:
        yield
    finally:
        watch, _watch = _watch, None
        watch.end()


def asked() -> int:
    """Number of the signal that asked this process to end; 0 if none did."""
    return _watch.asked if _watch else 0


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside it a signal is only remembered, for a loop that looks at `asked`; at its end, Stopped is raised."""
    with _deferring(True):
        yield
    if _watch and not _watch.deferring:
        _watch.stop_if_asked()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A part of `deferred` that a signal may break off: Stopped is raised in it."""
    with _deferring(False):
        if _watch:
            _watch.stop_if_asked()
        yield


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[None]:
    if _watch is None:
        yield
        return
    before, _watch.deferring = _watch.deferring, value
    try:
        yield
    finally:
        if _watch:
            _watch.leave_deferred(before)


def _leave(number: int, why: str) -> None:
    """End the process from any thread, whatever the main one does."""
    if sys.stdout is not None and sys.stdout.isatty():
        _print("\x1b[?25h", end="")  # the cursor, which a progress bar hides
    _print(f"stopped by {signal.Signals(number).name}; {why}")
    os._exit(128 + number)


def _print_once(text: str) -> None:
    """Of several processes the main one says it."""
    if os.environ.get("RANK", "0") == "0":
        _print(text)


def _print(text: str, end: str = "\n") -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone too
        os.write(2, (text + end).encode())


def _launcher() -> int:
    """The process that launched this one; 0 where it is gone already, while this one was loading its libraries."""
    parent, first = os.getppid(), Path("/proc/1/cmdline")
    if parent == 1 and first.exists() and INIT.match(Path(os.fsdecode(first.read_bytes().split(b"\0")[0])).name):
        return 0
    return parent


@functools.cache  # once a process
def _reset_in_children() -> None:
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end_in_child()
