"""What the supernet's Triton kernels come to on a GPU, about, found without one.

    python -m benchmarks.triton_kernels [--steps pgd weight] [--batch-size 128] [--capability 90] [--json FILE]

A step of a search runs on torch's `meta` device, which computes nothing, and its launches are written down. All that is
different among them is compiled for NVIDIA GPUs of a compute capability (90: H100) and taken apart by the tools that
Triton brings along. Of each kernel: how often it is launched, and compiled; the most registers of a thread, and whether
some spill into memory; instructions of all its warps, and how many of them load from global memory (masked or not,
through whatever caches), where a loop counts as often as the arguments say. Seconds are no part of it: what waits for
what only a GPU can tell.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as e:
    print(f"triton_kernels: needs Triton, which there is for Linux ({e})", file=sys.stderr)
    sys.exit(2)

from benchmarks.search_step import PASSES, Steps
from benchmarks.timing import positive, program, save
from rnas.compute.precision import Precision
from rnas.errors import RnasError
from rnas.fast import supernet as fast
from rnas.fast import triton as fast_triton

Arguments = dict[str, Any]
Counts = dict[str, int]
"""Instructions: all, and those that load."""


@dataclass(frozen=True)
class Launch:
    kernel: Any
    programs: int
    arguments: Arguments
    """By name, of the kernel's own and the compiler's."""

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """Equal for launches of the same compiled kernel."""
        return self.kernel.__name__, *((name, _kind(self.kernel, name, a)) for name, a in self.arguments.items())


@dataclass(frozen=True)
class Compiled:
    registers: int
    spills: bool
    once: Counts
    """Outside of loops."""
    outer: Counts
    """In the loop around the innermost alone, each time."""
    loop: Counts
    """In the innermost, each time."""


@contextmanager
def written_down() -> Iterator[list[Launch]]:
    """Within, Triton launches nothing and what it would launch is listed."""
    launches: list[Launch] = []

    def launcher(kernel: Any, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
            launches.append(Launch(kernel, math.prod(grid), arguments))

        return launch

    with mock.patch.object(triton.runtime.KernelInterface, "__getitem__", launcher):
        yield launches


def launches_of(step: str, batch_size: int) -> list[Launch]:
    """What a step of a search launches; in the pgd step folding is left out."""
    steps = Steps("fast", batch_size, "meta", Precision())
    with mock.patch.object(fast, "backend_for", return_value=fast_triton.OnTriton()), written_down() as launches:
        run = steps.prepare(step)
        launches.clear()
        run()
    return launches


def _kind(kernel: Any, name: str, value: Any) -> object:
    """What the compiler is told of an argument."""
    if name not in kernel.arg_names or kernel.params[kernel.arg_names.index(name)].is_constexpr:
        return value
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compiled(launch: Launch, capability: int) -> Compiled:
    """The launch's kernel for such GPUs."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants, aligned = {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        kind = signature[name] = _kind(kernel, name, launch.arguments[name])
        if parameter.is_constexpr or kind is None:
            signature[name], constants[i,] = "constexpr", kind
        elif str(kind).startswith("*"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {name: value for name, value in launch.arguments.items() if name not in kernel.arg_names}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = usage(binary.asm["cubin"])
    return Compiled(registers, stack > 0, *counted(binary.asm["sass"]))


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def counted(sass: str) -> tuple[Counts, Counts, Counts]:
    """Instructions outside of loops, around the innermost and in it, of a kernel as disassembled: a line for each
    instruction and label."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in sass.splitlines():
        if label := re.match(r"(LBB\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\S+:\S+\t(?:@!?\S+ )?([A-Z0-9]+)\S* ?(.*);", line):
            name, operands = instruction.groups()
            target = re.search(r"(LBB\d+)", operands)
            names.append(name)
            if name == "BRA" and target and labels.get(target[1], len(names)) < len(names) - 1:
                loops.append(range(labels[target[1]], len(names)))
    # The smallest: a loop that the compiler unrolled is followed by another for what is left.
    innermost = min(loops, key=len, default=range(0))
    around = [loop for loop in loops if len(loop) > len(innermost) and set(innermost) <= set(loop)]
    others = {i for loop in loops if loop not in around for i in loop}
    outer = {i for loop in around for i in loop} - others
    once = set(range(len(names))) - outer - others
    return _counts([names[i] for i in once]), _counts([names[i] for i in outer]), _counts([names[i] for i in innermost])


def _counts(names: Sequence[str]) -> Counts:
    return {"instructions": len(names), "loads": sum(name in ("LDG", "LDL") for name in names)}


def trips(a: Arguments) -> tuple[int, int]:
    """How often the innermost loop of a kernel with these arguments runs for each time of the one around it, if there
    is one, and how often that does."""
    if "share" in a and "COLUMNS" in a:  # BN: the pixels of the images of a chunk
        return int(triton.cdiv(a["PIXELS"], a["COLUMNS"])), int(triton.cdiv(a["share"], a["ROWS"]))
    if "share" in a:  # a kernel's gradient: the images of a share, tile by tile
        bands = triton.cdiv(a["H_OUT"], a["ROWS"] * a["STEP"]) * a["STEP"]
        return int(a["share"]), int(triton.cdiv(bands * a["W_OUT"], a["P"]))
    return int(a.get("edges", a["c"])), 1


def measure(steps: Sequence[str], batch_size: int, capability: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each step, of each of its kernels."""
    known: dict[tuple[object, ...], Compiled] = {}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for step in steps:
        of_step = result[step] = {}
        different: dict[str, set[tuple[object, ...]]] = {}
        for launch in launches_of(step, batch_size):
            key = launch.compiled_for
            if key not in known:
                known[key] = compiled(launch, capability)
            found, name = known[key], launch.kernel.__name__.strip("_")
            different.setdefault(name, set()).add(key)
            of = of_step.setdefault(
                name, {"launches": 0, "registers": 0, "spills": False, "instructions": 0, "loads": 0}
            )
            of["launches"] += 1
            of["compiled"] = len(different[name])
            of["registers"] = max(of["registers"], found.registers)
            of["spills"] |= found.spills
            warps = launch.programs * launch.arguments["num_warps"]
            inner, outer = trips(launch.arguments)
            for what in ("instructions", "loads"):
                of[what] += warps * (found.once[what] + outer * (found.outer[what] + inner * found.loop[what]))
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=tuple(PASSES), default=["pgd", "weight"])
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--capability", type=int, default=90, choices=(80, 86, 89, 90))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RnasError("Triton compiles nothing while TRITON_INTERPRET is set in the environment: unset it")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}):
        result = measure(options.steps, options.batch_size, options.capability)
    print(f"{'step':12}{'kernel':20}launches  compiled  registers      instructions, millions  of them loads")
    for step, kernels in result.items():
        for name, of in sorted(kernels.items(), key=lambda item: -item[1]["instructions"]):
            registers = f"{of['registers']}{' (spill)' if of['spills'] else ''}"
            print(
                f"{step:12}{name:20}{of['launches']:8}{of['compiled']:10}  {registers:15}"
                f"{of['instructions'] / 1e6:22,.0f}{of['loads'] / 1e6:15,.0f}"
            )
        total = {what: sum(of[what] for of in kernels.values()) for what in ("launches", "instructions", "loads")}
        sums = f"{total['instructions'] / 1e6:22,.0f}{total['loads'] / 1e6:15,.0f}"
        print(f"{step:12}{'all':20}{total['launches']:8}{'':27}{sums}")
    save(
        options.json,
        {
            "batch_size": options.batch_size,
            "capability": options.capability,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "steps": result,
        },
    )


if __name__ == "__main__":
    program(main)
