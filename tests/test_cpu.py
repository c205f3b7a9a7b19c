"""Memory that is kept, and two networks that learn at the same time: what they compute does not change."""

import platform
import subprocess
import sys
import threading

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import same, trainer, weights

from pipeline.model.hardware import side_by_side


@pytest.fixture(autouse=True)
def fresh_state():
    """One Accelerator state lives as long as the process; each test has a precision of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_call_has_its_share_of_threads_and_the_callers_modes(two_threads):
    together = threading.Barrier(2, timeout=20)  # breaks unless both run at once

    def found():
        together.wait()
        mode = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return *mode, torch.get_num_threads()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert side_by_side([found, found], at_once=True) == [(False, True, torch.bfloat16, 1)] * 2
    assert torch.get_num_threads() == 2
    assert side_by_side([lambda: threading.current_thread() is threading.main_thread()] * 2, False) == [True, True]


def test_a_failure_comes_out_and_the_threads_come_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1, lambda: 1 / 0], at_once=True)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_once_is_one_after_the_other_to_the_bit(tmp_path, precision, two_threads):
    """Several times: what threads of one process have in common, as autocast's state, shows only now and then."""

    def learned(number):
        made = trainer(
            tmp_path / str(number),
            mixed_precision=precision,
            total_episodes=16,
            ptx_coef=0.1,
            ptx_dataset=["t6 t7 t8", "t9 t7"],
            ptx_batch_size=2,
        )
        assert made.at_once
        for scores in ([1.0, 0.5] * 4, [0.3, 0.1, 2.0, -1.0] * 2):
            made.step([[3 + i, 7] for i in range(8)], [[8, 4 + i] + [10] * i + [1] for i in range(8)], scores)
        return weights(made.policy) | {f"critic.{k}": v for k, v in weights(made.critic).items()}, made.rows

    torch.set_num_threads(1)
    expected, rows = learned("alone")
    torch.set_num_threads(2)
    for number in range(6):
        found, found_rows = learned(number)
        assert same(found, expected)
        for one, other in zip(found_rows, rows, strict=True):
            timed = {name for name in one if "time" in name or "seconds" in name or "per_s" in name}
            assert {k: one[k] for k in one.keys() - timed} == {k: other[k] for k in other.keys() - timed}


def test_networks_that_share_weights_take_turns(tmp_path):
    from ppo_tools import critic, policy

    actor, judge = policy(), critic()
    judge.model.embed_tokens.weight = actor.model.embed_tokens.weight
    assert not trainer(tmp_path, models=(actor, judge)).at_once
    assert not trainer(tmp_path, share_trunk=True).at_once


FAULTS = """
import resource, sys
import torch
from pipeline.model.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(10):
        torch.ones(10**7)  # 40 MB, freed at once: above 32 MB glibc never keeps by itself
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_memory_is_kept_unless_the_user_has_set_the_allocator(monkeypatch):
    def faults(how, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 200
    assert faults("leave") > 90_000  # pages of 4 KB
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > 90_000
