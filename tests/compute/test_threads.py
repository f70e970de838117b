"""What the command line sets for its own process, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: with them there are few faults whatever malloc does
from rnas.compute import threads as process
process.settle()
import torch
def activations():
    kept = [torch.ones(2**20) for _ in range(8)]
for _ in range(3):
    activations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    activations()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 4096)
"""


def output(program: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "MALLOC_"))}
    run = [sys.executable, "-c", program]
    return subprocess.run(run, env={**kept, **environment}, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_to_be_used_again() -> None:
    # Pages of 4 KiB: ten times 32 MiB are 80,000. Unsettled, malloc may or may not ask for them again.
    assert int(output(FAULTS)) < 4000
    assert int(output(FAULTS, MALLOC_MMAP_THRESHOLD_="131072")) > 40_000, "what the environment says stays"


def test_threads_spin_briefly_unless_the_environment_says_otherwise() -> None:
    program = (
        "from rnas.compute import threads as process; process.settle(); import os; print(os.environ['GOMP_SPINCOUNT'])"
    )
    assert output(program) == "20000"
    assert output(program, GOMP_SPINCOUNT="7") == "7"


def test_the_library_leaves_the_process_alone() -> None:
    assert output("import rnas, rnas.settings, os; print('GOMP_SPINCOUNT' in os.environ)") == "False"
