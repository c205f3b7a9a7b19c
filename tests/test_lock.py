"""One run a folder: the second process is refused and told whose it is; the lock ends with its owner."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline import lock
from pipeline.errors import UserError

OWNER = """
import sys, time
from pathlib import Path
from pipeline.lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has the lock of `tmp_path`."""
    words = [sys.executable, "-c", OWNER, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, owner: subprocess.Popen) -> None:
    with pytest.raises(UserError) as refused:
        lock.hold(tmp_path)
    sentence = str(refused.value)
    assert re.search(rf"{tmp_path} is in use: process {owner.pid} on \S+ writes there since \d{{4}}-", sentence)
    assert f"end it with `kill {owner.pid}`" in sentence and "launcher was killed" in sentence
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / ".lock").exists()
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # for who has it already, nothing changes
    lock.release(tmp_path)
    assert not (tmp_path / ".lock").exists(), "nothing stays"
    lock.release(tmp_path)


def test_a_child_that_is_left_over_keeps_nobody_out(tmp_path: Path) -> None:
    """As the workers of a DataLoader, which are forked."""
    script = OWNER.replace("time.sleep(60)", "import os\nif os.fork():\n    os._exit(0)\ntime.sleep(20)")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, start_new_session=True)
    process.wait()
    try:
        lock.hold(tmp_path)
        lock.release(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_child_that_ends_in_good_order_does_not_free_the_folder(tmp_path: Path) -> None:
    lock.hold(tmp_path)
    if not (child := os.fork()):
        lock._release_all()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    other = subprocess.run(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"process {os.getpid()} on" in other.stderr
    lock.release(tmp_path)


def test_a_lock_without_words_and_a_system_without_locks(
    tmp_path: Path, owner: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").write_text("")  # its owner has not written yet
    with pytest.raises(UserError, match="another process writes there; wait for it or end it"):
        lock.hold(tmp_path)
    monkeypatch.setattr(lock, "fcntl", None)  # Windows
    lock.hold(tmp_path)


def test_a_folder_that_was_moved_takes_its_lock_away(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    folder.mkdir()
    lock.hold(folder)
    folder.rename(tmp_path / "old")
    folder.mkdir()
    lock.hold(folder)
    assert (folder / ".lock").exists()
    lock.release(folder)


def test_a_stage_is_refused_in_a_folder_that_is_in_use(tmp_path: Path) -> None:
    from pipeline.runtime.arguments import SFTArguments
    from pipeline.runtime.command_line import resolve
    from pipeline.runtime.record import Stage

    (tmp_path / "sft").mkdir()
    words = [sys.executable, "-c", OWNER, str(tmp_path / "sft")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"sft is in use: process {process.pid} on"):
            Stage(resolve(SFTArguments(run_dir=str(tmp_path))), "sft", {})
        assert sorted(p.name for p in (tmp_path / "sft").iterdir()) == [".lock"]
        process.kill()
    Stage(resolve(SFTArguments(run_dir=str(tmp_path))), "sft", {}).finish({})


def test_a_script_is_refused_too(tmp_path: Path, owner: subprocess.Popen) -> None:
    from ppo_tools import trainer

    trainer(tmp_path, save_steps=0, total_episodes=8).train()  # which writes nothing there
    with pytest.raises(UserError, match=f"is in use: process {owner.pid} on"):
        trainer(tmp_path, save_steps=1, total_episodes=8).train()
