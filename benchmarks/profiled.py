"""Where the time of a step goes: the share of each kind of work, by torch's profiler, one thread.

    python -m benchmarks.profiled [--batch-size 16] [--json FILE]

Variants and steps are those of `benchmarks.search_step`. The last share is of all that is no torch operation that
computes: Python, autograd, views and allocations. The profiler itself makes it larger than it is.
"""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.search_step import Steps
from benchmarks.timing import machine, positive, program, save
from rnas.compute.precision import Precision, full_precision

KINDS = {
    "backward of convolutions": ("convolution_backward",),
    "forward convolutions": ("convolution", "conv2d", "conv_depthwise"),
    "matrix products": ("mm", "linear", "matmul", "mv"),
    "pools": ("pool",),
}
"""What the names of their operations contain; the first that fits counts."""
ELEMENTWISE, REST = "BN, ReLU, elementwise, sums", "Python, autograd, the rest"
NO_WORK = re.compile(
    r"empty|new_empty|view|_unsafe_view|t$|transpose|permute|as_strided|reshape|slice|select|split|chunk|unbind|expand|"
    "detach|resize|to$|contiguous"
)
VARIANTS, STEPS = ("published", "fast"), ("pgd", "weight")


def kind_of(event: str) -> str:
    """The kind of work of an event that the profiler calls so."""
    operation = event.removeprefix("aten::")
    if operation == event or NO_WORK.match(operation):
        return REST
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), ELEMENTWISE)


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of work in `run`, after a run that does not count."""
    run()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run()
    spent: collections.Counter[str] = collections.Counter(dict.fromkeys((*KINDS, ELEMENTWISE, REST), 0))
    for event in seen.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: time / spent.total() for kind, time in spent.items()}


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {
        f"{step}, {variant}": profiled(Steps(variant, options.batch_size, "cpu", Precision()).prepare(step))
        for step in STEPS
        for variant in VARIANTS
    }
    print(f"{'share of the time':28}" + "".join(f"{name:>20}" for name in found))
    for kind in (*KINDS, ELEMENTWISE, REST):
        print(f"{kind:28}" + "".join(f"{of[kind]:>20.0%}" for of in found.values()))
    save(options.json, {"machine": machine("cpu"), "batch_size": options.batch_size, "shares": found})


if __name__ == "__main__":
    program(main)
