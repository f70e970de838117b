"""A GPU for the tests where there is none: `RNAS_EMULATED_GPU=1 pytest …`; `make emulated-gpu` runs those marked `gpu`.

`device.cpp` is the device; here it is compiled, loaded before torch, and put behind `torch.cuda`. A CUDA graph is a
tape of the operations between its beginning and its end. Times on it mean nothing. Where it cannot be had, importing
this raises an ImportError that says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[2] / "build" / "emulated-gpu"
NAME = "emulated GPU"
MEMORY = 2**36  # bytes


def compiled() -> Path:
    """`device.cpp` as a library for the installed torch; made once for each source, torch and way of compiling."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    if list((torch / "lib").glob("libtorch_cuda*")):
        raise ImportError("this torch is built for real GPUs: the emulated one needs torch's CPU build")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise ImportError("no C++ compiler is found: set CXX to one")
    include = [f"-isystem{torch / 'include'}", f"-isystem{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    command = [*compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *include, str(SOURCE), *link]
    made_from = [SOURCE.read_text(encoding="utf-8"), version("torch"), *command]
    library = BUILD / f"{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        if subprocess.run([*command, "-o", str(part)], check=False).returncode:
            sys.exit(f"{SOURCE} cannot be compiled: see above")
        part.replace(library)
    return library


if "torch" in sys.modules:
    sys.exit("torch was imported before the emulated GPU")
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


class Waiting:
    """`set_sync_debug_mode`: whether what makes the host wait is refused."""

    refused = False
    recording = False

    def set_mode(self, mode: str) -> None:
        if mode not in ("default", "error"):
            raise ValueError(f"sync debug mode {mode!r}: the emulated GPU knows 'default' and 'error'")
        self.refused = mode == "error"
        self.settle()

    def settle(self) -> None:
        device.refuse_waiting(self.refused or self.recording)

    def synchronize(self, of: object = None) -> None:
        if self.recording:
            raise RuntimeError("operation not permitted when stream is capturing")


waiting = Waiting()


class CUDAGraph:
    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        self.tape.replay()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class Recording:
    """`torch.cuda.graph`: what happens inside is kept; nothing may wait, and no number counts as drawn."""

    def __init__(self, graph: CUDAGraph, pool: tuple[int, int] | None = None, stream: Stream | None = None):
        self.graph = graph

    def __enter__(self) -> None:
        self.drawn = torch.cuda.get_rng_state()
        waiting.recording = True
        waiting.settle()
        self.graph.tape.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.tape.__exit__(*error)
        waiting.recording = False
        waiting.settle()
        torch.cuda.set_rng_state(self.drawn)


def get_rng_state(of: object = "cuda") -> torch.Tensor:
    if waiting.recording:
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture.")
    return torch.cuda.default_generators[0].get_state()


def new_storage(cls: type, *size: int, device: torch.device | str = "cpu", **options: Any) -> torch.UntypedStorage:
    """`torch.UntypedStorage`, for copies and files: torch's CPU build makes none on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.empty(*(size or (0,)), dtype=torch.uint8, device=device).untyped_storage()
    return torch._C.StorageBase.__new__(cls, *size, device=device, **options)


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
    "get_device_properties": lambda of=None: SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=0, minor=0
    ),  # torch._dynamo asks; so old a one has no Triton
    "is_bf16_supported": lambda *options: True,  # autocast asks
    "get_rng_state": get_rng_state,
    "synchronize": waiting.synchronize,
    "empty_cache": nothing,
    "mem_get_info": lambda of=None: (MEMORY - device.memory_allocated(), MEMORY),
    "memory_allocated": lambda of=None: device.memory_allocated(),
    "max_memory_allocated": lambda of=None: device.max_memory_allocated(),
    "reset_peak_memory_stats": lambda of=None: device.reset_peak_memory_stats(),
    "set_sync_debug_mode": waiting.set_mode,
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
torch.UntypedStorage.__new__ = new_storage
torch.cuda.default_generators = (torch.Generator("cuda"),)
