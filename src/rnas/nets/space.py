"""What is searched in, and how much of each operation: the host constants of a supernet, and the input of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

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


class Weights(NamedTuple):
    """How much of each operation a pass of the supernet takes: softmax, Gumbel, a hard sample, edge weights in them.

    For each kind of cell, [normal, reduction], or with `Shape.per_cell` for each cell.
    """

    mix: tuple[Tensor, ...]
    """(edges, operations) each; the edge's weight multiplied in, 0 is off"""
    bypass: tuple[Tensor, ...] | None = None
    """(edges,) each: of the channels that go past the operations, where `Shape.part` is above 1"""
    live: tuple[Mask, ...] | None = None
    """What the host knows to be zero where it says False; a CPU skips it. None: nothing is known."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return (*self.mix, *(self.bypass or ()))

    @property
    def form(self) -> Form:
        """All that is not a tensor: with equal forms the same operations are computed."""
        return Form(len(self.mix), self.bypass is not None, self.live)

    def detach(self) -> Weights:
        """The same, not to be differentiated."""
        return self.form.filled([t.detach() for t in self.tensors])


class Form(NamedTuple):
    """`Weights` without its tensors, which a recording is kept by."""

    cells: int
    bypassed: bool
    live: tuple[Mask, ...] | None

    @property
    def size(self) -> int:
        """The number of tensors."""
        return self.cells * (2 if self.bypassed else 1)

    def filled(self, tensors: Sequence[Tensor]) -> Weights:
        """The weights made of `tensors`, as `Weights.tensors` lists them."""
        mix, bypass = tuple(tensors[: self.cells]), tuple(tensors[self.cells :])
        return Weights(mix, bypass if self.bypassed else None, self.live)


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
