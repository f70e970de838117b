"""The target network: a genotype's cells, stacked. As DARTS's network for CIFAR (Liu et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnas.genotype import Cell, Genotype
from rnas.ops import FactorizedReduce, Normalize, operation, reductions, relu_conv_bn, stem


class DropPath(nn.Module):
    """Drops a path for whole images, each with probability `p`, while training (Larsson et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class DerivedCell(nn.Module):
    """One cell of a genotype."""

    def __init__(
        self, cell: Cell, c_before: int, c_last: int, channels: int, reduction: bool, after_reduction: bool
    ):
        super().__init__()
        self.pre0 = (
            FactorizedReduce(c_before, channels, affine=True)
            if after_reduction
            else relu_conv_bn(c_before, channels)
        )
        self.pre1 = relu_conv_bn(c_last, channels)
        self.sources = [[source for _, source in edges] for edges in cell.nodes]
        self.concat = cell.concat
        self.edges = nn.ModuleList(
            nn.ModuleList(
                self._edge(name, channels, 2 if reduction and source < 2 else 1) for name, source in edges
            )
            for edges in cell.nodes
        )

    @staticmethod
    def _edge(name: str, channels: int, stride: int) -> nn.Module:
        module = operation(name, channels, stride)
        return module if isinstance(module, nn.Identity) else nn.Sequential(module, DropPath())

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.pre0(s0), self.pre1(s1)]
        for edges, sources in zip(self.edges, self.sources, strict=True):
            states.append(sum(edge(states[source]) for edge, source in zip(edges, sources, strict=True)))
        return torch.cat([states[i] for i in self.concat], dim=1)


class DerivedNetwork(nn.Module):
    """`cells` cells of a genotype, starting with `channels` channels. Images (B,3,H,W) in [0,1]; logits (B,classes)."""

    def __init__(
        self,
        genotype: Genotype,
        classes: int,
        cells: int = 20,
        channels: int = 36,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = stem(3 * channels)
        c_before = c_last = 3 * channels
        after_reduction = False
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions(cells)
            channels *= 2 if reduction else 1
            cell = genotype.reduce if reduction else genotype.normal
            self.cells.append(DerivedCell(cell, c_before, c_last, channels, reduction, after_reduction))
            c_before, c_last, after_reduction = c_last, len(cell.concat) * channels, reduction
        self.classifier = nn.Linear(c_last, classes)

    def set_drop_path(self, p: float) -> None:
        """From now on drop each path with probability `p` while training."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_cells(x)[0]

    def forward_cells(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,classes) and the output of every cell, each (B,C_i,H_i,W_i)."""
        s0 = s1 = self.stem(self.normalize(x))
        outputs = []
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
            outputs.append(s1)
        return self.classifier(s1.mean((2, 3))), outputs
