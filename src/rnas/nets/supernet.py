"""The supernet, plain: one module per operation, nothing shared. It is the definition that faster versions equal."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rnas.nets.space import Shape, Weights
from rnas.ops import FactorizedReduce, Normalize, operation, reductions, relu_conv_bn, stem, total
from rnas.settings import SearchSpace


class MixedOperation(nn.Module):
    """Every operation of the space on one edge, summed with the edge's weights. # Eq. 1"""

    def __init__(self, space: SearchSpace, channels: int, stride: int):
        super().__init__()
        self.operations = nn.ModuleList(_with_pool_bn(name, channels, stride) for name in space.operations)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """`x` (B,C,H,W), `weights` (operations,)."""
        return total(w * o(x) for w, o in zip(weights, self.operations, strict=True))


def _with_pool_bn(name: str, channels: int, stride: int) -> nn.Module:
    module = operation(name, channels, stride, affine=False)
    if "pool" in name:
        return nn.Sequential(module, nn.BatchNorm2d(channels, affine=False))
    return module


class SupernetCell(nn.Module):
    """A cell with a mixed operation on each of its edges; its output joins all its intermediate nodes."""

    def __init__(
        self,
        space: SearchSpace,
        c_before: int,
        c_last: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
    ):
        super().__init__()
        self.reduction = reduction
        self.pre0 = (
            FactorizedReduce(c_before, channels, affine=False)
            if after_reduction
            else relu_conv_bn(c_before, channels, affine=False)
        )
        self.pre1 = relu_conv_bn(c_last, channels, affine=False)
        self.edges = nn.ModuleList(
            MixedOperation(space, channels, stride=2 if reduction and source < 2 else 1)
            for node in range(space.nodes)
            for source in range(node + 2)
        )
        self.nodes = space.nodes

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """`s0`, `s1`: outputs of the cell before last and the last; `weights` (edges, operations)."""
        states = [self.pre0(s0), self.pre1(s1)]
        edge = 0
        for _ in range(self.nodes):
            incoming = [self.edges[edge + j](s, weights[edge + j]) for j, s in enumerate(states)]
            edge += len(states)
            states.append(total(incoming))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """The network that contains every architecture of the space; the weights of a pass say how much of each.

    What decides on the weights belongs to a search method, which may register itself as `architecture`: then its
    tensors are among those of the network. Images are (B,3,H,W) in [0,1]; logits (B,classes).
    """

    cell_type: type[SupernetCell] = SupernetCell

    def __init__(
        self,
        shape: Shape | SearchSpace,
        classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ):
        """A plain space stands for the whole of it."""
        super().__init__()
        self.shape = shape if isinstance(shape, Shape) else Shape(shape)
        self.space = space = self.shape.space
        self.normalize = Normalize(mean, std)
        self.stem = stem(3 * space.channels)
        c_before = c_last = 3 * space.channels
        channels, after_reduction = space.channels, False
        cells: list[SupernetCell] = []
        for i in range(space.cells):
            reduction = i in reductions(space.cells)
            channels *= 2 if reduction else 1
            cells.append(self.cell_type(space, c_before, c_last, channels, reduction, after_reduction))
            c_before, c_last, after_reduction = c_last, space.nodes * channels, reduction
        self.cells = nn.ModuleList(cells)
        self.classifier = nn.Linear(c_last, classes)

    @property
    def thetas(self) -> list[nn.Parameter]:
        """The weights: every parameter but those of `architecture`."""
        return [p for name, p in self.named_parameters() if not name.startswith("architecture.")]

    def row(self, cell: int) -> int:
        """Which of `Weights.mix` is that of a cell."""
        return cell if self.shape.per_cell else int(cast(SupernetCell, self.cells[cell]).reduction)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Logits (B,classes)."""
        return self.forward_cells(x, weights)[0]

    def forward_cells(self, x: Tensor, weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        s0 = s1 = self.stem(self.normalize(x))
        outputs = []
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, weights.mix[self.row(i)])
            outputs.append(s1)
        return self.classifier(s1.mean((2, 3))), outputs
