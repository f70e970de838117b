"""What is searched in, and how much of each operation: the host constants of a supernet, and the input of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from rnas.errors import RnasError
from rnas.genotype import Architecture, Cell
from rnas.nets.ops import reductions
from rnas.settings import SearchSpace

Mask = tuple[tuple[bool, ...], ...]
"""(edges, operations): which there are."""


@dataclass(frozen=True)
class Shape:
    """The host constants of a supernet: another shape is another network, with weights and optimisers of its own."""

    space: SearchSpace
    allowed: tuple[Mask, Mask] | None = None
    """Of a normal and of a reduction cell the operations that exist; None: all."""
    part: int = 1
    """1/part of the channels go through the operations, the others past them."""
    per_cell: bool = False
    """Each cell has weights of its own; or else all cells of a kind share them."""

    def __post_init__(self) -> None:
        if self.part < 1 or self.space.channels % self.part:
            raise RnasError(
                f"1/{self.part} of {self.space.channels} channels is not a whole number: choose channels or part so "
                f"that part divides channels"
            )

    def allows(self, reduction: bool, edge: int, operation: int) -> bool:
        """Whether an operation exists on an edge of a kind of cell."""
        return self.allowed is None or self.allowed[reduction][edge][operation]


class CellWeights(NamedTuple):
    """What of `Weights` concerns one cell."""

    mix: Tensor
    """(edges, operations)"""
    bypass: Tensor | None = None
    """(edges,)"""
    live: Mask | None = None
    kept: Tensor | None = None
    """(N,B,C,H,W), what the values of the cell's N stride-1 skips are multiplied with: 0 where dropped"""


class Weights(NamedTuple):
    """How much of each operation a pass of the supernet takes: softmax, Gumbel, a hard sample, edge weights in them.

    For each kind of cell, [normal, reduction], or with `Shape.per_cell` for each cell.
    """

    mix: tuple[Tensor, ...]
    """(edges, operations) each; the edge's weight multiplied in, 0 is off"""
    bypass: tuple[Tensor, ...] | None = None
    """(edges,) each: of the channels that go past the operations, where `Shape.part` is above 1"""
    live: tuple[Mask, ...] | None = None
    """What the host knows to be zero where it says False: it is not computed, and its BN sees nothing. None: nothing is
    known. Another mask is another recording, so on a GPU it may be better to leave it out."""
    dropout: Tensor | None = None
    """(), the probability with which, in train mode, a value that a stride-1 skip passes on is dropped"""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return (*self.mix, *(self.bypass or ()), *(() if self.dropout is None else (self.dropout,)))

    @property
    def form(self) -> Form:
        """All that is not a tensor: with equal forms the same operations are computed."""
        return Form(len(self.mix), self.bypass is not None, self.live, self.dropout is not None)

    def detach(self) -> Weights:
        """The same, not to be differentiated."""
        return self.form.filled([t.detach() for t in self.tensors])

    def of(self, row: int) -> CellWeights:
        """Those of a kind of cell, or with `Shape.per_cell` of a cell, but for its dropout."""
        return CellWeights(
            self.mix[row],
            None if self.bypass is None else self.bypass[row],
            None if self.live is None else self.live[row],
        )


class Form(NamedTuple):
    """`Weights` without its tensors, which a recording is kept by."""

    cells: int
    bypassed: bool
    live: tuple[Mask, ...] | None
    dropping: bool = False

    @property
    def size(self) -> int:
        """The number of tensors."""
        return self.cells * (2 if self.bypassed else 1) + self.dropping

    def filled(self, tensors: Sequence[Tensor]) -> Weights:
        """The weights made of `tensors`, as `Weights.tensors` lists them."""
        rest = iter(tensors)
        mix = tuple(islice(rest, self.cells))
        bypass = tuple(islice(rest, self.cells)) if self.bypassed else None
        return Weights(mix, bypass, self.live, next(rest) if self.dropping else None)


def uniform(shape: Shape, device: torch.device | str = "cpu") -> Weights:
    """As much of each operation as of any other."""
    edges, operations = shape.space.edges, len(shape.space.operations)
    mix = torch.full((edges, operations), 1 / operations, device=device)
    cells = shape.space.cells if shape.per_cell else 2
    return Weights((mix,) * cells, (torch.ones(edges, device=device),) * cells if shape.part > 1 else None)


Input = Tensor | Weights
"""What a pass may take."""
Forms = tuple[Form | None, ...]


def apart(inputs: Sequence[Input]) -> tuple[list[Tensor], Forms]:
    """The tensors of all `inputs`, in order, and what they are part of: None for one by itself."""
    tensors = [t for value in inputs for t in (value.tensors if isinstance(value, Weights) else (value,))]
    return tensors, tuple(value.form if isinstance(value, Weights) else None for value in inputs)


def together(tensors: Sequence[Tensor], forms: Forms) -> list[Input]:
    """The inputs that `apart` took apart."""
    rest = iter(tensors)
    return [next(rest) if form is None else form.filled(list(islice(rest, form.size))) for form in forms]


def hard(architecture: Architecture, shape: Shape, like: Tensor) -> Weights:
    """1 for the operations of an architecture, 0 for the others; on the device and of the type of `like`.

    A CPU is told, so that it does not compute them; a GPU is not, for it would record every sample anew.
    """
    cells = shape.space.cells
    stands = [(i, i in reductions(cells)) for i in range(cells)] if shape.per_cell else [(0, False), (0, True)]
    masks = tuple(mask_of(architecture.cell(*at), shape.space) for at in stands)
    mix = tuple(torch.tensor(mask, dtype=like.dtype, device=like.device) for mask in masks)
    return Weights(mix, live=masks if like.device.type == "cpu" else None)


def mask_of(cell: Cell, space: SearchSpace) -> Mask:
    """(edges, operations): which are in the cell."""
    return tuple(
        tuple((operation, source) in edges for operation in space.operations)
        for node, edges in enumerate(cell.nodes)
        for source in range(node + 2)
    )
