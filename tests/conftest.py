"""One smoke run of the whole chain, made once a session by `make` itself; the tests of the stages read it."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the network
# The models here are tiny: a second thread gains nothing, and on a busy machine it waits for the first at every step.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and no failure because a machine is busy. `--hypothesis-profile search` draws others.
settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", settings.get_profile("fixed"), derandomize=False, max_examples=500)
# For `make mutants`, which asks only whether a test fails: not for the simplest input on which it does.
settings.register_profile("mutants", settings.get_profile("fixed"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("fixed")


def make(*words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run make in the project's root."""
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a run of the whole chain is slow, as what is marked so."""
    for item in items:
        if "smoke" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if "mutmut.state" in sys.modules:  # `make mutants`: the shortest first, for mostly one of them finds the mutant
        durations = sys.modules["mutmut.state"].state().duration_by_test
        files = Counter[Path]()
        for item in items:
            files[item.path] += durations.get(item.nodeid, 0.0)
        items.sort(key=lambda item: (files[item.path], durations.get(item.nodeid, 0.0)))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `make smoke`; the workers of pytest-xdist share one."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = base / "runs" / "smoke"
    with FileLock(base / "smoke.lock"):
        if (run / "make.seconds").exists():
            return run
        started = time.monotonic()
        done = make("smoke", f"RUN={run}")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (run / "make.log").write_text(done.stdout + done.stderr)
        (run / "make.seconds").write_text(f"{time.monotonic() - started:.1f}")
    return run


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision a process; what one file's stages set must not bind the next file."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
