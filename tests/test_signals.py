"""SIGTERM, Ctrl-C and a dead launcher, on small programs of their own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

BEGIN = """
import contextlib, hashlib, os, signal, sys, time
from pipeline.runtime import signals
signals.ECHO, signals.PERIOD = 0.05, 0.05
def compute():  # a library's long computation, in which the main thread hears of no signal
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def ready():
    print(os.getpid(), flush=True)
"""


def start(body: str) -> subprocess.Popen[str]:
    """A program that runs `body`, begun and waiting."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:  # as a terminal starts it: tests in the background, or under nohup, ignore these, and hand that on
        process = subprocess.Popen([sys.executable, "-c", BEGIN + body], cwd=ROOT, **pipes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert process.stdout is not None and process.stdout.readline().strip() == str(process.pid)
    return process


def ends_in(process: subprocess.Popen[str], seconds: float = 5) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out + err


DEFERRED = """
with signals.watching():
    try:
        with signals.deferred():
            ready()
            while not signals.asked():
                time.sleep(0.01)
            print("a step is finished")
        print("not reached")
    except signals.Stopped as stopped:
        print(stopped, stopped.code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_loop_finishes_its_step(number: signal.Signals) -> None:
    process = start(DEFERRED)
    process.send_signal(number)
    code, said = ends_in(process)
    last = "the same command goes on from the last checkpoint, if there is one"
    assert code == 0 and said == f"a step is finished\nstopped by {number.name}; {last} {128 + number}\n"


def test_without_a_loop_it_ends_where_it_is() -> None:
    process = start("""
with signals.watching():
    try:
        ready()
        time.sleep(60)
    except KeyboardInterrupt as stopped:
        print("asked", signals.asked(), stopped.kept)
print("after", signals.asked(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""")
    process.send_signal(signal.SIGTERM)
    assert ends_in(process) == (0, "asked 15 None\nafter 0 True\n")


def test_an_evaluation_inside_a_loop_is_broken_off_and_the_loop_can_save() -> None:
    process = start("""
with signals.watching():
    with signals.deferred():
        try:
            with signals.at_once():
                ready()
                time.sleep(60)
        except signals.Stopped as stopped:
            time.sleep(0.2)
            print("saved")
""")
    process.send_signal(signal.SIGTERM)
    code, said = ends_in(process)
    assert said.startswith("saved\n") and code == 0


@pytest.mark.parametrize("where", ["signals.deferred()", "contextlib.nullcontext()"])
def test_a_second_signal_ends_it_inside_a_long_computation(where: str) -> None:
    process = start(f"with signals.watching(), {where}:\n    ready()\n    compute()")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, said = ends_in(process)
    assert code == 143 and "stopped by SIGTERM; a second signal: left at once" in said


def test_signals_of_one_moment_are_one_signal() -> None:
    """`timeout` sends two: one to the process, one to its group."""
    process = start(DEFERRED)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, said = ends_in(process)
    assert code == 0 and said.startswith("a step is finished")


def test_one_signal_ends_what_does_not_listen_after_a_while() -> None:
    process = start("signals.GRACE = 0.3\nwith signals.watching():\n    ready()\n    compute()")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, said = ends_in(process)
    assert code == 143 and said.count("stopped by SIGTERM") == 1


def test_nohup_still_works() -> None:
    process = start("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
with signals.watching():
    ready()
    time.sleep(0.3)
print("on")
""")
    process.send_signal(signal.SIGHUP)
    assert ends_in(process) == (0, "on\n")


def test_the_end_of_a_forked_child_is_its_own() -> None:
    process = start("""
import multiprocessing
with signals.watching(), signals.deferred():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.1)
    child.terminate()  # as a pool does
    child.join()
    ready()
    time.sleep(0.2)
    print(child.exitcode, signals.asked())
""")
    assert ends_in(process) == (0, "-15 0\n")


@pytest.mark.parametrize("deferred", [True, False])
def test_who_was_launched_does_not_outlive_the_launcher(tmp_path: Path, deferred: bool) -> None:
    where = "signals.deferred()" if deferred else "contextlib.nullcontext()"
    body = f"""
signals.GRACE = signals.GRACE_OF_AN_ORPHAN = 0.3
with signals.watching(launched=True), {where}:
    open({str(tmp_path / "begun")!r}, "w").close()
    compute()
"""
    words = [sys.executable, "-c", BEGIN + body]
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess\nsubprocess.run({words!r})"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 10
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.kill()
    _, said = launcher.communicate(timeout=10)  # ends with the worker, which has the pipe open as long as it lives
    assert "the launcher of this process is gone" in said and "stopped by SIGTERM" in said
