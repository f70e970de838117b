"""Whether `torch.compile` pays: the passes of training and of attacks, launched as they are and compiled.

    python -m benchmarks.compiled [--networks ResNet18 RNAS-L] [--cells 8] [--batch-size 16] [--json FILE]
    python -m benchmarks.compiled --device cuda --networks supernet ResNet18 RNAS-L --cells 20

  weight  forward and backward for the weights (train mode)
  attack  forward and backward for the images, of what an attack runs on: the network frozen
of networks for 32x32 images; `supernet`: the paper's, in its fast form. Interleaved, the ratio first: above 1, compiled
code is faster. With it the seconds that compiling took, and after how many passes they are won back. On a CPU this
needs a C++ compiler, and minutes for each network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.search_step import Steps
from benchmarks.timing import add_options, clock, fits, interleaved, machine, median, program, ratio, save, settle
from rnas.compute.device import choose_precision
from rnas.compute.freezing import Model, frozen
from rnas.compute.layout import arranged_for
from rnas.compute.precision import Precision, full_precision
from rnas.nets.derived import DerivedNetwork
from rnas.nets.space import uniform
from rnas.nets.supernet import Supernet
from rnas.nets.zoo import build

PASSES = ("weight", "attack")


class Uniform(nn.Module):
    """A supernet with as much of each operation as of any other."""

    def __init__(self, net: Supernet):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x, uniform(self.net.shape, x.device))
        return logits


def network(name: str, cells: int) -> nn.Module:
    """A member of the zoo, cell networks with `cells` cells; or the supernet."""
    if name == "supernet":
        return Uniform(Steps("fast", 1, "cpu", Precision()).net)
    torch.manual_seed(0)
    net = build(name, classes=10)
    return build(name, classes=10, cells=cells) if isinstance(net, DerivedNetwork) else net


def gradients(forward: Model, x: Tensor, y: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(forward(x), y), wanted)


def compare(plain: Model, fast: Model, x: Tensor, y: Tensor, wanted: list[Tensor], rounds: int) -> dict[str, Any]:
    """Seconds of a pass either way, and of compiling."""
    device = x.device.type
    runs: dict[str, Callable[[], object]] = {
        "launched": lambda: gradients(plain, x, y, wanted),
        "compiled": lambda: gradients(fast, x, y, wanted),
    }
    fits(runs["launched"])  # chooses kernels, so that compiling is timed alone
    started = clock(device)
    fits(runs["compiled"])
    compiling = clock(device) - started
    samples = interleaved(runs, rounds, device)
    seconds = {way: median(of) for way, of in samples.items()}
    launched, compiled = seconds["launched"], seconds["compiled"]
    return {
        "ratio": ratio(launched, compiled),
        "seconds": seconds,
        "compiling_seconds": compiling,
        "passes_to_win_it_back": passes_to_win_back(compiling, launched, compiled),
        "samples": samples,
    }


def passes_to_win_back(compiling: float, launched: float | None, compiled: float | None) -> float | None:
    """After how many passes the seconds of compiling are saved; None if never, or if a pass did not fit."""
    if launched is None or compiled is None or compiled >= launched:
        return None
    return compiling / (launched - compiled)


def measure(net: nn.Module, size: int, precision: Precision, rounds: int, backend: str) -> dict[str, Any]:
    """Both passes of `net`, on the device where it is."""
    device = next(net.parameters()).device
    x = arranged_for(net, torch.rand(size, 3, 32, 32, device=device))
    y = torch.arange(size, device=device) % 10
    parameters = [p for p in net.parameters() if p.requires_grad]
    net.train()
    compiled = torch.compile(net, dynamic=False, backend=backend)
    found = {"weight": compare(precision.of(net), precision.of(compiled), x, y, list(parameters), rounds)}
    with precision.autocast(device), frozen(net) as fixed:
        images = x.clone().requires_grad_()
        compiled = torch.compile(fixed, dynamic=False, backend=backend)
        found["attack"] = compare(precision.of(fixed), precision.of(compiled), images, y, [images], rounds)
    return found


def report(name: str, what: str, found: dict[str, Any]) -> str:
    if found["ratio"] is None:
        return f"{name}, {what}: no room"
    again = found["passes_to_win_it_back"]
    won = "never won back" if again is None else f"won back after {again:.0f} passes"
    launched, compiled = found["seconds"]["launched"], found["seconds"]["compiled"]
    return (
        f"{name}, {what}: {found['ratio']:.2f}x compiled ({1e3 * launched:.0f} ms, then {1e3 * compiled:.0f}); "
        f"compiling took {found['compiling_seconds']:.0f} s, {won}"
    )


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=16, rounds=5)
    parser.add_argument("--networks", nargs="+", default=["ResNet18", "RNAS-L"])
    parser.add_argument("--cells", type=int, default=8, help="of cell networks; compiling takes time for each")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args(arguments)
    settle(options)
    start = time.perf_counter()
    result: dict[str, Any] = {"machine": machine(options.device), "cells": options.cells, "runs": []}
    for precision in map(choose_precision, options.precision):
        for size in options.batch_size:
            run: dict[str, Any] = {"batch_size": size, "precision": precision.name}
            result["runs"].append(run)
            for name in options.networks:
                torch._dynamo.reset()
                net = network(name, options.cells).to(options.device)
                run[name] = measure(net, size, precision, options.rounds, options.backend)
                for what in PASSES:
                    print(report(name, what, run[name][what]), flush=True)
                save(options.json, result)  # what there is, if the rest is cut off
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    program(main)
