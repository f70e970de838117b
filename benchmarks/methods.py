"""What a step costs with the supernets and weights of other methods, in units of the dense supernet's.

    python -m benchmarks.methods [--batch-size 64] [--threads 1] [--rounds 5] [--json FILE]

The paper's supernet, the fast one, interleaved:
  dense    weights of all operations (RNAS, DARTS, SNAS, AdvRush)
  part 4   a quarter of the channels goes through the operations (PC-DARTS, DSRNA)
  one-hot  on each edge one operation by chance, `none` among them, the others known to be off (random)
  robnet   sep_conv_3x3 and skip_connect alone, each on or off by chance, drawn for each cell, and known; beside
           robnet, dense: all on
and the steps:
  weight   forward and backward for the network's weights (train mode)
  pgd      one step of an attack of seven, with its share of folding (eval mode)
  fold     the folding, which a new sample wants before every attack
In small batches the calls of a step cost more than what they compute, and these are as many with part of the channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.search_step import ATTACK_STEPS
from benchmarks.timing import (
    add_options,
    in_ms,
    interleaved,
    machine,
    median,
    program,
    ratio,
    save,
    settle,
    times,
)
from rnas.compute.precision import full_precision
from rnas.fast.supernet import FastSupernet
from rnas.nets.space import Shape, Weights
from rnas.settings import SearchSpace

ROBNET = SearchSpace(operations=("sep_conv_3x3", "skip_connect"))
STEPS = ("weight", "pgd", "fold")
BARS = {"part 4": ("dense", 0.5), "one-hot": ("dense", 1.0), "robnet": ("robnet, dense", 1.0)}
"""Of a variant: another one, and how many times as dear as that it may be."""


@dataclass(frozen=True)
class Variant:
    """A supernet, and how its weights are drawn for a pass."""

    shape: Shape
    draw: Callable[[Shape], Weights]


def dense(shape: Shape) -> Weights:
    """A softmax of all operations; what passes by them has weights like an edge's."""
    rows = [torch.randn(shape.space.edges, len(shape.space.operations)).softmax(-1) for _ in range(_rows(shape))]
    return Weights(tuple(rows), tuple(m.sum(1) for m in rows) if shape.part > 1 else None)


def one_hot(shape: Shape) -> Weights:
    """One operation on each edge."""
    operations = len(shape.space.operations)
    return known(F.one_hot(torch.randint(operations, (_rows(shape), shape.space.edges)), operations))


def coded(shape: Shape) -> Weights:
    """Every operation on or off."""
    return known(torch.randint(2, (_rows(shape), shape.space.edges, len(shape.space.operations))))


def known(mix: Tensor) -> Weights:
    """Weights of 0 and 1 (rows, edges, operations) that the host knows."""
    live = tuple(tuple(tuple(map(bool, edge)) for edge in row) for row in mix.tolist())
    return Weights(tuple(mix.float()), live=live)


def _rows(shape: Shape) -> int:
    return shape.space.cells if shape.per_cell else 2


VARIANTS = {
    "dense": Variant(Shape(SearchSpace()), dense),
    "part 4": Variant(Shape(SearchSpace(), part=4), dense),
    "one-hot": Variant(Shape(SearchSpace()), one_hot),
    "robnet, dense": Variant(Shape(ROBNET, per_cell=True), dense),
    "robnet": Variant(Shape(ROBNET, per_cell=True), coded),
}


class Steps:
    """The steps of a variant, with new weights for each."""

    def __init__(self, variant: Variant, batch_size: int):
        torch.manual_seed(0)
        self.variant = variant
        self.net = FastSupernet(variant.shape, 10)
        self.x = torch.rand(batch_size, 3, 32, 32)
        self.y = torch.arange(batch_size) % 10

    def weight(self) -> None:
        self.net.train().requires_grad_()
        loss = F.cross_entropy(self.net(self.x, self._weights()), self.y)
        torch.autograd.grad(loss, self.net.thetas, allow_unused=True)

    def fold(self) -> Callable[[Tensor], Tensor]:
        self.net.eval().requires_grad_(False)
        return self.net.frozen_view(self._weights())

    def pgd(self, view: Callable[[Tensor], Tensor]) -> None:
        x = self.x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(view(x), self.y), x)

    def _weights(self) -> Weights:
        return self.variant.draw(self.variant.shape)


def measure(batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of each step of each variant, and how many times as dear as its neighbour it is."""
    steps = {name: Steps(variant, batch_size) for name, variant in VARIANTS.items()}
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "weight": {name: of.weight for name, of in steps.items()},
        "fold": {name: of.fold for name, of in steps.items()},
        "pgd": {name: partial(_folded_anew, of) for name, of in steps.items()},
    }
    samples = {step: interleaved(of, rounds, "cpu") for step, of in runs.items()}
    seconds = {step: {name: median(values) or 0.0 for name, values in of.items()} for step, of in samples.items()}
    for name, folding in seconds["fold"].items():
        seconds["pgd"][name] += (1 / ATTACK_STEPS - 1) * folding
    against = {
        name: {step: ratio(seconds[step][name], seconds[step][other]) for step in STEPS}
        for name, (other, _) in BARS.items()
    }
    return {"seconds": seconds, "times_as_dear": against, "samples": samples}


def _folded_anew(steps: Steps) -> None:
    steps.pgd(steps.fold())


def report(run: dict[str, Any]) -> str:
    """A line for every variant: ms of each step, and times as dear as what it is measured by."""
    lines = [f"batch size {run['batch_size']}; ms", f"{'':16}" + "".join(f"{step:>10}" for step in STEPS)]
    for name in VARIANTS:
        lines.append(f"{name:16}" + "".join(f"{in_ms(run['seconds'][step][name]):>10}" for step in STEPS))
    for name, (other, bar) in BARS.items():
        of = run["times_as_dear"][name]
        shown = ", ".join(f"{step} {times(of[step])}{'' if of[step] <= bar else f' >{bar}'}" for step in STEPS[:2])
        lines.append(f"{name} against {other}: {shown}")
    return "\n".join(lines)


@full_precision()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=64, rounds=5)
    options = parser.parse_args(arguments)
    settle(options)
    result: dict[str, Any] = {"machine": machine("cpu"), "runs": []}
    for size in options.batch_size:
        run = {"batch_size": size, **measure(size, options.rounds)}
        result["runs"].append(run)
        print(report(run), flush=True)
        save(options.json, result)


if __name__ == "__main__":
    program(main)
