"""What the fast supernet computes: the operations that leave each node of a cell, and the modules of their weights.

How it is computed depends on the device: `fast_cpu`, `fast_gpu`, `fast_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from rnas.ops import FactorizedReduce

Kind = Literal["separable", "dilated", "reduce", "direct"]


class Convolution(NamedTuple):
    """The shape of one convolutional operation of an edge.

    Its tensors, with 1x1 weights (D,C) and depthwise kernels (C,1,k,k), are for
    `separable` (depthwise, 1x1, BN, ReLU, depthwise, 1x1, BN): kernel, weight, kernel, weight;
    `dilated` (dilated depthwise, 1x1, BN): kernel, weight;
    `reduce` (1x1 of the even and odd pixels side by side, BN): weight (D,2C);
    `direct` (1x1, BN): weight.
    Folded, with BN's scale in the weights, the bias follows the weight: of the middle one, in `separable`.
    """

    kind: Kind
    stride: int


KINDS: dict[str, Kind] = {"sep_": "separable", "dil_": "dilated", "skip": "reduce"}


class Convolving:
    """A convolutional operation of an edge, or an input's preprocessing: the modules that hold its weights."""

    def __init__(self, kind: Kind, stride: int, module: nn.Module):
        self.shape = Convolution("reduce" if isinstance(module, FactorizedReduce) else kind, stride)
        self.module = module
        self.convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.bns = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.alone = Leaving(1, (self.shape,), (0,), ())  # the plan of a node that nothing else leaves


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether `conv` mixes channels, pixel by pixel; or else it is depthwise. With one channel both have one group."""
    return conv.kernel_size == (1, 1)


def scale_and_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BN with running statistics as x · scale + shift, each (C,)."""
    scale = (cast(Tensor, bn.running_var) + bn.eps).rsqrt()
    scale = scale if bn.weight is None else scale * bn.weight
    shift = -cast(Tensor, bn.running_mean) * scale
    return scale, shift if bn.bias is None else shift + bn.bias


@dataclass(frozen=True)
class Leaving:
    """What leaves a node: on each of its edges the same operations."""

    edges: int
    shapes: tuple[Convolution, ...]
    columns: tuple[int, ...]
    """of α, for `shapes`"""
    passed: tuple[tuple[int, int], ...]
    """(which of the node and its pools is passed on as it is, its column of α)"""

    def groups(self, values: Sequence[Any], folded: bool) -> list[list[list[Any]]]:
        """`values`, one for each tensor: of every edge, of every convolution, as [head kernel, *middle, weight]."""
        rest = iter(values)
        counts = [TENSORS[shape.kind] + (folded and shape.kind == "separable") for shape in self.shapes]
        return [[list(islice(rest, count)) for count in counts] for _ in range(self.edges)]


TENSORS = {"separable": 4, "dilated": 2, "reduce": 1, "direct": 1}


class Source:
    """All that leaves a node of a cell: the operations on its edges, and the pools that they share."""

    def __init__(self, stride: int, names: Sequence[str], rows: Sequence[int], edges: Sequence[nn.ModuleList]):
        """`rows` of α and operations, named `names`, of each edge."""
        self.stride = stride
        self.rows = list(rows)
        columns = [k for k, name in enumerate(names) if name != "none"]
        pools = [k for k in columns if "pool" in names[k]]
        skips = [k for k in columns if isinstance(edges[0][k], nn.Identity)]
        convolving = [k for k in columns if k not in pools and k not in skips]
        self.pool_names = [names[k] for k in pools]
        self.pool_bns = [[cast(nn.BatchNorm2d, _layers(modules[k])[1]) for modules in edges] for k in pools]
        self.operations = [
            [Convolving(KINDS[names[k][:4]], stride, modules[k]) for k in convolving] for modules in edges
        ]
        self.plan = Leaving(
            edges=len(edges),
            shapes=tuple(o.shape for o in self.operations[0]),
            columns=tuple(convolving),
            passed=(*((0, k) for k in skips), *((1 + i, k) for i, k in enumerate(pools))),
        )


def _layers(module: nn.Module) -> nn.Sequential:
    return cast(nn.Sequential, module)


class Rule(Protocol):
    """How a cell is computed, its BN included. Holds while weights and α stay."""

    def __init__(self, entrances: Sequence[Convolving], sources: Sequence[Source], weights: Tensor):
        """`weights` (edges, operations)."""

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        """A cell input after its preprocessing."""

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        """What each edge that leaves node `x` brings to its end. # Eq. 1"""


@runtime_checkable
class CellRule(Rule, Protocol):
    """Which computes a cell as a whole."""

    def run(self, s0: Tensor, s1: Tensor) -> Tensor:
        """The cell's output (B,nodes·C,H,W), from the outputs of the cell before last and the last."""


class TrainRule(Rule, Protocol):
    """With the batch's statistics, which it remembers."""

    def update(self) -> None:
        """Let the running statistics of every BN that was seen follow, as `nn.BatchNorm2d` does."""


@torch.no_grad()
def follow(seen: Sequence[tuple[nn.BatchNorm2d, Tensor, Tensor, float]]) -> None:
    """Let the running statistics of every BN seen follow those of the batch, as `nn.BatchNorm2d` does.

    Each with the batch's mean and biased variance (C,), and n/(n-1), which makes that unbiased.
    """
    bns, means, variances, unbiased = (list(of) for of in zip(*seen, strict=True))
    momentum = cast(float, bns[0].momentum)
    torch._foreach_lerp_([cast(Tensor, bn.running_mean) for bn in bns], means, momentum)
    variances = list(torch._foreach_mul(variances, unbiased))
    torch._foreach_lerp_([cast(Tensor, bn.running_var) for bn in bns], variances, momentum)
    torch._foreach_add_([cast(Tensor, bn.num_batches_tracked) for bn in bns], 1)
