"""Architectures read off the strengths of operations. Plain numbers: no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

from rnas.errors import RnasError
from rnas.genotype import Architecture, Cell, Edge, Genotype
from rnas.settings import SearchSpace

Strength = Sequence[Sequence[float]]
"""(edges, operations) of a cell: how much there is of each, 0 for what is pruned. `none` counts: an edge where it is
strong is weak."""


class Size(NamedTuple):
    """Of a network, or of what a choice adds to it."""

    params: float
    """Parameters."""
    macs: float
    """Multiply-accumulates for one image."""

    def plus(self, other: Size) -> Size:
        return Size(self.params + other.params, self.macs + other.macs)

    def fits(self, most: Size) -> bool:
        return self.params <= most.params and self.macs <= most.macs


@dataclass(frozen=True)
class Limits:
    """How large the trained network may be, and what its size is made of (`rnas.nas.sizes` measures it)."""

    most: Size
    """Infinite where there is no limit."""
    base: Size
    """Of the network without the operations on its edges."""
    of_edge: Mapping[tuple[bool, bool, str], Size]
    """(of a reduction cell, with stride 2, operation): what such an edge adds, over all cells of the network."""
    size: Callable[[Architecture], Size]
    """Of the network of an architecture."""

    def added(self, reduction: bool, edge: Edge) -> Size:
        """What an edge of a cell adds."""
        operation, source = edge
        return self.of_edge[reduction, reduction and source < 2, operation]

    def error(self, smallest: Size) -> RnasError:
        """That nothing fits; the smallest network is so large."""
        wanted = [
            f"{name} is {most:,}, and the least is {least:,.0f}"
            for name, most, least in (
                ("max-params", self.most.params, smallest.params),
                ("max-macs", self.most.macs, smallest.macs),
            )
            if most < float("inf")
        ]
        return RnasError(f"no network of the cells to choose from fits: {'; '.join(wanted)}")


def discretise(
    space: SearchSpace, normal: Strength, reduce: Strength, keep: int = 2, limits: Limits | None = None
) -> Genotype:
    """Per node the `keep` incoming edges whose strongest operation besides `none` is strongest, with that operation.

    That is the choice of edges and operations with the largest sum of strengths. With `limits` it is the one with the
    largest sum among those whose network fits, exactly (docs/decisions/027).

    RnasError if nothing is left that enters a node, or if nothing fits.
    """
    genotype = Genotype(_strongest(space, normal, keep, "normal"), _strongest(space, reduce, keep, "reduction"))
    if limits is None or limits.size(genotype).fits(limits.most):
        return genotype
    return _strongest_within(space, (normal, reduce), keep, limits)


def all_edges(space: SearchSpace, normal: Strength, reduce: Strength) -> Genotype:
    """Every edge with its strongest operation; one where that is `none` is left out. Where so much is left out that
    nothing would enter a node, its edge with the strongest other operation stays.

    RnasError if all operations that enter a node are pruned.
    """
    return Genotype(_every(space, normal, "normal"), _every(space, reduce, "reduction"))


def cap_skips(
    space: SearchSpace, normal: Strength, limit: int, choose: Callable[[Strength], Cell] | None = None
) -> list[list[float]]:
    """The strengths of a normal cell without those of so many weak skips that `choose`, by default as `discretise`,
    keeps `limit` at most.

    One goes at a time, the weakest of those that are kept; then operations and edges are chosen anew, so another skip
    may come in. RnasError if nothing is left that enters a node.
    """
    choose = choose or (lambda rows: _strongest(space, rows, 2, "normal"))
    rows = [list(row) for row in normal]
    while True:
        nodes = choose(rows).nodes
        kept = [
            _first_row(node) + source for node, edges in enumerate(nodes) for o, source in edges if o == "skip_connect"
        ]
        if len(kept) <= limit:
            return rows
        column = space.operations.index("skip_connect")
        weakest = min(kept, key=lambda edge: rows[edge][column])
        rows[weakest][column] = 0.0


def strongest(rows: Strength, n: int) -> tuple[tuple[bool, ...], ...]:
    """(edges, operations): whether an operation is among the `n` strongest of its edge."""

    def of_edge(row: Sequence[float]) -> tuple[bool, ...]:
        kept = sorted(range(len(row)), key=lambda k: -row[k])[:n]
        return tuple(k in kept for k in range(len(row)))

    return tuple(map(of_edge, rows))


def _first_row(node: int) -> int:
    """Of the strengths: node i has i + 2 incoming edges, which follow those of the nodes before it."""
    return node * (node + 3) // 2


def _every(space: SearchSpace, rows: Strength, kind: str) -> Cell:
    least = _strongest(space, rows, 1, kind)
    nodes = []
    for node, fallback in enumerate(least.nodes):
        incoming = rows[_first_row(node) : _first_row(node + 1)]
        chosen = [space.operations[max(range(len(row)), key=row.__getitem__)] for row in incoming]
        there = [source for source, row in enumerate(incoming) if chosen[source] != "none" and max(row) > 0]
        nodes.append(tuple((chosen[source], source) for source in there) or fallback)
    return Cell(tuple(nodes), least.concat)


def _strongest(space: SearchSpace, rows: Strength, keep: int, kind: str) -> Cell:
    real = [k for k, name in enumerate(space.operations) if name != "none"]
    nodes = []
    for node in range(space.nodes):
        first = _first_row(node)
        best = [max(real, key=rows[first + source].__getitem__) for source in range(node + 2)]
        strength = [rows[first + source][k] for source, k in enumerate(best)]
        there = [source for source in range(node + 2) if strength[source] > 0]
        if not there:
            raise RnasError(f"nothing enters node {node + 2} of the {kind} cell: all its operations are pruned")
        chosen = sorted(there, key=lambda source: -strength[source])[:keep]
        nodes.append(tuple((space.operations[best[source]], source) for source in sorted(chosen)))
    return Cell(tuple(nodes), tuple(range(2, space.nodes + 2)))


class _Choice(NamedTuple):
    """Of edges for some nodes, those of the normal cell first."""

    strength: float
    size: Size
    nodes: tuple[tuple[Edge, ...], ...]


def _strongest_within(space: SearchSpace, kinds: Sequence[Strength], keep: int, limits: Limits) -> Genotype:
    """Node by node: of the choices so far only those can become the best of which none is stronger and no larger."""
    choices, smallest = [_Choice(0.0, limits.base, ())], limits.base
    for reduction, rows in enumerate(kinds):
        for node in range(space.nodes):
            more = _undominated(_choices_of_node(space, rows, node, keep, bool(reduction), limits))
            smallest = smallest.plus(Size(min(m.size.params for m in more), min(m.size.macs for m in more)))
            joined = (
                _Choice(one.strength + m.strength, one.size.plus(m.size), one.nodes + m.nodes)
                for one, m in product(choices, more)
            )
            choices = _undominated(c for c in joined if c.size.fits(limits.most))
    if not choices:
        raise limits.error(smallest)
    nodes, concat = choices[0].nodes, tuple(range(2, space.nodes + 2))
    return Genotype(Cell(nodes[: space.nodes], concat), Cell(nodes[space.nodes :], concat))


def _choices_of_node(
    space: SearchSpace, rows: Strength, node: int, keep: int, reduction: bool, limits: Limits
) -> Iterable[_Choice]:
    first = node * (node + 3) // 2
    by_source = [
        [
            _Choice(strength, limits.added(reduction, (name, source)), (((name, source),),))
            for name, strength in zip(space.operations, rows[first + source], strict=True)
            if name != "none" and strength > 0
        ]
        for source in range(node + 2)
    ]
    there = [_undominated(choices) for choices in by_source if choices]
    for sources in combinations(there, min(keep, len(there))):
        for edges in product(*sources):
            size = Size(sum(e.size.params for e in edges), sum(e.size.macs for e in edges))
            yield _Choice(sum(e.strength for e in edges), size, (tuple(e.nodes[0][0] for e in edges),))


def _undominated(choices: Iterable[_Choice]) -> list[_Choice]:
    """Those of which none is as strong and as small, the strongest first."""
    kept: list[_Choice] = []
    params: list[float] = []  # of the smallest so far, rising; their MACs fall
    macs: list[float] = []
    for one in sorted(choices, key=lambda c: (-c.strength, c.size)):
        before = bisect_right(params, one.size.params)
        if before and macs[before - 1] <= one.size.macs:
            continue
        first = last = bisect_left(params, one.size.params)
        while last < len(macs) and macs[last] >= one.size.macs:
            last += 1
        params[first:last], macs[first:last] = [one.size.params], [one.size.macs]
        kept.append(one)
    return kept
