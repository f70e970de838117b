"""The size of the network that is trained of found cells: measured on tensors without values, edge by edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from rnas.errors import RnasError
from rnas.genotype import Architecture, Cell, CellCodes, Edge, Genotype
from rnas.nas.derive import Limits, Size
from rnas.nets.count import macs, macs_of_pass, parameters
from rnas.nets.derived import DerivedNetwork
from rnas.nets.ops import operation, reductions
from rnas.settings import Search

TRIES = 1000
NOTHING = Size(0, 0)


def limits_of(settings: Search, classes: int, image_size: tuple[int, int]) -> Limits | None:
    """What `--max-params` and `--max-macs` ask for; None if nothing. RnasError if no network at all is so small."""
    if settings.max_params is None and settings.max_macs is None:
        return None
    target = Target(settings.target_cells, settings.target_channels, settings.space.nodes, classes, image_size)
    most = Size(*(math.inf if v is None else v for v in (settings.max_params, settings.max_macs)))
    base, of_edge = base_of(target, affine=True), {}
    for reduction, stride_2 in ((False, False), (True, False), (True, True)):
        for name in settings.space.operations:
            edge = (name, 0 if stride_2 else 2)
            added = [edge_at(place, edge, affine=True) for place in places(target) if place.reduction == reduction]
            of_edge[reduction, stride_2, name] = summed(NOTHING, added)
    limits = Limits(most, base, of_edge, lambda architecture: size_of(architecture, target))
    if not base.fits(most):
        raise limits.error(base)
    return limits


@dataclass(frozen=True)
class Target:
    """The network that is trained of cells that are yet to be found."""

    cells: int
    channels: int
    nodes: int
    classes: int
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a cell stands in it: with so many channels, and inputs of this size."""

    reduction: bool
    channels: int
    side: tuple[int, int]


def places(target: Target) -> Iterator[Place]:
    """Of all cells."""
    channels, (height, width) = target.channels, target.image_size
    for i in range(target.cells):
        reduction = i in reductions(target.cells)
        channels *= 2 if reduction else 1
        yield Place(reduction, channels, (height, width))
        height, width = (height // 2, width // 2) if reduction else (height, width)


def size_of(architecture: Architecture, target: Target) -> Size:
    """The parts' sum; of an architecture whose cells are each its own, the network of just these cells."""
    cells = architecture.depth or target.cells
    target = Target(cells, target.channels, target.nodes, target.classes, target.image_size)
    size = base_of(target, architecture.affine)
    for i, place in enumerate(places(target)):
        edges = [edge for node in architecture.cell(i, place.reduction).nodes for edge in node]
        size = summed(size, [edge_at(place, edge, architecture.affine) for edge in edges])
    return size


def summed(size: Size, added: list[Size]) -> Size:
    for one in added:
        size = size.plus(one)
    return size


@cache
def base_of(target: Target, affine: bool) -> Size:
    """Of the network whose edges count nothing: pools, or with codes one skip a cell, which is taken off again."""
    nodes, concat = target.nodes, tuple(range(2, target.nodes + 2))
    free: Architecture = Genotype(*(Cell(((("max_pool_3x3", 0),),) * nodes, concat) for _ in range(2)))
    if not affine:
        free = CellCodes((tuple("10" if source == 0 else "00" for node in range(nodes) for source in range(node + 2)),))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = DerivedNetwork(free, target.classes, target.cells, target.channels)
        size = Size(parameters(net), macs(net, target.image_size))
    if affine:
        return size
    skips = summed(NOTHING, [edge_at(p, ("skip_connect", 0), affine) for p in places(target) for _ in range(nodes)])
    return Size(size.params - skips.params, size.macs - skips.macs)


def edge_at(place: Place, edge: Edge, affine: bool) -> Size:
    """What an edge adds to the network."""
    name, source = edge
    stride = 2 if place.reduction and source < 2 else 1
    side = place.side if stride == 2 or not place.reduction else (place.side[0] // 2, place.side[1] // 2)
    return _of_operation(name, place.channels, stride, side, affine)


@cache
def _of_operation(name: str, channels: int, stride: int, side: tuple[int, int], affine: bool) -> Size:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = operation(name, channels, stride, affine)
        return Size(parameters(module), macs_of_pass(module, torch.zeros(1, channels, *side)))


def first_that_fits(draw: Callable[[], Architecture], limits: Limits | None) -> Architecture:
    """The first drawn architecture whose network fits: so uniform draws stay uniform. RnasError if none does."""
    if limits is None:
        return draw()
    smallest = Size(math.inf, math.inf)
    for _ in range(TRIES):
        architecture = draw()
        size = limits.size(architecture)
        if size.fits(limits.most):
            return architecture
        smallest = min(smallest, size)
    raise RnasError(f"{limits.error(smallest)} (of {TRIES:,} that were drawn)")
