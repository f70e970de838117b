"""What operations cost in a supernet's cells, as SNAS counts it (Xie et al. 2019)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from rnas.nets.ops import reductions
from rnas.settings import SearchSpace


class OperationCost(NamedTuple):
    """Of one operation on one image."""

    size: int
    """Weights of its convolutions."""
    flops: int
    """Their multiply-accumulates; of a pool, the 9 values that each output looks at."""
    mac: int
    """Memory access cost: numbers that are read or written."""


def operation_cost(name: str, channels: int, pixels: int, stride: int) -> OperationCost:
    """Of `channels` channels and so many output `pixels` of each."""
    c, maps = channels, channels * pixels
    if name == "none":
        return OperationCost(0, 0, 0)
    if name == "skip_connect":
        return OperationCost(0, 0, 2 * maps) if stride == 1 else OperationCost(c * c, c * maps, 9 * maps + c * c)
    if "pool" in name:
        return OperationCost(0, 9 * maps, (2 if stride == 1 else 5) * maps)
    twice, k = name.startswith("sep"), int(name[-1])
    size = (c * k * k + c * c) * (2 if twice else 1)
    return OperationCost(size, size * pixels, ((8 if twice else 4) + (0 if stride == 1 else 3)) * maps + size)


@cache
def supernet_costs(space: SearchSpace, height: int, width: int) -> tuple[tuple[tuple[OperationCost, ...], ...], ...]:
    """Of every operation of every edge of every cell of a supernet, for images of this size."""
    reducing = reductions(space.cells)
    sources = [source for node in range(space.nodes) for source in range(node + 2)]

    def of_cell(cell: int) -> tuple[tuple[OperationCost, ...], ...]:
        halved = sum(r <= cell for r in reducing)
        channels, pixels = space.channels * 2**halved, height * width // 4**halved
        strides = [2 if cell in reducing and source < 2 else 1 for source in sources]
        return tuple(tuple(operation_cost(o, channels, pixels, stride) for o in space.operations) for stride in strides)

    return tuple(map(of_cell, range(space.cells)))
