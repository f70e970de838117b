"""The fast supernet on a GPU: all the edges that leave a node side by side, in few and large kernels.

A GPU waits for small kernels to be launched longer than for what they compute. So an operation on E edges is one: its
depthwise convolutions are one of E·C channels, its 1x1 convolutions one batched matrix product, its BNs one, whose
scale is α. Activations are (B,E·C,H,W), edge after edge; the backward pass is autograd's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas.nets.fast_kernels import check_many, depthwise
from rnas.nets.fast_nodes import Convolution, Convolving, Rule, Source, TrainRule, follow, is_pointwise
from rnas.precision import pass_dtype

BNs = Sequence[nn.BatchNorm2d]


class Beside(NamedTuple):
    """One convolutional operation on all the edges that leave a node."""

    shape: Convolution
    edges: tuple[Convolving, ...]

    def weights(self) -> list[list[Tensor]]:
        """Those of each of its convolutions, of every edge."""
        return [[conv.weight for conv in convs] for convs in zip(*(o.convs for o in self.edges), strict=True)]

    def bns(self) -> list[BNs]:
        """Each of its BNs, of every edge."""
        return list(zip(*(o.bns for o in self.edges), strict=True))

    def tensors(self, weights: Iterator[Tensor]) -> list[Tensor]:
        """From the next of `weights`, joined: kernels (E·C,1,k,k), 1x1 weights (E,D,C), as `Convolution` lists them."""
        own = []
        for conv in self.edges[0].convs:
            weight = next(weights)
            own.append(weight.view(len(self.edges), -1, weight.shape[1]) if is_pointwise(conv) else weight)
        if self.shape.kind == "reduce":
            even, odd = own
            c = even.shape[2]
            own = [torch.cat([F.pad(even, (0, c)), F.pad(odd, (c, 0))], dim=1)]
        return own


def beside(source: Source) -> list[Beside]:
    """The convolutional operations that leave a node."""
    return [Beside(edges[0].shape, edges) for edges in zip(*source.operations, strict=True)]


def joined(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of each group, alike in shape, joined along their first dimension; one kernel for all groups."""
    flat = torch.cat([t.flatten() for group in groups for t in group]).to(dtype)
    parts = torch.split(flat, [len(group) * group[0].numel() for group in groups])
    return (part.view(-1, *group[0].shape[1:]) for part, group in zip(parts, groups, strict=True))


def alphas(
    weights: Tensor, sources: Sequence[Source], channels: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """For each source α's columns (E,), and the same for each channel (E·C,). `weights` (edges, operations)."""
    rows = weights.unbind()
    columns = torch.stack([rows[row] for source in sources for row in source.rows], dim=1)
    wide = columns[:, :, None].expand(-1, -1, channels).flatten(1)
    counts = [len(source.rows) for source in sources]
    narrow = zip(*(torch.split(column, counts) for column in columns.unbind()), strict=True)
    broad = zip(*(torch.split(column, [n * channels for n in counts]) for column in wide.unbind()), strict=True)
    return zip(narrow, broad, strict=True)


def pointwise(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of each edge's part of `x` (B,E·C,H,W) with its own `weight` (E,D,C), and `plus`.

    The result, and `plus`: (B,E·D,H,W).
    """
    (b, _, h, w), (e, d, c) = x.shape, weight.shape
    weight = weight.expand(b, e, d, c).reshape(-1, d, c)
    x = x.reshape(-1, c, h * w)
    out = torch.bmm(weight, x) if plus is None else torch.baddbmm(plus.reshape(-1, d, h * w), weight, x)
    return out.view(b, e * d, h, w)


class Node:
    """A node after its ReLU, as the operations of its edges see it."""

    def __init__(self, x: Tensor, edges: int):
        self._x = x.relu()
        self._edges = edges
        self._copies: Tensor | None = None

    def product(self, shape: Convolution, tensors: Sequence[Tensor], plus: Tensor | None = None) -> Tensor:
        """What the first 1x1 convolution of an operation makes of it, and `plus`: (B,E·D,H,W)."""
        if shape.kind in ("separable", "dilated"):
            dilation = 2 if shape.kind == "dilated" else 1
            return pointwise(self.depthwise(tensors[0], shape.stride, dilation), tensors[1], plus)
        x = self._x
        if shape.kind == "reduce":
            x = torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)
        return _plus(F.conv2d(x, tensors[0].flatten(0, 1)[:, :, None, None]), plus)

    def depthwise(self, kernel: Tensor, stride: int, dilation: int) -> Tensor:
        """Its depthwise convolutions with the `kernel` (E·C,1,k,k) of every edge: (B,E·C,H,W)."""
        return depthwise(self._for_each(), kernel, stride, dilation)

    def _for_each(self) -> Tensor:
        """A copy for each edge: (B,E·C,H,W)."""
        if self._copies is None:
            b, c, h, w = self._x.shape
            self._copies = self._x[:, None].expand(b, self._edges, c, h, w).reshape(b, -1, h, w)
        return self._copies


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _of_edges(x: Tensor, source: Source) -> Tensor:
    """(B,E·C,H,W) to (B,E,C,H,W)."""
    b, _, h, w = x.shape
    return x.reshape(b, source.plan.edges, -1, h, w)


def pools(x: Tensor, source: Source) -> list[Tensor]:
    """The pools of node `x`, without their BN."""
    return [
        F.max_pool2d(x, 3, source.stride, 1)
        if name.startswith("max")
        else F.avg_pool2d(x, 3, source.stride, 1, count_include_pad=False)
        for name in source.pool_names
    ]


class BatchStatistics(TrainRule):
    """BN as in train mode."""

    node = Node

    def __init__(self, entrances: Sequence[Convolving], sources: Sequence[Source], weights: Tensor):
        found = [[Beside(e.shape, (e,))] for e in entrances] + [beside(source) for source in sources]
        parts = joined([group for of in found for o in of for group in o.weights()], pass_dtype(weights))
        self._operations = {
            id(part): [(o, o.tensors(parts)) for o in of]
            for part, of in zip((*entrances, *sources), found, strict=True)
        }
        self._channels, self._eps = entrances[0].bns[0].num_features, entrances[0].bns[0].eps
        most = max(max(len(source.pool_names), source.plan.edges) for source in sources)
        self._ones = weights.new_ones(most * self._channels)
        self._alphas = dict(zip(map(id, sources), alphas(weights, sources, self._channels), strict=True))
        self._seen: list[tuple[Sequence[BNs], Tensor, Tensor, float]] = []

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        ((operation, tensors),) = self._operations[id(entrance)]
        return self._normalized(self.node(x, 1).product(operation.shape, tensors), _alone(operation.bns()[0]))

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        narrow, wide = self._alphas[id(source)]
        node, total = self.node(x, source.plan.edges), None
        for (operation, tensors), column in zip(self._operations[id(source)], source.plan.columns, strict=True):
            z, bns = node.product(operation.shape, tensors), operation.bns()
            if operation.shape.kind == "separable":
                z = self._normalized(z, _alone(bns[0]), relu=True)
                z = pointwise(self.depthwise(z, tensors[2]), tensors[3])
            total = self._normalized(z, _alone(bns[-1]), wide[column], total)
        if source.plan.passed:
            total = self._passed(x, source, narrow, total)
        assert total is not None, "an edge has an operation besides none"
        return _of_edges(total, source).unbind(1)

    def _passed(self, x: Tensor, source: Source, alpha: Sequence[Tensor], total: Tensor | None) -> Tensor:
        """`total` and each edge's share of node `x` and its pools: a matrix product over these."""
        nodes = [x] if any(which == 0 for which, _ in source.plan.passed) else []
        if source.pool_names:
            together = torch.cat(pools(x, source), dim=1)
            nodes.append(self._normalized(together, source.pool_bns))
        out = torch.cat(nodes, dim=1)
        b, _, h, w = out.shape
        out = out.reshape(b, len(source.plan.passed), -1)
        shares = torch.stack([alpha[column] for _, column in source.plan.passed], dim=1).to(out.dtype)
        shares = shares.expand(b, *shares.shape)
        if total is None:
            return torch.bmm(shares, out).view(b, -1, h, w)
        return torch.baddbmm(total.reshape(b, source.plan.edges, -1), shares, out).view(b, -1, h, w)

    def _normalized(
        self,
        x: Tensor,
        followers: Sequence[BNs],
        scale: Tensor | None = None,
        plus: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """`x` (B,N·C,H,W) after N BNs, times `scale` (N·C,), and `plus`; then a ReLU, if wanted.

        `followers`: whose running statistics follow each."""
        n = check_many(x)
        scale = self._ones[: x.shape[1]] if scale is None else scale  # with a scale, statistics have its number format
        out, mean, inverse_std = self.normalized(x, scale, plus, relu)
        self._seen.append((followers, mean.detach(), inverse_std.detach(), n / (n - 1)))
        return out

    def normalized(self, x: Tensor, scale: Tensor, plus: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`x` (B,N·C,H,W) normalized, times `scale`, and `plus`, and its ReLU; the mean and 1/σ of each channel."""
        out, mean, inverse_std = torch.native_batch_norm(x, scale, None, None, None, True, 0.0, self._eps)
        out = _plus(out, plus)
        return out.relu_() if relu else out, mean, inverse_std

    def depthwise(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The depthwise convolution of `x` (B,E·C,H,W) with `kernel` (E·C,1,k,k)."""
        return depthwise(x, kernel, 1, 1)

    def update(self) -> None:
        followers, means, inverse_stds, unbiased = zip(*self._seen, strict=True)
        variances = (torch.cat(inverse_stds).square().reciprocal() - self._eps).clamp_min_(0)
        statistics = zip(*(v.view(-1, self._channels).unbind() for v in (torch.cat(means), variances)), strict=True)
        each = [(bns, factor) for of, factor in zip(followers, unbiased, strict=True) for bns in of]
        seen = [(bn, *of, factor) for (bns, factor), of in zip(each, statistics, strict=True) for bn in bns]
        follow(seen)


def _alone(bns: BNs) -> list[BNs]:
    """Each BN the only one that follows its statistics."""
    return [(bn,) for bn in bns]


def scales_and_shifts(groups: Sequence[BNs]) -> Iterator[tuple[Tensor, Tensor]]:
    """The BNs of each group, with running statistics, as x · scale + shift, each (E·C,)."""
    bns = [bn for group in groups for bn in group]
    scale = (torch.cat([cast(Tensor, bn.running_var) for bn in bns]) + bns[0].eps).rsqrt()
    shift = -torch.cat([cast(Tensor, bn.running_mean) for bn in bns]) * scale
    sizes = [sum(bn.num_features for bn in group) for group in groups]
    return zip(torch.split(scale, sizes), torch.split(shift, sizes), strict=True)


class FoldedOperation:
    """One convolutional operation on all the edges that leave a node, with BN's scales and α in its 1x1 weights."""

    def __init__(
        self,
        operation: Beside,
        tensors: Iterator[Tensor],
        bns: Iterator[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        alpha: Tensor | None = None,
    ):
        """Takes its own from `tensors` and `bns`; `alpha` (E·C,)."""
        own, edges = operation.tensors(tensors), len(operation.edges)
        middle = None
        if operation.shape.kind == "separable":
            scale, middle = next(bns)
            own[1] = own[1] * scale.view(edges, -1, 1)
        scale, bias = next(bns)
        if alpha is not None:
            scale, bias = scale * alpha, bias * alpha
        own[-1] = own[-1] * scale.view(edges, -1, 1)
        self.shape = operation.shape
        self.tensors = [t.to(dtype) for t in own]
        self.middle = None if middle is None else middle.to(dtype).view(-1, 1, 1)
        self.bias = bias.view(-1, 1, 1)

    def add_to(self, total: Tensor | None, node: Node) -> Tensor:
        """`total` and what the operation, but for its `bias`, makes of the node: (B,E·C,H,W)."""
        if self.middle is None:
            return node.product(self.shape, self.tensors, total)
        z = (node.product(self.shape, self.tensors) + self.middle).relu_()
        return pointwise(depthwise(z, self.tensors[2], 1, 1), self.tensors[3], total)


class Folded(Rule):
    """BN as in eval mode, folded with α into the 1x1 convolutions."""

    def __init__(self, entrances: Sequence[Convolving], sources: Sequence[Source], weights: Tensor):
        dtype = pass_dtype(weights)
        entering = [Beside(e.shape, (e,)) for e in entrances]
        leaving = [beside(source) for source in sources]
        operations = [*entering, *(o for of in leaving for o in of)]
        tensors = joined([group for o in operations for group in o.weights()], weights.dtype)
        pool_bns = [bns for source in sources for bns in source.pool_bns]
        bns = scales_and_shifts([*(bns for o in operations for bns in o.bns()), *pool_bns])
        folded = [FoldedOperation(o, tensors, bns, dtype) for o in entering]
        self._entrances = {id(e): (o, o.bias.to(dtype)) for e, o in zip(entrances, folded, strict=True)}
        wide = [broad for _, broad in alphas(weights, sources, entrances[0].bns[0].num_features)]
        self._operations = {
            id(source): [
                FoldedOperation(o, tensors, bns, dtype, alpha[column])
                for o, column in zip(of, source.plan.columns, strict=True)
            ]
            for source, of, alpha in zip(sources, leaving, wide, strict=True)
        }
        self._affine = {
            id(source): self._affine_of(source, bns, alpha, dtype) for source, alpha in zip(sources, wide, strict=True)
        }

    def _affine_of(
        self, source: Source, bns: Iterator[tuple[Tensor, Tensor]], alpha: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The sum of all biases of a source's edges, and the scale of each node that they pass on, each (E,C,1,1)."""
        edges = source.plan.edges
        biases = [o.bias.flatten() for o in self._operations[id(source)]]
        scales = []
        for which, column in source.plan.passed:
            scale = alpha[column]
            if which > 0:
                of_bn, shift = next(bns)
                scale = of_bn * scale
                biases.append(shift * alpha[column])
            scales.append(scale.to(dtype).view(edges, -1, 1, 1))
        bias = torch.stack(biases).sum(0) if biases else torch.zeros_like(alpha[0])
        return bias.to(dtype).view(edges, -1, 1, 1), scales

    def enter(self, x: Tensor, entrance: Convolving) -> Tensor:
        operation, bias = self._entrances[id(entrance)]
        return operation.add_to(None, Node(x, 1)) + bias

    def leave(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        node, total = Node(x, source.plan.edges), None
        for operation in self._operations[id(source)]:
            total = operation.add_to(total, node)
        bias, scales = self._affine[id(source)]
        out = bias if total is None else _of_edges(total, source) + bias
        nodes = [x, *pools(x, source)]
        for (which, _), scale in zip(source.plan.passed, scales, strict=True):
            out = torch.addcmul(out, nodes[which][:, None], scale)
        return out.unbind(1)
