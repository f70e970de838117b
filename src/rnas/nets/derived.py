"""The target network: a genotype's cells, stacked. As DARTS's network for CIFAR (Liu et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnas.compute.freezing import Model
from rnas.compute.memory import recomputed
from rnas.errors import RnasError
from rnas.genotype import Architecture, Cell, Edge
from rnas.nets.folding import folded
from rnas.nets.ops import FactorizedReduce, Normalize, operation, reductions, relu_conv_bn, stem, total

ImageSize = int | tuple[int, int]  # a side, or height and width


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


class Node(nn.ModuleList):
    """The sum of a node's edges: an operation each, with drop-path unless it is the identity.

    `strides` are those of the edges from the cell's two inputs; all others have stride 1.
    """

    def __init__(self, edges: tuple[Edge, ...], channels: int, strides: tuple[int, int], affine: bool):
        super().__init__()
        self.sources = [source for _, source in edges]
        for name, source in edges:
            module = operation(name, channels, strides[source] if source < 2 else 1, affine)
            self.append(module if isinstance(module, nn.Identity) else nn.Sequential(module, DropPath()))

    def forward(self, states: list[Tensor]) -> Tensor:
        """`states` are the nodes before this one, each (B,channels,H,W)."""
        terms: list[Tensor] = [edge(states[source]) for edge, source in zip(self, self.sources, strict=True)]
        return total(terms)


class DerivedCell(nn.Module):
    """One cell of an architecture, from the outputs of the cell before last and the last to its own."""

    def __init__(
        self,
        cell: Cell,
        c_before: int,
        c_last: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
        affine: bool = True,
    ):
        super().__init__()
        self.pre0 = (FactorizedReduce if after_reduction else relu_conv_bn)(c_before, channels, affine)
        self.pre1 = relu_conv_bn(c_last, channels, affine)
        self.concat = cell.concat
        strides = (2, 2) if reduction else (1, 1)
        self.nodes = nn.ModuleList(Node(edges, channels, strides, affine) for edges in cell.nodes)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.pre0(s0), self.pre1(s1)]
        for node in self.nodes:
            states.append(node(states))
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth, which helps training along (DARTS's for CIFAR).

    (B,channels,h,w) to logits (B,classes). Pooling to 2x2 is DARTS's own at 8x8 and scales with other sizes.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU())
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        stride = [max(1, 3 * side // 8) for side in x.shape[2:]]
        kernel = [side - step for side, step in zip(x.shape[2:], stride, strict=True)]
        pooled = nn.functional.avg_pool2d(x.relu(), kernel, stride)
        return self.classifier(self.join(self.reduce(pooled)).flatten(1))  # type: ignore[no-any-return]


class DerivedNetwork(nn.Module):
    """`cells` cells of an architecture, starting with `channels` channels. Images (B,3,H,W) in [0,1]; logits
    (B,classes). H and W are multiples of 4 and 8 or more; with `stem_stride` 2 twice that.

    The network is the same for every image size, as in the published code. At 64 pixels it costs four times what it
    costs at 32; `stem_stride` 2 halves the image in the first convolution and makes the cost equal. `image_size`, where
    it is known, is checked before anything is built.
    """

    def __init__(
        self,
        genotype: Architecture,
        classes: int,
        cells: int = 20,
        channels: int = 36,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
        *,
        stem_stride: int = 1,
        auxiliary: bool = False,
        image_size: ImageSize | None = None,
    ):
        super().__init__()
        _check(genotype, classes, cells, channels, stem_stride)
        if image_size is not None:
            # Factorised reduction takes the even and the odd pixels, so each halving needs an even side.
            check_image_size(image_size, 8 * stem_stride, 4 * stem_stride, "a cell network")
        self.normalize = Normalize(mean, std)
        self.stem = stem(3 * channels, stem_stride)
        c_before = c_last = 3 * channels
        after_reduction = False
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions(cells)
            channels *= 2 if reduction else 1
            cell = genotype.cell(i, reduction)
            self.cells.append(
                DerivedCell(cell, c_before, c_last, channels, reduction, after_reduction, genotype.affine)
            )
            c_before, c_last, after_reduction = c_last, len(cell.concat) * channels, reduction
            if i == 2 * cells // 3:
                self.auxiliary = AuxiliaryHead(c_last, classes) if auxiliary else None
        self.classifier = nn.Linear(c_last, classes)
        self.saving_memory = False

    def save_memory(self, on: bool = True) -> None:
        """From now on keep only the cells' outputs for the backward pass and compute the rest again, cell by cell:
        the same gradients with a fraction of the memory, for another forward pass."""
        self.saving_memory = on

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
        again = self.saving_memory and self.training and torch.is_grad_enabled()
        for cell in self.cells:
            s0, s1 = s1, recomputed(cell, s0, s1) if again else cell(s0, s1)
            outputs.append(s1)
        return self.classifier(s1.mean((2, 3))), outputs

    def frozen_view(self) -> Model:
        """Its form for attacks."""
        return folded(self)

    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and the auxiliary head's logits, both (B,classes): for training a network that has the head."""
        if self.auxiliary is None:
            raise RnasError("this network has no auxiliary head: build it with auxiliary=True")
        logits, outputs = self.forward_cells(x)
        return logits, self.auxiliary(outputs[2 * len(outputs) // 3])


def check_count(what: str, value: int, least: int) -> None:
    """RnasError unless `value`, called `what`, is a whole number of `least` or more."""
    if not isinstance(value, int) or value < least:
        raise RnasError(f"{what} is {value!r}: expected {least} or more")


def _check(genotype: Architecture, classes: int, cells: int, channels: int, stem_stride: int) -> None:
    for what, value, least in (("classes", classes, 2), ("cells", cells, 1), ("channels", channels, 1)):
        check_count(what, value, least)
    if genotype.depth not in (None, cells):
        raise RnasError(f"cells is {cells}, but this architecture has {genotype.depth} cells, each its own")
    if stem_stride not in (1, 2):
        raise RnasError(f"stem_stride is {stem_stride}: expected 1 (keeps the image's size) or 2 (halves it)")


def check_image_size(image_size: ImageSize, least: int, multiple: int, what: str) -> None:
    """RnasError unless every side of `image_size` is `least` or more and a multiple of `multiple`."""
    for side in (image_size,) if isinstance(image_size, int) else image_size:
        if side < least or side % multiple:
            rule = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise RnasError(f"image size {side} does not fit {what}: its reductions need {least} or more{rule}")
