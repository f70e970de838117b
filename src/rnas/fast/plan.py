"""What the fast supernet computes: the operations on the edges that leave each node of a cell, and the modules of their
weights; and what a backend, which computes it on a kind of device, must offer.

The backends: `fast_cpu`, `fast_gpu`, `fast_triton`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from rnas.nets.ops import FactorizedReduce
from rnas.nets.space import Mask
from rnas.nets.supernet import MixedOperation

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
TENSORS = {"separable": 4, "dilated": 2, "reduce": 1, "direct": 1}


@dataclass(frozen=True)
class EdgePlan:
    """What is computed on one edge."""

    shapes: tuple[Convolution, ...]
    columns: tuple[int, ...]
    """of the weights, for `shapes`"""
    passed: tuple[tuple[int, int], ...]
    """(which of the node's values is passed on as it is, its column of the weights); of these 0 is the node itself,
    and its pools and what a dropout made of it follow"""

    def groups(self, values: Iterable[Any], folded: bool) -> list[list[Any]]:
        """The next of `values`, one for each tensor: of every convolution, as [head kernel, *middle, weight]."""
        rest = iter(values)
        counts = [TENSORS[shape.kind] + (folded and shape.kind == "separable") for shape in self.shapes]
        return [list(islice(rest, count)) for count in counts]


Plan = tuple[EdgePlan, ...]
"""Of every edge that leaves a node."""


def groups(plan: Plan, values: Sequence[Any], folded: bool) -> list[list[list[Any]]]:
    """`EdgePlan.groups` of every edge, from the values of all edges one after the other."""
    rest = iter(values)
    return [edge.groups(rest, folded) for edge in plan]


class ConvOperation:
    """A convolutional operation of an edge, or an input's preprocessing: the modules that hold its weights."""

    def __init__(self, kind: Kind, stride: int, module: nn.Module):
        self.shape = Convolution("reduce" if isinstance(module, FactorizedReduce) else kind, stride)
        self.module = module
        self.convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.bns = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.alone: Plan = (EdgePlan((self.shape,), (0,), ()),)  # of an input, which nothing else leaves


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
class Edge:
    """An edge that leaves a node, and what is on it, by columns of the weights. `none` is nothing."""

    row: int
    """of the weights"""
    convolutions: dict[int, ConvOperation]
    pools: dict[int, nn.BatchNorm2d]
    skip: int | None
    """The column of the operation that passes the node on as it is."""

    @classmethod
    def of(cls, row: int, stride: int, names: Sequence[str], mixed: MixedOperation) -> Edge:
        """`names` of the operations, by column."""
        modules = {int(k): module for k, module in mixed.operations.items() if names[int(k)] != "none"}
        pools = {k: cast(nn.Sequential, m)[1] for k, m in modules.items() if "pool" in names[k]}
        rest = {k: m for k, m in modules.items() if k not in pools and k != mixed.skip}
        convolutions = {k: ConvOperation(KINDS[names[k][:4]], stride, m) for k, m in rest.items()}
        return cls(row, convolutions, cast("dict[int, nn.BatchNorm2d]", pools), mixed.skip)

    def restricted_to(self, live: Sequence[bool]) -> Edge:
        """Without the operations that are not `live`."""
        return Edge(
            self.row,
            {k: o for k, o in self.convolutions.items() if live[k]},
            {k: bn for k, bn in self.pools.items() if live[k]},
            self.skip if self.skip is not None and live[self.skip] else None,
        )

    def __bool__(self) -> bool:
        """Whether there is anything on it."""
        return bool(self.convolutions or self.pools or self.skip is not None)


class Source:
    """A node of a cell, or one of its inputs, with the edges that leave it: those that have anything on them."""

    def __init__(self, stride: int, names: Sequence[str], edges: Iterable[Edge]):
        self.stride, self.names = stride, names
        self.edges = [edge for edge in edges if edge]
        self.rows = [edge.row for edge in self.edges]
        self.operations = [list(edge.convolutions.values()) for edge in self.edges]
        columns = sorted({k for edge in self.edges for k in edge.pools})
        self.pools = columns
        self.pool_names = [names[k] for k in columns]
        self.pool_bns = [[edge.pools[k] for edge in self.edges if k in edge.pools] for k in columns]
        self.skipping = [edge.row for edge in self.edges if edge.skip is not None]
        self.plan = self._plan(dropping=False)
        self.dropping_plan = self._plan(dropping=True)
        """After a dropout: each skip passes on what that left of the node for it."""

    def _plan(self, dropping: bool) -> Plan:
        first_left = 1 + len(self.pools)
        plan = []
        for edge in self.edges:
            skipped = first_left + self.skipping.index(edge.row) if dropping and edge.skip is not None else 0
            plan.append(
                EdgePlan(
                    shapes=tuple(o.shape for o in edge.convolutions.values()),
                    columns=tuple(edge.convolutions),
                    passed=(
                        *(() if edge.skip is None else ((skipped, edge.skip),)),
                        *((1 + i, k) for i, k in enumerate(self.pools) if k in edge.pools),
                    ),
                )
            )
        return tuple(plan)

    def restricted_to(self, live: Mask) -> Source:
        """Without the operations that are not `live`."""
        return Source(self.stride, self.names, [edge.restricted_to(live[edge.row]) for edge in self.edges])


class CellPlan(NamedTuple):
    """What is computed in a cell."""

    inputs: tuple[ConvOperation, ConvOperation]
    """The preprocessing of its inputs."""
    sources: tuple[Source, ...]
    """Its inputs and all nodes but the last."""
    channels: int
    """How many go through the operations of an edge."""

    def restricted_to(self, live: Mask) -> CellPlan:
        """Without the operations that are not `live`."""
        return self._replace(sources=tuple(source.restricted_to(live) for source in self.sources))

    def mixes_all(self) -> bool:
        """Whether all channels go through the operations."""
        return self.channels == self.inputs[0].bns[0].num_features

    def is_whole(self) -> bool:
        """Whether all channels go through the operations, and every node is at the end of an edge from each node before
        it, with the same operations on all edges that leave a node."""
        last = len(self.sources) - 1
        ends = [last, *range(last, 0, -1)]  # both inputs lead to all nodes, a node to those after it
        return self.mixes_all() and all(
            len(source.edges) == n and len(set(source.plan)) == 1 for source, n in zip(self.sources, ends, strict=True)
        )


class Executor(Protocol):
    """How a cell is computed, its BN included. Holds while parameters and the weights of operations stay."""

    def preprocessed(self, x: Tensor, operation: ConvOperation) -> Tensor:
        """A cell's input."""

    def mixed(self, x: Tensor) -> Tensor:
        """Of node `x` (B,C,H,W) the channels that go through the operations, if these are not all; laid out for
        `outgoing`."""

    def outgoing(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        """What each edge that leaves node `x` brings to its end. # Eq. 1"""

    def brought(self, x: Tensor, images: int) -> Tensor:
        """The sum of what edges bring, laid out as by `mixed`, of so many images: (B,C,H,W)."""


@runtime_checkable
class CellExecutor(Executor, Protocol):
    """Which computes a cell as a whole."""

    def run(self, s0: Tensor, s1: Tensor) -> Tensor:
        """The cell's output (B,nodes·C,H,W), from the outputs of the cell before last and the last."""


class TrainExecutor(Executor, Protocol):
    """With the batch's statistics, which it remembers."""

    def update(self) -> None:
        """Let the running statistics of every BN that was seen follow, as `nn.BatchNorm2d` does."""


class Backend(Protocol):
    """How cells are computed on a kind of device. `weights` (edges, operations)."""

    def on_batch_statistics(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]) -> TrainExecutor:
        """For train mode. `kept`: of the edges with a skip that drops values, what these are multiplied with."""

    def folded(self, plan: CellPlan, weights: Tensor) -> Executor:
        """For eval mode: BN and the weights are folded into the 1x1 convolutions."""


@torch.no_grad()
def update_running_statistics(seen: Sequence[tuple[nn.BatchNorm2d, Tensor, Tensor, float]]) -> None:
    """Let the running statistics of every BN seen follow those of the batch, as `nn.BatchNorm2d` does.

    Each with the batch's mean and biased variance (C,), and n/(n-1), which makes that unbiased.
    """
    bns, means, variances, unbiased = (list(of) for of in zip(*seen, strict=True))
    momentum = cast(float, bns[0].momentum)
    torch._foreach_lerp_([cast(Tensor, bn.running_mean) for bn in bns], means, momentum)
    variances = list(torch._foreach_mul(variances, unbiased))
    torch._foreach_lerp_([cast(Tensor, bn.running_var) for bn in bns], variances, momentum)
    torch._foreach_add_([cast(Tensor, bn.num_batches_tracked) for bn in bns], 1)
