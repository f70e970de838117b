"""A GPU for the tests where there is none: `RNAS_EMULATED_GPU=1 pytest …`; `make emulated-gpu` runs those marked `gpu`.

`device.cpp` is the device; here it is compiled, loaded before torch, and put behind `torch.cuda`. A CUDA graph is a
tape of the operations between its beginning and its end. Times on it mean nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "emulated GPU"
MEMORY = 2**36  # bytes
BUILD = Path(__file__).parents[2] / "build" / "emulated-gpu"


def compiled() -> Path:
    """`device.cpp` as a library for the installed torch; made once for each of either."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    if list((torch / "lib").glob("libtorch_cuda*")):
        sys.exit("RNAS_EMULATED_GPU: this torch is built for real GPUs; the emulated one needs torch's CPU build")
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode() + str(torch).encode()).hexdigest()[:16]
    library = BUILD / f"{key}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = BUILD / f"{key}.{os.getpid()}.so"
        include = [f"-isystem{torch / 'include'}", f"-isystem{torch / 'include/torch/csrc/api/include'}"]
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(part), *link]
        subprocess.run(command, check=True)
        part.replace(library)
    return library


if "torch" in sys.modules:
    sys.exit("RNAS_EMULATED_GPU: torch was imported before the emulated GPU")
device = ctypes.CDLL(str(compiled()))
device.memory_allocated.restype = device.max_memory_allocated.restype = ctypes.c_long

import torch  # noqa: E402

from tape import Tape  # noqa: E402


class Stream:
    """Everything happens in order, at once."""

    def wait_stream(self, other: Stream) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class CUDAGraph:
    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        self.tape.replay()


class Recording:
    """`torch.cuda.graph`: what happens inside is kept; nothing may wait, and no number counts as drawn."""

    def __init__(self, graph: CUDAGraph, stream: Stream | None = None):
        self.graph = graph

    def __enter__(self) -> None:
        self.drawn = torch.cuda.get_rng_state()
        device.refuse_waiting(True)
        self.graph.tape.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.tape.__exit__(*error)
        device.refuse_waiting(False)
        torch.cuda.set_rng_state(self.drawn)


def nothing(*args: object, **options: object) -> None: ...


current = Stream()
emulated = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": nothing,
    "_lazy_call": lambda call, **options: call(),
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_exchange_device": lambda index: 0,
    "_maybe_exchange_device": lambda index: 0,
    "get_device_name": lambda of=None: NAME,
    "get_device_properties": lambda of=None: SimpleNamespace(name=NAME, total_memory=MEMORY),  # torch._dynamo asks
    "is_bf16_supported": lambda *options: True,  # autocast asks
    "synchronize": nothing,
    "empty_cache": nothing,
    "mem_get_info": lambda of=None: (MEMORY - device.memory_allocated(), MEMORY),
    "memory_allocated": lambda of=None: device.memory_allocated(),
    "max_memory_allocated": lambda of=None: device.max_memory_allocated(),
    "reset_peak_memory_stats": lambda of=None: device.reset_peak_memory_stats(),
    "set_sync_debug_mode": lambda mode: device.refuse_waiting(mode == "error"),
    "Stream": Stream,
    "stream": lambda stream: stream,
    "current_stream": lambda of=None: current,
    "set_stream": nothing,
    "CUDAGraph": CUDAGraph,
    "graph": Recording,
}
for name, value in emulated.items():
    setattr(torch.cuda, name, value)
    if hasattr(torch.cuda.random, name):
        setattr(torch.cuda.random, name, value)
torch.cuda.default_generators = (torch.Generator("cuda"),)
