"""What data cost: loading the real sets whole, decoding images with one and more processes, and a batch's share of a
training step.

    python -m benchmarks.data [UNPACK.PY] [--parts load decode share] [--scratch DIR] [--batch-size 128] [--json FILE]

UNPACK.PY writes the official layouts (by default that of the project's shared data); `load` and `decode` need it. Each
load runs in a fresh process. The parts that are measured replace those in FILE; each says on what machine it was
measured. `share` is measured on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import EPOCH, interleaved, machine, median, positive, program
from rnas.attacks import PGD
from rnas.data import Split, batches, images
from rnas.nets.zoo import build
from rnas.training.step import weight_step

HERE = Path(__file__).resolve().parent
PARTS = ("load", "decode", "share")
SETS = {"cifar10": "cifar10-bin", "tiny-imagenet": "tiny-folder"}
WORKERS = (1, 2, 4, 8, 16)
EPOCH_ROUNDS = 3

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


def unpacked(unpack: Path, layout: str, folder: str, *options: str) -> None:
    subprocess.run([sys.executable, unpack, layout, folder, *options], check=True, stdout=subprocess.DEVNULL)


def load_times(unpack: Path, scratch: Path) -> dict[str, Any]:
    """First start (everything is decoded) and three second starts (from the cache) of each set."""
    out: dict[str, Any] = {}
    for name, layout in SETS.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            unpacked(unpack, layout, folder)
            starts = []
            for _ in range(4):
                load = os.getloadavg()[0]
                done = subprocess.run([sys.executable, "-c", LOAD, name, folder], check=True, capture_output=True)
                starts.append(json.loads(done.stdout) | {"load_average": round(load, 1)})
            out[name] = {"first_start": starts[0], "second_starts": starts[1:]}
            print(name, json.dumps(out[name], indent=1))
    return out


def decode_scaling(unpack: Path, scratch: Path, per_class: int, rounds: int = 3) -> dict[str, Any]:
    """Images of Tiny-ImageNet (64x64, JPEG) decoded a second by 1, 2, … worker processes, in turn; the best of the
    rounds, which other programs disturbed least. The processor seconds say how the work divides even where they do: the
    workers' part is shared among them, the rest is the one process that gathers the images."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpacked(unpack, "tiny-images", folder, "--classes", "20", "--per-class", str(per_class))
        root = Path(folder)
        names = images.image_files(root, "train")
        passes: dict[int, list[dict[str, float]]] = {count: [] for count in WORKERS if count <= available}
        for _ in range(rounds):
            for count, measured in passes.items():
                start, before = time.perf_counter(), os.times()
                decoded = sum(1 for _ in images._by_workers(root, names, None, count))
                seconds, after = time.perf_counter() - start, os.times()
                assert decoded == len(names)
                own = after.user + after.system - before.user - before.system
                workers = after.children_user + after.children_system - before.children_user - before.children_system
                measured.append({"wall": round(seconds, 2), "workers": round(workers, 2), "gathering": round(own, 2)})
    return {
        "images": len(names),
        "cores_available": available,
        "images_per_second_by_workers": {
            str(n): round(len(names) / min(p["wall"] for p in m)) for n, m in passes.items()
        },
        "seconds": {str(count): measured for count, measured in passes.items()},
    }


def operations(epoch: Callable[[], object], device: str) -> dict[str, float]:
    """What an augmented batch calls of torch (views and allocations too), and on a GPU the kernels it launches: the
    mean of an epoch, its own draws included."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as profiled:
        epoch()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profiled.events() or []
    calls = [e.name for e in events if e.name.startswith("aten::") and e.cpu_parent is None]
    views = {"aten::slice", "aten::select", "aten::split", "aten::unbind", "aten::unfold", "aten::view", "aten::to"}
    counts = {"calls": len(calls), "of_them_no_view": sum(name not in views for name in calls)}
    if device == "cuda":
        counts["kernels"] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    return {what: round(count / EPOCH, 1) for what, count in counts.items()}


def batch_share(device: str, batch_size: int, size: int, networks: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of an augmented batch, and its share of one training step (20 cells, C = 36): ST, clean images, and
    AT, PGD-7. Medians; a batch's are those of an epoch as long as CIFAR-10's, of whose draws each bears its part, and
    a step's are interleaved. On a GPU each is waited for: what a queue of kernels would hide counts in full."""
    pixels = torch.empty(EPOCH * batch_size, 3, size, size, dtype=torch.uint8)
    pixels.random_(generator=torch.Generator().manual_seed(0))
    split = Split(pixels, torch.arange(len(pixels)) % 10).to(device)
    x, y = next(batches(split, batch_size, seed=0, augment=True, device=device))

    def epoch() -> None:
        for _ in batches(split, batch_size, seed=0, augment=True, device=device):
            pass

    batch = statistics.median(interleaved({"": epoch}, EPOCH_ROUNDS, device)[""]) / EPOCH
    out: dict[str, Any] = {"operations_per_batch": operations(epoch, device), "batch_ms": round(1e3 * batch, 3)}
    for name in networks:
        net = build(name, classes=10, image_size=size).to(device)
        parameters = list(net.parameters())
        optimizer = torch.optim.SGD(parameters, 1e-3)
        runs = {
            "ST": lambda n=net, p=parameters, o=optimizer: weight_step(n, p, o, None, x, y, 5.0),
            "AT": lambda n=net, p=parameters, o=optimizer: weight_step(n, p, o, PGD(steps=7), x, y, 5.0),
        }
        runs[
            "AT"
        ]()  # with the uncounted round two calls: the second tries to record the attack (`rnas.fast.recording`)
        seconds = {what: median(values) for what, values in interleaved(runs, rounds, device).items()}
        out[name] = {
            "step_ms": {what: round(1e3 * s, 1) for what, s in seconds.items()},
            "share": {what: round(batch / s, 5) for what, s in seconds.items()},
        }
        print(f"{name}, {size}x{size}, {out['batch_ms']} ms a batch:", json.dumps(out[name]))
    return out


def shares(options: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out: dict[str, Any] = {"device": device, "batch_size": options.batch_size}
    for size in options.sizes:
        out[f"{size}x{size}"] = batch_share(device, options.batch_size, size, options.networks, options.rounds)
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpack", nargs="?", type=Path, default=HERE.parents[1] / "shared" / "data" / "unpack.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--per-class", type=positive, default=500, help="training images a class to decode, of 20 classes"
    )
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--networks", nargs="+", default=["RNAS-L", "ResNet18"])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "data.json")
    options = parser.parse_args(arguments)
    measure = {
        "load": lambda: load_times(options.unpack, options.scratch),
        "decode": lambda: decode_scaling(options.unpack, options.scratch, options.per_class),
        "share": lambda: shares(options),
    }
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for part in options.parts:
        about = machine("cuda" if part == "share" and torch.cuda.is_available() else "cpu")
        about |= {"numpy": np.__version__, "pillow": PIL.__version__}
        if part != "share":
            about["seconds_are"] = "wall clock"
        result[part] = {"machine": about, **measure[part]()}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    program(main)
