"""The supernet, plain: one module per operation, nothing shared. It is the definition that faster versions equal."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.nets.ops import FactorizedReduce, Normalize, Zero, operation, reductions, relu_conv_bn, stem, total
from rnas.nets.space import CellWeights, Shape, Weights
from rnas.settings import SearchSpace


class MixedOperation(nn.Module):
    """The operations that there are on one edge, summed with the edge's weights. # Eq. 1

    `operations` are named by their columns of the weights, so that leaving some out renames none.
    """

    def __init__(self, shape: Shape, reduction: bool, edge: int, channels: int, stride: int):
        super().__init__()
        self.operations = nn.ModuleDict(
            {
                str(column): _with_pool_bn(name, channels, stride)
                for column, name in enumerate(shape.space.operations)
                if shape.allows(reduction, edge, column)
            }
        )
        self.nothing = Zero(stride)

    @property
    def skip(self) -> int | None:
        """The column of the operation that passes its input on as it is, if there is one."""
        return next((int(k) for k, o in self.operations.items() if isinstance(o, nn.Identity)), None)

    def forward(
        self, x: Tensor, weights: Tensor, live: tuple[bool, ...] | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """`x` (B,C,H,W), `weights` (operations,); those that are not `live` are not computed. `kept` (B,C,H,W): what a
        stride-1 skip's values are multiplied with."""
        terms = []
        for name, module in self.operations.items():
            column = int(name)
            if live is None or live[column]:
                out = module(x)
                terms.append(weights[column] * (out if kept is None or column != self.skip else out * kept))
        return total(terms) if terms else cast(Tensor, self.nothing(x))


def _with_pool_bn(name: str, channels: int, stride: int) -> nn.Module:
    module = operation(name, channels, stride, affine=False)
    if "pool" in name:
        return nn.Sequential(module, nn.BatchNorm2d(channels, affine=False))
    return module


class SupernetCell(nn.Module):
    """A cell with a mixed operation on each of its edges; its output joins all its intermediate nodes.

    With `Shape.part` K above 1 only the first C/K channels of a node go through the operations of its edges; the others
    pass by them, and the channels of the node at the end are shuffled (Xu et al. 2020, PC-DARTS). All edges share the
    shuffle, so it is done once a node, for the sum.
    """

    def __init__(self, shape: Shape, c_before: int, c_last: int, channels: int, reduction: bool, after_reduction: bool):
        super().__init__()
        self.reduction = reduction
        self.pre0 = (
            FactorizedReduce(c_before, channels, affine=False)
            if after_reduction
            else relu_conv_bn(c_before, channels, affine=False)
        )
        self.pre1 = relu_conv_bn(c_last, channels, affine=False)
        self.nodes, self.part = shape.space.nodes, shape.part
        self.mixed = channels // shape.part
        """How many channels go through the operations."""
        ends = [(node, source) for node in range(self.nodes) for source in range(node + 2)]
        self.edges = nn.ModuleList(
            MixedOperation(shape, reduction, edge, self.mixed, stride=2 if reduction and source < 2 else 1)
            for edge, (_, source) in enumerate(ends)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: CellWeights) -> Tensor:
        """`s0`, `s1`: outputs of the cell before last and the last."""
        states = [self.pre0(s0), self.pre1(s1)]
        kept = self.kept_by_edge(weights.kept)
        live = weights.live or (None,) * len(self.edges)
        edge = 0
        for _ in range(self.nodes):
            rows = range(edge, edge + len(states))
            incoming = [
                self.edges[row](s[:, : self.mixed], weights.mix[row], live[row], kept.get(row))
                for row, s in zip(rows, states, strict=True)
            ]
            node = total(incoming)
            if self.part > 1:
                assert weights.bypass is not None, "part channels want the weights of the others"
                others = [self.passing_by(number, s) for number, s in enumerate(states)]
                node = torch.cat([node, total(weights.bypass[row] * s for row, s in zip(rows, others, strict=True))], 1)
                node = shuffled(node, self.part)
            edge += len(states)
            states.append(node)
        return torch.cat(states[2:], dim=1)

    def passing_by(self, number: int, state: Tensor) -> Tensor:
        """What passes by the operations of the edges that leave input or node `number`."""
        others = state[:, self.mixed :]
        return F.max_pool2d(others, 2) if self.reduction and number < 2 else others

    @property
    def skipping(self) -> list[int]:
        """The edges with a skip that passes on what it gets as it is: those that a dropout concerns."""
        return [row for row, edge in enumerate(self.edges) if cast(MixedOperation, edge).skip is not None]

    def kept_by_edge(self, kept: Tensor | None) -> dict[int, Tensor]:
        """`CellWeights.kept` of each edge that has one."""
        return {} if kept is None else dict(zip(self.skipping, kept, strict=True))

    def draw_kept(self, s1: Tensor, dropout: Tensor) -> Tensor:
        """`CellWeights.kept` for one pass with `s1` as the last cell's output, from torch's generator."""
        (b, _, h, w), stride = s1.shape, 2 if self.reduction else 1
        drawn = torch.rand(len(self.skipping), b, -(-h // stride), -(-w // stride), self.mixed, device=s1.device)
        return ((drawn >= dropout) / (1 - dropout)).permute(0, 1, 4, 2, 3)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """`x` (B,C,H,W), whose channel g·C/groups + j becomes channel j·groups + g."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


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
            cells.append(self.cell_type(self.shape, c_before, c_last, channels, reduction, after_reduction))
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
        for i, cell in enumerate(cast("list[SupernetCell]", self.cells)):
            of_cell = weights.of(self.row(i))
            if self.training and weights.dropout is not None:
                of_cell = of_cell._replace(kept=cell.draw_kept(s1, weights.dropout))
            s0, s1 = s1, cell(s0, s1, of_cell)
            outputs.append(s1)
        return self.classifier(s1.mean((2, 3))), outputs
