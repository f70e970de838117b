"""How long the real data sets take to load, how much memory that needs, and what a batch costs beside a step.

    python benchmarks/data.py [UNPACK.PY] [--scratch DIR]

UNPACK.PY writes the official layouts (by default that of the project's shared data); without it only batches are
measured. Each load runs in a fresh process. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from rnas.data import Split, batches
from rnas.nets.zoo import build

HERE = Path(__file__).resolve().parent
SETS = {"cifar10": "cifar10-bin", "tiny-imagenet": "tiny-folder"}

LOAD = """
import json, os, resource, sys, time, torch, rnas.data
def peak():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
before, start, cpu = peak(), time.perf_counter(), sum(os.times()[:4])
d = rnas.data.load(sys.argv[1], root=sys.argv[2])
seconds, cpu, loaded = time.perf_counter() - start, sum(os.times()[:4]) - cpu, peak()
for s in (d.train, d.test):
    for x in torch.split(s.images, 1000):
        x.sum()
print(json.dumps({"train": len(d.train), "test": len(d.test), "classes": len(d.classes), "seconds": round(seconds, 2),
                  "cpu_seconds": round(cpu, 2), "peak_mib": {"torch alone": before, "loaded": loaded,
                  "every pixel touched": peak()}}))
"""


def load_times(unpack: Path, scratch: Path) -> dict[str, Any]:
    """First start (everything is decoded) and three second starts (from the cache) of each set."""
    out: dict[str, Any] = {}
    for name, layout in SETS.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            subprocess.run([sys.executable, unpack, layout, folder], check=True, stdout=subprocess.DEVNULL)
            starts = []
            for _ in range(4):
                load = os.getloadavg()[0]
                done = subprocess.run([sys.executable, "-c", LOAD, name, folder], check=True, capture_output=True)
                starts.append(json.loads(done.stdout) | {"load_average": round(load, 1)})
            out[name] = {"first_start": starts[0], "second_starts": starts[1:]}
            print(name, json.dumps(out[name], indent=1))
    return out


def batch_cost(device: str, size: int, batch_size: int = 128, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds of an augmented batch and of the cheapest step that it could feed: a clean forward and backward
    pass of a small network (RNAS-L with 8 cells of 16 channels). The two are measured in turn; medians."""
    n = 8 * batch_size
    images = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = Split(images, torch.arange(n) % 10).to(device)
    net = build("RNAS-L", classes=10, cells=8, channels=16).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def synchronize() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    loading, stepping = [], []
    for epoch in range(rounds):
        start = synchronize()
        got = list(batches(split, batch_size, seed=0, epoch=epoch, augment=True, device=device))
        loading.append((synchronize() - start) / len(got))
        x, y = got[0]
        start = synchronize()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        stepping.append(synchronize() - start)
    batch, step = statistics.median(loading), statistics.median(stepping)
    return {
        "device": device,
        "image_size": size,
        "batch_size": batch_size,
        "batch_ms": round(1e3 * batch, 3),
        "clean_step_ms": round(1e3 * step, 1),
        "share_of_clean_step": round(batch / step, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpack", nargs="?", type=Path, default=HERE.parents[1] / "shared" / "data" / "unpack.py")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    result = {
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads_of_torch": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "load": load_times(options.unpack, options.scratch) if options.unpack.exists() else None,
        "batch": [batch_cost(device, size) for device in devices for size in (32, 64)],
    }
    path = HERE / "results" / "data.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["batch"], indent=1))


if __name__ == "__main__":
    main()
