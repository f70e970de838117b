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


def _strongest(space: SearchSpace, rows: Strength, keep: int, kind: str) -> Cell:
    real = [k for k, name in enumerate(space.operations) if name != "none"]
    nodes, first = [], 0
    for node in range(space.nodes):
        best = [max(real, key=rows[first + source].__getitem__) for source in range(node + 2)]
        strength = [rows[first + source][k] for source, k in enumerate(best)]
        there = [source for source in range(node + 2) if strength[source] > 0]
        if not there:
            raise RnasError(f"nothing enters node {node + 2} of the {kind} cell: all its operations are pruned")
        chosen = sorted(there, key=lambda source: -strength[source])[:keep]
        nodes.append(tuple((space.operations[best[source]], source) for source in sorted(chosen)))
        first += node + 2
    return Cell(tuple(nodes), tuple(range(2, space.nodes + 2)))
