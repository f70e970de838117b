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

from rnas.compute.precision import pass_dtype
from rnas.fast.cpu_kernels import check_many, depthwise
from rnas.fast.plan import (
    Backend,
    CellPlan,
    Convolution,
    ConvOperation,
    Executor,
    Source,
    TrainExecutor,
    is_pointwise,
    update_running_statistics,
)

BNs = Sequence[nn.BatchNorm2d]


class StackedOperation(NamedTuple):
    """One convolutional operation on those of the edges that leave a node that have it."""

    shape: Convolution
    edges: tuple[ConvOperation, ...]
    ends: tuple[int, ...] = (0,)
    """Which of the node's edges these are."""
    column: int = 0
    """Its column of the weights."""

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


def stacked(source: Source) -> list[StackedOperation]:
    """The convolutional operations that leave a node."""
    columns = sorted({k for edge in source.edges for k in edge.convolutions})
    found = []
    for k in columns:
        having = [(i, edge.convolutions[k]) for i, edge in enumerate(source.edges) if k in edge.convolutions]
        ends, edges = zip(*having, strict=True)
        found.append(StackedOperation(edges[0].shape, edges, ends, k))
    return found


def of_some(x: Tensor, ends: Sequence[int], edges: int) -> Tensor:
    """Of `x` (edges·C,) the parts of the edges `ends`."""
    return x if len(ends) == edges else torch.cat([x.view(edges, -1)[end] for end in ends])


def for_all(x: Tensor, ends: Sequence[int], edges: int, dim: int = 0) -> Tensor:
    """`x`, whose parts along `dim` are those of the edges `ends`, with zeros for the other edges."""
    if len(ends) == edges:
        return x
    parts = dict(zip(ends, x.chunk(len(ends), dim), strict=True))
    nothing = torch.zeros_like(parts[ends[0]])
    return torch.cat([parts.get(end, nothing) for end in range(edges)], dim)


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
    wanted = [row for source in sources for row in source.rows]
    columns = torch.stack([rows[row] for row in wanted], dim=1) if wanted else weights.new_zeros(weights.shape[1], 0)
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
        copies = self._for_each()
        return depthwise(copies[:, : len(kernel)], kernel, stride, dilation)

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
    return x.reshape(b, len(source.edges), -1, h, w)


def pools(x: Tensor, source: Source) -> list[Tensor]:
    """The pools of node `x`, without their BN."""
    return [
        F.max_pool2d(x, 3, source.stride, 1)
        if name.startswith("max")
        else F.avg_pool2d(x, 3, source.stride, 1, count_include_pad=False)
        for name in source.pool_names
    ]


class BatchStatistics(TrainExecutor):
    """BN as in train mode."""

    node = Node

    def __init__(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]):
        inputs, channels = plan.inputs, plan.channels
        sources = [source for source in plan.sources if source.edges]
        found = [[StackedOperation(o.shape, (o,))] for o in inputs] + [stacked(source) for source in sources]
        parts = joined([group for of in found for o in of for group in o.weights()], pass_dtype(weights))
        self._operations = {
            id(part): [(o, o.tensors(parts)) for o in of] for part, of in zip((*inputs, *sources), found, strict=True)
        }
        self._kept, self._channels = kept, channels
        self._eps = inputs[0].bns[0].eps
        most = max(max(len(source.pool_names), len(source.edges)) for source in sources) if sources else 0
        self._ones = weights.new_ones(max(most * channels, inputs[0].bns[0].num_features))
        self._alphas = dict(zip(map(id, sources), alphas(weights, sources, channels), strict=True))
        self._seen: list[tuple[Sequence[BNs], Tensor, Tensor, float]] = []

    def preprocessed(self, x: Tensor, operation: ConvOperation) -> Tensor:
        ((stack, tensors),) = self._operations[id(operation)]
        return self._normalized(self.node(x, 1).product(stack.shape, tensors), _alone(stack.bns()[0]))

    def mixed(self, x: Tensor) -> Tensor:
        return x[:, : self._channels]

    def brought(self, x: Tensor, images: int) -> Tensor:
        return x

    def outgoing(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        narrow, wide = self._alphas[id(source)]
        edges = len(source.edges)
        node, total = self.node(x, edges), None
        for operation, tensors in self._operations[id(source)]:
            z, bns = node.product(operation.shape, tensors), operation.bns()
            if operation.shape.kind == "separable":
                z = self._normalized(z, _alone(bns[0]), relu=True)
                z = pointwise(self.depthwise(z, tensors[2]), tensors[3])
            scale = of_some(wide[operation.column], operation.ends, edges)
            if len(operation.ends) == edges:
                total = self._normalized(z, _alone(bns[-1]), scale, total)
            else:
                out = self._normalized(z, _alone(bns[-1]), scale)
                total = _plus(for_all(out, operation.ends, edges, dim=1), total)
        total = self._passed(x, source, narrow, total)
        return _of_edges(total, source).unbind(1)

    def _passed(self, x: Tensor, source: Source, alpha: Sequence[Tensor], total: Tensor | None) -> Tensor:
        """`total` and each edge's share of node `x` and its pools: a matrix product over these."""
        if self._kept and source.skipping:
            total = self._plus_dropped(x, source, alpha, total)
        nodes, having = [], []
        if source.skipping and not self._kept:
            nodes.append(x)
            having.append([edge.skip for edge in source.edges])
        if source.pool_names:
            together = torch.cat(pools(x, source), dim=1)
            nodes.append(self._normalized(together, source.pool_bns))
            having += [[k if k in edge.pools else None for edge in source.edges] for k in source.pools]
        if not nodes:
            return cast(Tensor, total)  # no edge is without any operation
        out = torch.cat(nodes, dim=1)
        b, _, h, w = out.shape
        out = out.reshape(b, len(having), -1)
        shares = torch.stack([_shares(columns, alpha) for columns in having], dim=1).to(out.dtype)
        shares = shares.expand(b, *shares.shape)
        if total is None:
            return torch.bmm(shares, out).view(b, -1, h, w)
        return torch.baddbmm(total.reshape(b, len(source.edges), -1), shares, out).view(b, -1, h, w)

    def _plus_dropped(self, x: Tensor, source: Source, alpha: Sequence[Tensor], total: Tensor | None) -> Tensor:
        """`total` and what a dropout leaves of node `x` for each of its skips."""
        left = [
            (alpha[edge.skip][i] * self._kept[edge.row] * x).to(x.dtype)
            for i, edge in enumerate(source.edges)
            if edge.skip is not None
        ]
        ends = [i for i, edge in enumerate(source.edges) if edge.skip is not None]
        return _plus(for_all(torch.cat(left, dim=1), ends, len(source.edges), dim=1), total)

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
        each = [(bns, factor) for of, factor in zip(followers, unbiased, strict=True) for bns in of]
        sizes = [bns[0].num_features for bns, _ in each]
        statistics = zip(*(torch.split(v, sizes) for v in (torch.cat(means), variances)), strict=True)
        seen = [(bn, *of, factor) for (bns, factor), of in zip(each, statistics, strict=True) for bn in bns]
        update_running_statistics(seen)


def _shares(columns: Sequence[int | None], alpha: Sequence[Tensor]) -> Tensor:
    """What each edge takes of a value that is passed on, by its column of the weights: (E,); None takes nothing."""
    known = [k for k in columns if k is not None]
    if len(known) == len(columns) and len(set(known)) == 1:
        return alpha[known[0]]
    nothing = torch.zeros_like(alpha[0][0])
    return torch.stack([nothing if k is None else alpha[k][i] for i, k in enumerate(columns)])


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
        operation: StackedOperation,
        tensors: Iterator[Tensor],
        bns: Iterator[tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        alpha: Tensor | None = None,
        of_node: int = 1,
    ):
        """Takes its own from `tensors` and `bns`; `alpha` (E·C,) of all the edges of its node, as many as `of_node`."""
        own, edges = operation.tensors(tensors), len(operation.edges)
        middle = None
        if operation.shape.kind == "separable":
            scale, middle = next(bns)
            own[1] = own[1] * scale.view(edges, -1, 1)
        scale, bias = next(bns)
        if alpha is not None:
            alpha = of_some(alpha, operation.ends, of_node)
            scale, bias = scale * alpha, bias * alpha
        own[-1] = own[-1] * scale.view(edges, -1, 1)
        self.shape, self.ends, self.of_node = operation.shape, operation.ends, of_node
        self.tensors = [t.to(dtype) for t in own]
        self.middle = None if middle is None else middle.to(dtype).view(-1, 1, 1)
        self.bias = for_all(bias, operation.ends, of_node).view(-1, 1, 1)

    def add_to(self, total: Tensor | None, node: Node) -> Tensor:
        """`total` and what the operation, but for its `bias`, makes of the node: (B,E·C,H,W)."""
        if len(self.ends) < self.of_node:
            return _plus(for_all(self._product(None, node), self.ends, self.of_node, dim=1), total)
        return self._product(total, node)

    def _product(self, total: Tensor | None, node: Node) -> Tensor:
        if self.middle is None:
            return node.product(self.shape, self.tensors, total)
        z = (node.product(self.shape, self.tensors) + self.middle).relu_()
        return pointwise(depthwise(z, self.tensors[2], 1, 1), self.tensors[3], total)


class Folded(Executor):
    """BN as in eval mode, folded with α into the 1x1 convolutions."""

    def __init__(self, plan: CellPlan, weights: Tensor):
        dtype = pass_dtype(weights)
        inputs, self._channels = plan.inputs, plan.channels
        sources = [source for source in plan.sources if source.edges]
        entering = [StackedOperation(o.shape, (o,)) for o in inputs]
        leaving = [stacked(source) for source in sources]
        operations = [*entering, *(o for of in leaving for o in of)]
        tensors = joined([group for o in operations for group in o.weights()], weights.dtype)
        pool_bns = [bns for source in sources for bns in source.pool_bns]
        bns = scales_and_shifts([*(bns for o in operations for bns in o.bns()), *pool_bns])
        folded = [FoldedOperation(o, tensors, bns, dtype) for o in entering]
        self._inputs = {id(o): (f, f.bias.to(dtype)) for o, f in zip(inputs, folded, strict=True)}
        wide = [broad for _, broad in alphas(weights, sources, self._channels)]
        self._operations = {
            id(source): [FoldedOperation(o, tensors, bns, dtype, alpha[o.column], len(source.edges)) for o in of]
            for source, of, alpha in zip(sources, leaving, wide, strict=True)
        }
        self._affine = {
            id(source): self._affine_of(source, bns, alpha, dtype) for source, alpha in zip(sources, wide, strict=True)
        }

    def _affine_of(
        self, source: Source, bns: Iterator[tuple[Tensor, Tensor]], alpha: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The sum of all biases of a source's edges, and the scale of each node that they pass on, each (E,C,1,1)."""
        edges = len(source.edges)
        biases = [o.bias.flatten() for o in self._operations[id(source)]]
        scales = []
        if source.skipping:
            ends = [i for i, edge in enumerate(source.edges) if edge.skip is not None]
            column = next(edge.skip for edge in source.edges if edge.skip is not None)
            scales.append(for_all(of_some(alpha[column], ends, edges), ends, edges))
        for k in source.pools:
            ends = [i for i, edge in enumerate(source.edges) if k in edge.pools]
            scale, shift = next(bns)
            own = of_some(alpha[k], ends, edges)
            scales.append(for_all(scale * own, ends, edges))
            biases.append(for_all(shift * own, ends, edges))
        bias = torch.stack(biases).sum(0) if biases else torch.zeros_like(alpha[0])
        return bias.to(dtype).view(edges, -1, 1, 1), [scale.to(dtype).view(edges, -1, 1, 1) for scale in scales]

    def preprocessed(self, x: Tensor, operation: ConvOperation) -> Tensor:
        folded, bias = self._inputs[id(operation)]
        return folded.add_to(None, Node(x, 1)) + bias

    def mixed(self, x: Tensor) -> Tensor:
        return x[:, : self._channels]

    def brought(self, x: Tensor, images: int) -> Tensor:
        return x

    def outgoing(self, x: Tensor, source: Source) -> Sequence[Tensor]:
        node, total = Node(x, len(source.edges)), None
        for operation in self._operations[id(source)]:
            total = operation.add_to(total, node)
        bias, scales = self._affine[id(source)]
        out = bias if total is None else _of_edges(total, source) + bias
        nodes = [*([x] if source.skipping else []), *pools(x, source)]
        for value, scale in zip(nodes, scales, strict=True):
            out = torch.addcmul(out, value[:, None], scale)
        return out.unbind(1)


class OnGpu(Backend):
    """The fast supernet on a GPU, in torch's kernels."""

    def on_batch_statistics(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]) -> TrainExecutor:
        return BatchStatistics(plan, weights, kept)

    def folded(self, plan: CellPlan, weights: Tensor) -> Executor:
        return Folded(plan, weights)
