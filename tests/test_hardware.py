"""What this machine can do: memory that is kept."""

import platform
import subprocess
import sys

import pytest

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


@pytest.mark.slow
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
