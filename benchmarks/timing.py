"""What the speed benchmarks share: interleaved timing, the machine's own rates, peak memory, a JSON with it all."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def clock(device: str) -> float:
    """Seconds: of processor time with one thread, which other programs disturb least, else of wall clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant in each round: A B C, A B C, …, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, run in variants.items():
            start = clock(device)
            run()
            if i:
                seconds[name].append(clock(device) - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def rates(device: str) -> dict[str, float]:
    """GFLOP/s of a float32 matrix product and GB/s of a copy, here and now."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    product = min(interleaved({"": lambda: [a @ b for _ in range(8)]}, 5, device)[""]) / 8
    copy = min(interleaved({"": lambda: target.copy_(source)}, 5, device)[""])
    return {"gemm_gflops": 2 * 1024**3 / product / 1e9, "copy_gb_per_s": 2 * 4 * 2**25 / copy / 1e9}


def peak_mib(device: str) -> float:
    """The most memory that this process has held so far (on a GPU: that its tensors took)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would start from that of the program which started this one
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


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
