"""What the fast supernet differentiates: all that leaves a node as one function with a backward of its own, and BN.

Edge by edge and operation by operation, so that what each leaves behind is reused while it is in the cache. Saved is
what the backward cannot cheaply recompute, and only the gradients that are asked for are computed: with frozen weights,
none for weights. Batch statistics leave as outputs without gradient, because whoever owns the running
statistics updates them. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnas.nets.fast_kernels import (
    arrange,
    centered,
    channel_sum,
    depthwise,
    depthwise_input_grad,
    depthwise_weight_grad,
    inner,
    per_channel,
    pointwise,
    pointwise_add,
    pointwise_centered,
    pointwise_input_grad,
    pointwise_weight_grad,
)

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


def _head(x: Tensor, shape: Convolution, kernel: Tensor) -> Tensor:
    """What the first 1x1 convolution of an operation sees."""
    if shape.kind == "direct":
        return x
    if shape.kind == "separable":
        return depthwise(x, kernel, shape.stride, 1)
    if shape.kind == "reduce":
        return torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)
    if shape.stride == 2:  # dilated, it sees only every other pixel: a plain convolution of those
        return depthwise(arrange(x[:, :, ::2, ::2]), kernel, 1, 1)
    return depthwise(x, kernel, 1, 2)


class _HeadBackward:
    """Collects the gradient of the heads for the input `x` that they share."""

    def __init__(self, x: Tensor, needed: bool):
        self.x = x
        self.needed = needed
        self.grad: Tensor | None = None

    def add(self, shape: Convolution, kernel: Tensor, grad: Tensor, of_kernel: bool) -> Tensor | None:
        """Take in the gradient of one head; the gradient of its kernel, if wanted."""
        if shape.kind == "direct":
            self.grad = grad if self.grad is None else self.grad.add_(grad)
            return None
        if shape.kind == "reduce":
            if self.needed:
                even, odd = grad.chunk(2, dim=1)
                self._grid()[:, :, ::2, ::2] += even
                self._grid()[:, :, 1::2, 1::2] += odd
            return None
        every = 2 if shape == ("dilated", 2) else 1
        x = self.x if every == 1 else arrange(self.x[:, :, ::2, ::2])
        stride = shape.stride // every
        dilation = 2 if shape == ("dilated", 1) else 1
        if self.needed:
            part = depthwise_input_grad(x, kernel, grad, stride, dilation)
            if every == 2:
                self._grid()[:, :, ::2, ::2] += part
            else:
                self.grad = part if self.grad is None else self.grad.add_(part)
        return depthwise_weight_grad(x, kernel, grad, stride, dilation) if of_kernel else None

    def _grid(self) -> Tensor:
        if self.grad is None:
            self.grad = torch.zeros_like(self.x)
        return self.grad


def _where_positive(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.threshold_backward(grad, x, 0)
    return result


def _normalize_backward(grad: Tensor, centered: Tensor, inverse_std: Tensor) -> Tensor:
    """The gradient through BN with batch statistics, of `centered * inverse_std`, for what was centered."""
    n = grad.numel() // grad.shape[1]
    along = channel_sum(grad * centered) * inverse_std.pow(3) / n
    out = (grad - per_channel(channel_sum(grad) / n)).mul_(per_channel(inverse_std))
    return out.addcmul_(centered, per_channel(along), value=-1)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, var = centered(x)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x, inverse_std)
        ctx.mark_non_differentiable(mean, var)
        return x * per_channel(inverse_std), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor, None]:
        return _normalize_backward(arrange(grad), *ctx.saved_tensors), None


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BN with batch statistics: (B,C,H,W), and the statistics, mean and biased variance (C,)."""
    return _Normalize.apply(x, eps)  # type: ignore[no-any-return,no-untyped-call]


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


class _Passed:
    """The gradients of what is passed on, summed over edges."""

    def __init__(self, needed: Sequence[bool]):
        self.needed = needed
        self.grads: list[Tensor | None] = [None] * len(needed)

    def add(self, which: int, grad: Tensor, scale: Tensor) -> None:
        if self.needed[which]:
            so_far = self.grads[which]
            self.grads[which] = grad * scale if so_far is None else so_far.addcmul_(grad, scale)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Leaving, eps: float, count: int, weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        nodes, tensors = tensors[:count], tensors[count:]
        needs = plan.groups(ctx.needs_input_grad[4 + count :], folded=False)
        x = nodes[0].relu()
        alpha = [row.unbind() for row in weights.unbind()]
        saved: list[Tensor | None] = []
        statistics: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        for row, edge, edge_needs in zip(alpha, plan.groups(tensors, folded=False), needs, strict=True):
            total = None
            for shape, column, own, needed in zip(plan.shapes, plan.columns, edge, edge_needs, strict=True):
                h = _head(x, shape, own[0])
                if shape.kind == "separable":
                    z, mean, var = pointwise_centered(h, own[1])
                    statistics.append((mean, var))
                    inverse_std = (var + eps).rsqrt()
                    saved += [h if needed[1] else None, z, inverse_std]
                    h = depthwise(z.relu().mul_(per_channel(inverse_std)), own[2], 1, 1)
                z, mean, var = pointwise_centered(h, own[-1])
                statistics.append((mean, var))
                inverse_std = (var + eps).rsqrt()
                saved += [h if needed[-1] else None, z, inverse_std]
                scale = per_channel(row[column] * inverse_std)
                total = z * scale if total is None else total.addcmul_(z, scale)
            for which, column in plan.passed:
                total = _add_scaled(total, nodes[which], row[column])
            assert total is not None, "an edge has an operation besides none"
            outputs.append(total)
        ctx.save_for_backward(weights, x, *nodes, *tensors, *saved)
        ctx.plan, ctx.count, ctx.tensors = plan, count, len(tensors)
        if not statistics:
            return tuple(outputs)
        mean, var = (torch.stack(s) for s in zip(*statistics, strict=True))
        ctx.mark_non_differentiable(mean, var)
        return *outputs, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Leaving = ctx.plan
        weights, x, *rest = ctx.saved_tensors
        nodes, rest = rest[: ctx.count], rest[ctx.count :]
        tensors, saved = rest[: ctx.tensors], iter(rest[ctx.tensors :])
        needs = ctx.needs_input_grad[4:]
        heads = _HeadBackward(x, needs[0])
        passed = _Passed(needs[: ctx.count])
        alpha = [row.unbind() for row in weights.unbind()]
        zero = weights.new_zeros(())
        grad_alpha = [[zero] * len(row) for row in alpha]
        grad_tensors: list[Tensor | None] = []
        edge_needs = plan.groups(needs[ctx.count :], folded=False)
        for i, edge in enumerate(plan.groups(tensors, folded=False)):
            grad = arrange(grads[i])
            n = grad.numel() // grad.shape[1]
            around_0 = grad - per_channel(channel_sum(grad) / n) if edge else grad
            for shape, column, own, needed in zip(plan.shapes, plan.columns, edge, edge_needs[i], strict=True):
                if shape.kind == "separable":
                    h1, z1, inverse_std1 = next(saved), next(saved), next(saved)
                h, z, inverse_std = next(saved), next(saved), next(saved)
                # α's gradient and BN's share their one reduction over pixels.
                along = channel_sum(grad * z) * inverse_std
                grad_alpha[i][column] = along.sum()
                scale = alpha[i][column] * inverse_std
                slope = per_channel(scale * inverse_std * along / n)
                g = (around_0 * per_channel(scale)).addcmul_(z, slope, value=-1)
                of_tensors = [pointwise_weight_grad(h, g) if needed[-1] else None]
                g = pointwise_input_grad(g, own[-1])
                if shape.kind == "separable":
                    if needed[2]:
                        again = z1.relu().mul_(per_channel(inverse_std1))
                        of_tensors.insert(0, depthwise_weight_grad(again, own[2], g, 1, 1))
                    else:
                        of_tensors.insert(0, None)
                    g = _where_positive(depthwise_input_grad(z1, own[2], g, 1, 1), z1)
                    g = _normalize_backward(g, z1, inverse_std1)
                    of_tensors.insert(0, pointwise_weight_grad(h1, g) if needed[1] else None)
                    g = pointwise_input_grad(g, own[1])
                of_kernel = heads.add(shape, own[0], g, needed[0])
                grad_tensors += of_tensors if len(own) == 1 else [of_kernel, *of_tensors]
            for which, column in plan.passed:
                passed.add(which, grad, alpha[i][column])
                if ctx.needs_input_grad[3]:
                    grad_alpha[i][column] = inner(grad, nodes[which])
        of_weights = None
        if ctx.needs_input_grad[3]:
            of_weights = torch.stack([torch.stack(row) for row in grad_alpha])
        of_heads = None if heads.grad is None else _where_positive(heads.grad, x)
        passed.grads[0] = _plus(passed.grads[0], of_heads)
        return None, None, None, of_weights, *passed.grads, *grad_tensors


def _add_scaled(total: Tensor | None, x: Tensor, scale: Tensor) -> Tensor:
    return x * scale if total is None else total.addcmul_(x, scale)


def mix(
    plan: Leaving, weights: Tensor, nodes: Sequence[Tensor], tensors: Sequence[Tensor], eps: float
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """For each edge that leaves a node the weighted sum of its operations, BN with batch statistics. # Eq. 1

    `weights` (edges, operations); `nodes`: the node (B,C,H,W) before its ReLU, and its normalised pools; `tensors`:
    those of every convolution of every edge, one after the other. Also the statistics of each BN in the same order:
    mean and biased variance, each (D,).
    """
    out = _Mix.apply(plan, eps, len(nodes), weights, *nodes, *tensors)  # type: ignore[no-untyped-call]
    statistics = list(zip(out[-2].unbind(), out[-1].unbind(), strict=True)) if plan.shapes else []
    return list(out[: plan.edges]), statistics


class _MixFolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Leaving, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        constants = plan.edges * (1 + len(plan.passed))
        nodes, affine, tensors = tensors[:count], tensors[count : count + constants], tensors[count + constants :]
        needs = plan.groups(ctx.needs_input_grad[2 + count + constants :], folded=True)
        x = nodes[0].relu()
        saved: list[Tensor | None] = []
        outputs: list[Tensor] = []
        of_edge = iter(affine)
        for edge, edge_needs in zip(plan.groups(tensors, folded=True), needs, strict=True):
            total, bias = None, next(of_edge)
            for shape, own, needed in zip(plan.shapes, edge, edge_needs, strict=True):
                h = _head(x, shape, own[0])
                if shape.kind == "separable":
                    z = pointwise(h, own[1], own[2]).relu_()
                    saved += [h if needed[1] else None, z]
                    h = depthwise(z, own[3], 1, 1)
                saved.append(h if needed[-1] else None)
                if total is None:
                    total = pointwise(h, own[-1], bias)
                else:
                    pointwise_add(total, h, own[-1])
            for which, _ in plan.passed:
                if total is None:
                    total = (nodes[which] * next(of_edge)).add_(per_channel(bias))
                else:
                    total.addcmul_(nodes[which], next(of_edge))
            assert total is not None, "an edge has an operation besides none"
            outputs.append(total)
        ctx.save_for_backward(x, *nodes, *affine, *tensors, *saved)
        ctx.plan, ctx.count, ctx.constants, ctx.tensors = plan, count, constants, len(tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Leaving = ctx.plan
        x, *rest = ctx.saved_tensors
        nodes, rest = rest[: ctx.count], rest[ctx.count :]
        affine, rest = iter(rest[: ctx.constants]), rest[ctx.constants :]
        tensors, saved = rest[: ctx.tensors], iter(rest[ctx.tensors :])
        needs = ctx.needs_input_grad[2:]
        heads = _HeadBackward(x, needs[0])
        passed = _Passed(needs[: ctx.count])
        affine_needs = iter(needs[ctx.count : ctx.count + ctx.constants])
        edge_needs = plan.groups(needs[ctx.count + ctx.constants :], folded=True)
        grad_affine: list[Tensor | None] = []
        grad_tensors: list[Tensor | None] = []
        for i, edge in enumerate(plan.groups(tensors, folded=True)):
            grad = arrange(grads[i])
            next(affine)
            grad_affine.append(channel_sum(grad) if next(affine_needs) else None)
            for shape, own, needed in zip(plan.shapes, edge, edge_needs[i], strict=True):
                if shape.kind == "separable":
                    h1, z = next(saved), next(saved)
                h = next(saved)
                of_tensors = [pointwise_weight_grad(h, grad) if needed[-1] else None]
                g = pointwise_input_grad(grad, own[-1])
                if shape.kind == "separable":
                    of_tensors.insert(0, depthwise_weight_grad(z, own[3], g, 1, 1) if needed[3] else None)
                    g = _where_positive(depthwise_input_grad(z, own[3], g, 1, 1), z)
                    of_tensors.insert(0, channel_sum(g) if needed[2] else None)
                    of_tensors.insert(0, pointwise_weight_grad(h1, g) if needed[1] else None)
                    g = pointwise_input_grad(g, own[1])
                of_kernel = heads.add(shape, own[0], g, needed[0])
                grad_tensors += of_tensors if len(own) == 1 else [of_kernel, *of_tensors]
            for which, _ in plan.passed:
                scale = next(affine)
                passed.add(which, grad, scale)
                of_scale = channel_sum(grad * nodes[which]).view(-1, 1, 1) if next(affine_needs) else None
                grad_affine.append(of_scale)
        of_heads = None if heads.grad is None else _where_positive(heads.grad, x)
        passed.grads[0] = _plus(passed.grads[0], of_heads)
        return None, None, *passed.grads, *grad_affine, *grad_tensors


def mix_folded(
    plan: Leaving, nodes: Sequence[Tensor], affine: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """For each edge that leaves a node the sum of its operations, with BN and α in the tensors already. # Eq. 1

    `nodes`: the node (B,C,H,W) before its ReLU, and its pools; `affine`: for every edge its bias (D,) and the scale
    (D,1,1) of each node that it passes on; `tensors`: those of every convolution of every edge.
    """
    return _MixFolded.apply(plan, len(nodes), *nodes, *affine, *tensors)  # type: ignore[no-untyped-call,no-any-return]
