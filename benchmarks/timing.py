"""What the speed benchmarks share: interleaved timing, the machine's own rates, peak memory, a JSON with it all."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rnas.compute.device import choose_device
from rnas.errors import RnasError

EPOCH = 390
"""Batches of 128 in an epoch of CIFAR-10: what an epoch draws once for all of them is shared by as many."""


def clock(device: str) -> float:
    """Seconds: of processor time with one thread, which other programs disturb least, else of wall clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant in each round: A B C, A B C, …, after one round that does not count.

    An empty list for a variant that does not fit into the GPU's memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    fitting = dict(variants)
    for i in range(rounds + 1):
        for name, run in list(fitting.items()):
            start = clock(device)
            if not fits(run):
                seconds[name] = []
                del fitting[name]
            elif i:
                seconds[name].append(clock(device) - start)
    return seconds


def fits(run: Callable[[], object]) -> bool:
    """Run it; whether the GPU's memory was enough."""
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def median(values: list[float]) -> float | None:
    """The median of a variant's seconds; None if it did not fit."""
    return statistics.median(values) if values else None


def ratio(a: float | None, b: float | None) -> float | None:
    """How many times `b` is `a`; None if either did not fit."""
    return None if a is None or b is None else round(a / b, 2)


def in_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"


def with_rate(seconds: float | None, size: int) -> str:
    """Milliseconds, and how many images a second that makes."""
    return "-" if seconds is None else f"{in_ms(seconds)} ({size / seconds:.1f})"


def times(value: float | None, bar: float | None = None) -> str:
    """A ratio for the terminal, and whether it meets its bar."""
    if value is None:
        return "no room"
    mark = "" if bar is None else " ok" if value >= bar else f" <{bar}"
    return f"{value:.2f}x{mark}"


def positive(text: str) -> int:
    """A number from the command line."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def program(main: Callable[[], object]) -> None:
    """Run a benchmark's `main`; bad input costs one sentence, as in rnas itself."""
    try:
        main()
    except RnasError as e:
        print(f"{Path(sys.argv[0]).stem}: {e}", file=sys.stderr)
        sys.exit(2)


def add_options(parser: argparse.ArgumentParser, batch_size: int, rounds: int) -> None:
    """The options that the speed benchmarks share. `batch_size`: on a CPU."""
    parser.add_argument("--batch-size", type=positive, nargs="+", help=f"default: {batch_size}; on a GPU 128 512")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="default: fp32; on a GPU both")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, default=None)
    parser.set_defaults(cpu_batch_size=batch_size)


def settle(options: argparse.Namespace) -> None:
    """Fill in what depends on the device, and set the number of threads."""
    gpu = choose_device(options.device).type == "cuda"
    options.batch_size = options.batch_size or ([128, 512] if gpu else [options.cpu_batch_size])
    options.precision = options.precision or (["fp32", "bf16"] if gpu else ["fp32"])
    torch.set_num_threads(options.threads)


def rates(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """GFLOP/s of a large matrix product in `dtype` and GB/s of a copy, here and now."""
    n, copied = (8192, 2**28) if device == "cuda" else (1024, 2**25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(copied, device=device)
    target = torch.empty_like(source)
    product = min(interleaved({"": lambda: [a @ b for _ in range(8)]}, 5, device)[""]) / 8
    copy = min(interleaved({"": lambda: target.copy_(source)}, 5, device)[""])
    return {"gemm_gflops": 2 * n**3 / product / 1e9, "copy_gb_per_s": 2 * 4 * copied / copy / 1e9}


def gpu_peak_mib(run: Callable[[], object]) -> float | None:
    """The most memory that `run` took on the GPU above what was taken before; None if it did not fit."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if fits(run) else None


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would start from that of the program which started this one
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def printed_by(program: str, arguments: list[str]) -> float:
    """The number that a benchmark prints in a process of its own, with one thread: its peak memory."""
    command = [sys.executable, "-m", program, *arguments, "--threads", "1"]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions, for the record."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 1),
        "seconds_are": "processor time" if device == "cpu" and torch.get_num_threads() == 1 else "wall clock",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write `result` as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
