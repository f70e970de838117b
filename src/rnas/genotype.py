"""The value that a search ends with: which operations join which nodes of a cell. No torch here.

An architecture is a `Genotype` (two cells, repeated) or `CellCodes` (RobNet's: every cell its own). Both say which cell
stands at a position (`cell`), how many cells they need (`depth`) and whether their BN is affine (`affine`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

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
            if not edges:
                raise RnasError(f"node {i + 2} has no edges: expected at least one")
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

    depth: ClassVar[int | None] = None  # any number of cells
    affine: ClassVar[bool] = True

    def cell(self, position: int, reduction: bool) -> Cell:
        """The cell at `position` (0 is the first), which is a reduction cell or not."""
        return self.reduce if reduction else self.normal

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


# RobNet's two-bit codes of an edge (Guo et al. 2020, §3.1).
CODES: dict[str, tuple[str, ...]] = {
    "00": (),
    "01": ("sep_conv_3x3",),
    "10": ("skip_connect",),
    "11": ("sep_conv_3x3", "skip_connect"),
}


@dataclass(frozen=True)
class CellCodes:
    """RobNet's form (Guo et al. 2020): every edge of every cell may be none, a convolution, a skip or both.

    `codes` holds one tuple of two-bit codes for each cell, or a single one that all cells share. Their order is: for
    each node, for each node before it. The cell's output joins all its nodes. RobNet's BN has no affine parameters.
    """

    codes: tuple[tuple[str, ...], ...]
    affine: bool = False

    def __post_init__(self) -> None:
        if not self.codes:
            raise RnasError("codes is empty: expected one list for each cell, or one that all cells share")
        for i, codes in enumerate(self.codes):
            try:
                _decode(codes)
            except RnasError as e:
                raise RnasError(f"cell {i}: {e}") from e

    @property
    def depth(self) -> int | None:
        """The number of cells that a network of these has; None if any."""
        return len(self.codes) if len(self.codes) > 1 else None

    def cell(self, position: int, reduction: bool) -> Cell:
        """The cell at `position` (0 is the first); the same edges whether it is a reduction cell or not."""
        return _decode(self.codes[position if self.depth else 0])

    def to_json(self) -> dict[str, Any]:
        """{"codes": [["11", ...], ...], "affine": false}."""
        return {"codes": [list(codes) for codes in self.codes], "affine": self.affine}

    @staticmethod
    def from_json(value: Any, where: str = "codes") -> CellCodes:
        """The inverse of `to_json`. RnasError, naming `where`, if `value` is something else."""
        codes = value.get("codes") if isinstance(value, dict) else None
        if not isinstance(codes, list) or not all(_is_list_of_text(c) for c in codes):
            raise RnasError(f"{where}: 'codes' is missing or no list of lists of two-bit codes such as \"01\"")
        affine = value.get("affine", False)
        if not isinstance(affine, bool):
            raise RnasError(f"{where}: 'affine' is {json.dumps(affine)}: expected true or false")
        try:
            return CellCodes(tuple(map(tuple, codes)), affine)
        except RnasError as e:
            raise RnasError(f"{where}: {e}") from e


Architecture = Genotype | CellCodes


def choices(architecture: Architecture) -> set[tuple[str | int, int, Edge]]:
    """What was chosen: (cell, node, edge), the cells normal and reduce, or their numbers."""
    cells: dict[str | int, Cell]
    if isinstance(architecture, Genotype):
        cells = {"normal": architecture.normal, "reduce": architecture.reduce}
    else:
        cells = {i: architecture.cell(i, False) for i in range(len(architecture.codes))}
    return {(name, i + 2, edge) for name, cell in cells.items() for i, edges in enumerate(cell.nodes) for edge in edges}


def agreement(one: Architecture, other: Architecture) -> float:
    """The share of choices of edges and operations that two architectures have in common: 2|A ∩ B| / (|A| + |B|)."""
    a, b = choices(one), choices(other)
    return 2 * len(a & b) / (len(a) + len(b))


def architecture_from_json(value: Any, where: str = "genotype") -> Architecture:
    """A `Genotype` or, where the object has codes, `CellCodes`. RnasError, naming `where`, if `value` is neither."""
    form = CellCodes if isinstance(value, dict) and "codes" in value else Genotype
    return form.from_json(value, where)


def _decode(codes: tuple[str, ...]) -> Cell:
    nodes: list[tuple[Edge, ...]] = []
    rest = iter(codes)
    for code in rest:
        row = [code, *(next(rest, "") for _ in range(len(nodes) + 1))]
        for c in row:
            if c not in CODES:
                raise RnasError(
                    f"{len(codes)} codes with '{c}' among them: each is one of {', '.join(CODES)}; "
                    "2 are for the first node, 3 for the second and so on"
                )
        nodes.append(tuple((name, source) for source, c in enumerate(row) for name in CODES[c]))
    return Cell(tuple(nodes), tuple(range(2, len(nodes) + 2)))


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


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
