"""What keeping freed memory (`rnas.compute.threads`) is worth to the fast supernet's steps on a CPU.

    python -m benchmarks.kept_memory [--threads 1] [--rounds 9] [--json FILE]

Two processes take turns, step by step: one as the command line sets its own, one with malloc as it comes. Wall clock,
medians, batch 16 at the paper's supernet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.search_step import Steps
from benchmarks.timing import machine, positive, program, save
from rnas.compute.precision import Precision

STEPS = ("pgd", "weight", "alpha")
AS_IT_COMES = {"MALLOC_ARENA_TEST": "2"}  # means nothing, but that somebody has set malloc: then rnas does not


def worker(step: str) -> None:
    """Run `step` once for every line of input."""
    run = Steps("fast", 16, "cpu", Precision()).prepare(step)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started, flush=True)


def started(step: str, threads: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A worker that is ready."""
    command = [sys.executable, "-m", "benchmarks.kept_memory", "--worker", step, "--threads", str(threads)]
    unset = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    process = subprocess.Popen(
        command, env={**unset, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def seconds(process: subprocess.Popen[str]) -> float:
    """Of its next step."""
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(step: str, threads: int, rounds: int) -> dict[str, float]:
    """Median seconds of `step` with freed memory kept and not, and their ratio."""
    workers = {"kept": started(step, threads, {}), "as it comes": started(step, threads, AS_IT_COMES)}
    samples = [{name: seconds(process) for name, process in workers.items()} for _ in range(rounds)]
    for process in workers.values():
        process.communicate()
    medians = {name: statistics.median(s[name] for s in samples) for name in workers}
    return {**medians, "ratio": medians["as it comes"] / medians["kept"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker:
        worker(options.worker)
        return
    found = {step: measure(step, options.threads, options.rounds) for step in STEPS}
    for step, of in found.items():
        print(f"{step}: {of['ratio']:.2f} times as fast with freed memory kept ({of['kept']:.2f} s)")
    save(options.json, {"machine": {**machine("cpu"), "seconds_are": "wall clock"}, "steps": found})


if __name__ == "__main__":
    program(main)
