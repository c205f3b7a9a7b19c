"""One run a folder: a lock that ends with the process that has it, however that ends."""

import atexit
import contextlib
import datetime
import errno
import importlib
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

LOCK = ".lock"
# Not on Windows, where nothing is locked. A lock of this kind belongs to a process: neither a child of it nor what that
# child starts has it, so a DataLoader's worker that was left over keeps nobody out.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
_held: dict[Path, tuple[int, int]] = {}  # lock file → file descriptor, process


def hold(folder: Path) -> None:
    """Keep other processes from writing into `folder`, until `release` or the end of this process.

    For a process that has the lock already, nothing changes. Raises UserError, which names the owner, where another
    process has it. A file system that knows no locks is taken as it is.
    """
    path = folder.resolve() / LOCK
    while fcntl is not None and not _is_ours(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 10_000, 0)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder} is in use: {_sentence(owner)}") from None
            return
        if not _is_at(descriptor, path):  # its owner removed it in between: it is nobody's lock any more
            os.close(descriptor)
            continue
        _held[path] = descriptor, os.getpid()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without words
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _owner(), 0)


def release(folder: Path) -> None:
    """Give the lock of `folder` back and remove its file; nothing happens where this process does not have it."""
    path = folder.resolve() / LOCK
    descriptor, process = _held.pop(path, (-1, -1))
    if process == os.getpid():
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        release(path.parent)


def _is_ours(path: Path) -> bool:
    """Whether this process has the lock of the very file that is there now: its folder may have been moved."""
    descriptor, process = _held.get(path, (-1, -1))
    if process != os.getpid():
        return False
    if _is_at(descriptor, path):
        return True
    os.close(_held.pop(path)[0])
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _owner() -> bytes:
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": now, "command": command[:2000]}
    return json.dumps(owner).encode()


def _sentence(owner: bytes) -> str:
    try:
        found = json.loads(owner)
        who = f"process {found['pid']} on {found['host']} writes there since {found['started']} ({found['command']})"
        end = f"end it with `kill {found['pid']}`"
    except (ValueError, KeyError, TypeError):
        who, end = "another process writes there", "end it"
    return f"{who}; wait for it or {end} (it may have been left over when its launcher was killed), then start again"
