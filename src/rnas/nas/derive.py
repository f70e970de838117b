"""Architectures read off the strengths of operations. Plain numbers: no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rnas.errors import RnasError
from rnas.genotype import Cell, Genotype
from rnas.settings import SearchSpace

Strength = Sequence[Sequence[float]]
"""(edges, operations) of a cell: how much there is of each, 0 for what is pruned. `none` counts: an edge where it is
strong is weak."""


def discretise(space: SearchSpace, normal: Strength, reduce: Strength, keep: int = 2) -> Genotype:
    """Per node the `keep` incoming edges whose strongest operation besides `none` is strongest, with that operation.

    RnasError if nothing is left that enters a node.
    """
    return Genotype(_strongest(space, normal, keep, "normal"), _strongest(space, reduce, keep, "reduction"))


def all_edges(space: SearchSpace, normal: Strength, reduce: Strength) -> Genotype:
    """Every edge with its strongest operation; one where that is `none` is left out. Where so much is left out that
    nothing would enter a node, its edge with the strongest other operation stays.

    RnasError if all operations that enter a node are pruned.
    """
    return Genotype(_every(space, normal, "normal"), _every(space, reduce, "reduction"))


def cap_skips(space: SearchSpace, normal: Strength, limit: int, keep: int = 2) -> list[list[float]]:
    """The strengths of a normal cell without those of so many weak skips that `discretise` keeps `limit` at most.

    One goes at a time, the weakest of those that are kept; then operations and edges are chosen anew, so another skip
    may come in. RnasError if nothing is left that enters a node.
    """
    rows = [list(row) for row in normal]
    while True:
        nodes = _strongest(space, rows, keep, "normal").nodes
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
