"""The value that a search ends with: which operations join which nodes of a cell. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rnas.errors import RnasError, unknown
from rnas.files import read_json, write_text

# The order of the search space (§5.1): α's columns follow it.
OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
# Published cells use these too.
ALL_OPERATIONS = (*OPERATIONS, "sep_conv_7x7", "conv_7x1_1x7")

Edge = tuple[str, int]  # operation, source node


@dataclass(frozen=True)
class Cell:
    """One cell. Nodes 0 and 1 are the outputs of the two cells before; `nodes[i]` lists what enters node i + 2.

    `concat` names the nodes whose channels, joined, are the cell's output.
    """

    nodes: tuple[tuple[Edge, ...], ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise RnasError("a cell needs at least one node")
        for i, edges in enumerate(self.nodes):
            for operation, source in edges:
                if operation not in ALL_OPERATIONS:
                    raise unknown("operation", operation, ALL_OPERATIONS)
                if not 0 <= source < i + 2:
                    raise RnasError(
                        f"node {i + 2} has an edge '{operation}' from node {source}: "
                        f"edges come from earlier nodes, 0 to {i + 1}"
                    )
        last = len(self.nodes) + 1
        if (
            not self.concat
            or len(set(self.concat)) < len(self.concat)
            or not set(self.concat) <= set(range(2, last + 1))
        ):
            raise RnasError(f"concat {list(self.concat)} is wrong: it names each of some nodes from 2 to {last} once")


@dataclass(frozen=True)
class Genotype:
    """The two cells that make a network: the reduction cell halves the image size, the normal cell keeps it."""

    normal: Cell
    reduce: Cell

    def to_json(self) -> dict[str, Any]:
        """The published form where every node has two edges ([operation, source] pairs in node order), else a list
        of edges for each node."""
        out: dict[str, Any] = {}
        for kind, cell in (("normal", self.normal), ("reduce", self.reduce)):
            nodes = [[[operation, source] for operation, source in edges] for edges in cell.nodes]
            out[kind] = list(chain.from_iterable(nodes)) if all(len(edges) == 2 for edges in nodes) else nodes
            out[f"{kind}_concat"] = list(cell.concat)
        return out

    @staticmethod
    def from_json(value: Any, where: str = "genotype") -> Genotype:
        """The inverse of `to_json`. RnasError, naming `where`, if `value` is not a genotype."""
        if not isinstance(value, dict):
            raise RnasError(
                f"{where} is no genotype: expected an object with normal, normal_concat, reduce, reduce_concat"
            )
        try:
            return Genotype(*(_cell(value, kind) for kind in ("normal", "reduce")))
        except RnasError as e:
            raise RnasError(f"{where}: {e}") from e

    def save(self, path: Path) -> None:
        """Write the genotype to `path` as JSON."""
        write_text(path, json.dumps(self.to_json()) + "\n")

    @staticmethod
    def load(path: Path) -> Genotype:
        """Read a genotype. RnasError if the file is missing, not JSON or no genotype."""
        return Genotype.from_json(read_json(path), str(path))


def _cell(value: dict[str, Any], kind: str) -> Cell:
    nodes, concat = value.get(kind), value.get(f"{kind}_concat")
    if not isinstance(nodes, list) or not nodes:
        raise RnasError(f"'{kind}' is missing or empty: expected a list of [operation, source node] pairs")
    if not isinstance(concat, list) or not all(type(c) is int for c in concat):
        raise RnasError(f"'{kind}_concat' is missing or no list of node numbers")
    if _is_edge(nodes[0]):
        if len(nodes) % 2:
            raise RnasError(f"'{kind}' has {len(nodes)} edges: expected two for each node")
        nodes = [nodes[i : i + 2] for i in range(0, len(nodes), 2)]
    for edges in nodes:
        if not isinstance(edges, list) or not all(map(_is_edge, edges)):
            raise RnasError(f"'{kind}' holds {json.dumps(edges)}: expected [operation, source node] pairs")
    return Cell(tuple(tuple((op, source) for op, source in edges) for edges in nodes), tuple(concat))


def _is_edge(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
