"""Every setting of every command on one page; the defaults are the paper's (§5.1). No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from rnas.errors import RnasError, unknown
from rnas.genotype import OPERATIONS


@dataclass(frozen=True)
class SearchSpace:
    """The architectures that a search chooses from."""

    cells: int = 8
    """Cells of the supernet; those at a third and two thirds of the depth reduce."""
    channels: int = 16
    """Channels C of the first cell; each reduction doubles them."""
    nodes: int = 4
    """Intermediate nodes of a cell."""
    operations: tuple[str, ...] = OPERATIONS
    """Candidate operations of an edge, in the order of α's columns."""

    def __post_init__(self) -> None:
        for name in ("cells", "channels", "nodes"):
            if getattr(self, name) < 1:
                raise RnasError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise unknown("operation", operation, OPERATIONS)
        if not set(self.operations) - {"none"} or len(set(self.operations)) < len(self.operations):
            raise RnasError("operations must name at least one operation besides 'none', each once")

    @property
    def edges(self) -> int:
        """Edges of a cell: each intermediate node has one from every node before it."""
        return self.nodes * (self.nodes + 3) // 2
