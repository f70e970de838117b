"""How far each operation of a supernet may stretch its input: λ_o, in eval mode, by the norms of its convolutions.

ReLU stretches nothing, and a stack of layers at most by the product of theirs. BN's 1/σ is part of the convolution
before it: else a convolution could shrink its weights without changing what the network computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from math import ceil
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.nets.ops import FactorizedReduce, Zero
from rnas.nets.space import Shape
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell

Pools = Literal["one", "l2"]
Place = tuple[int, int, int]
"""A cell, an edge, an operation."""
GRID = 16
"""Frequencies along an axis at which a kernel is looked at."""


class Lipschitz(nn.Module):
    """λ_o of every operation of a supernet of this `shape`; the vectors of its power iterations are buffers.

    `pools`: a pool's λ is 1 (of l_inf distances), or a bound for l2: as many times as a max-pool repeats a pixel, its
    root; 7/6 for an average-pool, whose windows are smaller at the border. A pool's BN in the supernet is left out: a
    derived network has none.
    """

    given: Tensor

    def __init__(self, shape: Shape, pools: Pools = "one"):
        super().__init__()
        with torch.device("meta"):
            net = Supernet(shape, 2)
        given = torch.zeros(shape.space.cells, shape.space.edges, len(shape.space.operations))
        for place, module in operations(net):
            given[place] = without_convolutions(module, pools)
        self.register_buffer("given", given, persistent=False)
        for kernels, _ in alike(net):
            if kernels.dim() == 3:
                n, _, c_in = kernels.shape
                self.register_buffer(vector(kernels), F.normalize(torch.randn(n, c_in), dim=-1))

    @torch.no_grad()
    def forward(self, net: Supernet, steps: int = 1) -> Tensor:
        """ln λ_o (cells,edges,operations) after `steps` of power iteration; -∞ for `none`."""
        log_lambda = self.given.log()
        for kernels, places in alike(net):
            norms = self.of_matrices(kernels, steps) if kernels.dim() == 3 else depthwise_norms(kernels)
            log_lambda.index_put_(tuple(places.to(norms.device)), norms.log(), accumulate=True)
        return log_lambda

    def of_matrices(self, matrices: Tensor, steps: int) -> Tensor:
        """(N,), of (N,out,in)."""
        kept = self.get_buffer(vector(matrices))
        v = kept
        for _ in range(steps):
            norms, v = power_step(matrices, v)
        kept.copy_(v)  # where it is: recordings read buffers
        return norms


def power_step(matrices: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Largest singular values (N,) of `matrices` (N,out,in), from below, and better right vectors than `v` (N,in)."""
    u = F.normalize((matrices @ v.unsqueeze(-1)), dim=1)
    v = (matrices.mT @ u).squeeze(-1)
    return v.norm(dim=-1), F.normalize(v, dim=-1)


def depthwise_norms(kernels: Tensor) -> Tensor:
    """(N,), of depthwise convolutions (N,C,1,k,k): the largest gain of any channel at any frequency. Zero padding, a
    stride and a dilation add nothing to it."""
    gains: Tensor = torch.fft.rfft2(kernels, s=(GRID, GRID)).abs()
    return gains.amax((1, 2, 3, 4))


def without_convolutions(module: nn.Module, pools: Pools) -> float:
    """λ of an operation that has no convolution; 1 for the others, whose norms are multiplied to it."""
    if isinstance(module, Zero):
        return 0.0
    pool = next(module.children(), module)
    if pools == "l2" and isinstance(pool, nn.MaxPool2d):  # a pixel is in so many windows along each axis
        return float(ceil(cast(int, pool.kernel_size) / cast(int, pool.stride)))
    return 7 / 6 if pools == "l2" and isinstance(pool, nn.AvgPool2d) else 1.0


def operations(net: Supernet) -> Iterator[tuple[Place, nn.Module]]:
    """All that there are."""
    for i, cell in enumerate(net.cells):
        for j, edge in enumerate(cast(SupernetCell, cell).edges):
            for column, module in cast(MixedOperation, edge).operations.items():
                yield (i, j, int(column)), module


def alike(net: Supernet) -> Iterator[tuple[Tensor, Tensor]]:
    """The convolutions of all operations, N of one shape at a time: (N,out,in) or (N,C,1,k,k), and their places
    (3,N)."""
    found: dict[torch.Size, list[tuple[Tensor, Place]]] = {}
    for place, module in operations(net):
        for kernel in convolutions(module):
            found.setdefault(kernel.shape, []).append((kernel, place))
    for group in found.values():
        yield torch.stack([kernel for kernel, _ in group]), torch.tensor([place for _, place in group], device="cpu").T


def convolutions(module: nn.Module) -> Iterator[Tensor]:
    """Those of an operation, BN folded in: a pointwise one as a matrix (out,in), a depthwise one (C,1,k,k)."""
    if isinstance(module, FactorizedReduce):  # of even and of odd pixels: its norm is the larger of both
        both = (conv.weight.flatten(1) for conv in (module.even, module.odd))
        yield folded(torch.block_diag(*both), module.bn)  # type: ignore[no-untyped-call]
        return
    layers = list(module.children())
    for layer, after in zip_longest(layers, layers[1:]):
        if isinstance(layer, nn.Conv2d):
            kernel = layer.weight.flatten(1) if layer.kernel_size == (1, 1) else layer.weight
            yield folded(kernel, after) if isinstance(after, nn.BatchNorm2d) else kernel


def folded(kernel: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """`kernel` (out,...) followed by the scale of a BN without weights of its own."""
    scale = (cast(Tensor, bn.running_var) + bn.eps).rsqrt()
    return kernel * scale.view(-1, *[1] * (kernel.dim() - 1))


def vector(matrices: Tensor) -> str:
    """The name of the buffer for such matrices."""
    return f"v{matrices.shape[1]}x{matrices.shape[2]}"
