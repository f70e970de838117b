"""The speed benchmarks, one after the other: on a CPU their quick forms, a few minutes; on a GPU the whole tables.

    python -m benchmarks            all of them
    python -m benchmarks NAME...    some of: search_step, train_step; on a GPU also data (a batch's share), compiled

Results: results/quick-NAME.json, and results/NAME-DEVICE.json of a GPU. Each is a program of its own with more options
(`python -m benchmarks.search_step --help`); so are `kernels.py` and `triton_kernels.py`, which count and time nothing,
`profiled.py`, `depthwise.py`, `kept_memory.py`, `methods.py`, `image_cache.py`; `attacks.py` and the rest of `data.py`
take longer and need data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import compiled, data, search_step, train_step

RESULTS = Path(__file__).parent / "results"
Program = tuple[Callable[[list[str]], None], list[str]]
QUICK: dict[str, Program] = {
    "search_step": (search_step.main, ["--batch-size", "8", "--rounds", "2", "--memory-batch-size", "16"]),
    "train_step": (train_step.main, ["--batch-size", "2", "--rounds", "2"]),
}
ON_A_GPU: dict[str, Program] = {
    "search_step": (search_step.main, ["--device", "cuda"]),
    "train_step": (train_step.main, ["--device", "cuda"]),
    "data": (data.main, ["--parts", "share"]),
    "compiled": (compiled.main, ["--device", "cuda", "--networks", "supernet", "ResNet18", "RNAS-L"]),
}


def main(names: list[str]) -> int:
    if {"-h", "--help"} & {*names}:
        print(__doc__)
        return 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    programs = ON_A_GPU if gpu else QUICK
    unknown = [name for name in names if name not in programs]
    if unknown:
        print(f"unknown benchmark {', '.join(unknown)}: known are {', '.join(programs)}", file=sys.stderr)
        return 2
    for name in names or programs:
        run, arguments = programs[name]
        print(f"\n{name}")
        run([*arguments, "--json", str(RESULTS / file_name(name, gpu))])
    return 0


def file_name(name: str, gpu: str | None) -> str:
    """Of a benchmark's result on the device called `gpu`, or on a CPU."""
    return f"{name}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.json" if gpu else f"quick-{name}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
