"""What the fast supernet differentiates: all that leaves a node as one function with a backward of its own, and BN.

Edge by edge and operation by operation, so that what each leaves behind is reused while it is in the cache. Only the
gradients that are asked for are computed, and only what they need is saved: with frozen weights, nothing for weights.
Batch statistics leave as outputs without gradient, because whoever owns the running statistics updates them.
Differentiable once.

Under autocast activations, kernels and 1x1 weights are bfloat16 in here; α, scales, shifts and statistics stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnas.compute.layout import arrange
from rnas.compute.precision import pass_dtype
from rnas.fast.cpu_kernels import (
    centered,
    channel_sum,
    depthwise,
    depthwise_input_grad,
    depthwise_weight_grad,
    inner,
    per_channel,
    per_filter,
    pointwise,
    pointwise_add,
    pointwise_centered,
    pointwise_input_grad,
    pointwise_weight_grad,
    scaled,
    shifted,
)
from rnas.fast.plan import Convolution, Plan, groups


class _Heads:
    """What the first 1x1 convolution of each operation sees of the input `x` that they share, and the way back."""

    def __init__(self, x: Tensor, grad_needed: bool = False):
        self.x = x
        self.grad_needed = grad_needed
        self.grad: Tensor | None = None
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def output(self, shape: Convolution, kernel: Tensor) -> Tensor:
        if shape.kind == "direct":
            return self.x
        if shape.kind == "reduce":
            return torch.cat([self.x[:, :, ::2, ::2], self.x[:, :, 1::2, 1::2]], dim=1)
        return depthwise(*self._seen(shape, kernel))

    def add(self, shape: Convolution, kernel: Tensor, grad: Tensor, of_kernel: bool) -> Tensor | None:
        """Take in the gradient of one output; the gradient of its kernel, if wanted."""
        if shape.kind in ("direct", "reduce"):
            if self.grad_needed and shape.kind == "direct":
                self.grad = grad if self.grad is None else self.grad.add_(grad)
            elif self.grad_needed:
                even, odd = grad.chunk(2, dim=1)
                self._grid()[:, :, ::2, ::2] += even
                self._grid()[:, :, 1::2, 1::2] += odd
            return None
        x, kernel, stride, dilation = self._seen(shape, kernel)
        if self.grad_needed:
            part = depthwise_input_grad(x, kernel, grad, stride, dilation)
            if x is not self.x:
                self._grid()[:, :, ::2, ::2] += part
            else:
                self.grad = part if self.grad is None else self.grad.add_(part)
        return depthwise_weight_grad(x, kernel, grad, stride, dilation, self._kept) if of_kernel else None

    def _seen(self, shape: Convolution, kernel: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """The arguments of `depthwise`."""
        if shape.kind == "separable":
            return self.x, kernel, shape.stride, 1
        if shape.stride == 1:
            return self.x, kernel, 1, 2
        # Dilated and with stride 2, it sees only every other pixel: a plain convolution of those.
        if ("even",) not in self._kept:
            self._kept["even",] = arrange(self.x[:, :, ::2, ::2])
        return self._kept["even",], kernel, 1, 1

    def _grid(self) -> Tensor:
        if self.grad is None:
            self.grad = torch.zeros_like(self.x)
        return self.grad


def _where_positive(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.threshold_backward(grad, x, 0)
    return result


def _normalize_backward(grad: Tensor, z: Tensor, inverse_std: Tensor, pack: int) -> Tensor:
    """The gradient through BN with batch statistics, for what was centered to `z`.

    `grad`: the gradient for the result `z * inverse_std`, times `inverse_std`; used up.
    """
    n = grad.numel() // grad.shape[1] * pack
    along = channel_sum(grad * z, pack) * inverse_std.square() / n
    grad -= per_channel(channel_sum(grad, pack) / n)
    return grad.addcmul_(z, per_channel(along), value=-1)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, pack: int) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, var = centered(x, pack)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x, inverse_std)
        ctx.mark_non_differentiable(mean, var)
        ctx.pack = pack
        return scaled(x, per_channel(inverse_std)), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor, None, None]:
        x, inverse_std = ctx.saved_tensors
        grad = scaled(arrange(grad), per_channel(inverse_std))
        return _normalize_backward(grad, x, inverse_std, ctx.pack), None, None


def normalize(x: Tensor, eps: float, pack: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """BN with batch statistics: (B,C,H,W), and the statistics, mean and biased variance (C,)."""
    return _applied(_Normalize, (), [x], (eps, pack))  # type: ignore[return-value]


class _Passed:
    """The gradients of what is passed on, summed over edges."""

    def __init__(self, needed: Sequence[bool]):
        self.needed = needed
        self.grads: list[Tensor | None] = [None] * len(needed)

    def add(self, which: int, grad: Tensor, scale: Tensor) -> None:
        if self.needed[which]:
            so_far = self.grads[which]
            self.grads[which] = scaled(grad, scale) if so_far is None else so_far.addcmul_(grad, scale)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, eps: float, pack: int, count: int, weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        nodes, tensors = tensors[:count], _in_format_of(tensors[0], tensors[count:])
        heads = _Heads(nodes[0].relu())
        alpha = [row.unbind() for row in weights.unbind()]
        for_weights = any(ctx.needs_input_grad[5 + count :])  # or else the inputs `h` of 1x1 convolutions are let go
        saved: list[Tensor] = []
        statistics: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        for on_edge, row, edge in zip(plan, alpha, groups(plan, tensors, folded=False), strict=True):
            total = None
            for shape, column, own in zip(on_edge.shapes, on_edge.columns, edge, strict=True):
                h = heads.output(shape, own[0])
                if shape.kind == "separable":
                    z, mean, var = pointwise_centered(h, own[1], pack)
                    statistics.append((mean, var))
                    inverse_std = (var + eps).rsqrt()
                    saved += [z, inverse_std, h if for_weights else z]
                    h = depthwise(z.relu(), scaled(own[2], per_filter(inverse_std)), 1, 1)
                z, mean, var = pointwise_centered(h, own[-1], pack)
                statistics.append((mean, var))
                inverse_std = (var + eps).rsqrt()
                saved += [z, inverse_std, h if for_weights else z]
                scale = per_channel(row[column] * inverse_std)
                total = _add_scaled(total, z, scale)
            for which, column in on_edge.passed:
                total = _add_scaled(total, nodes[which], row[column])
            outputs.append(cast(Tensor, total))
        ctx.save_for_backward(weights, heads.x, *nodes, *tensors, *saved)
        ctx.plan, ctx.pack, ctx.count, ctx.tensors = plan, pack, count, len(tensors)
        if not statistics:
            return tuple(outputs)
        mean, var = (torch.stack(s) for s in zip(*statistics, strict=True))
        ctx.mark_non_differentiable(mean, var)
        return *outputs, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        pack: int = ctx.pack
        weights, x, *rest = ctx.saved_tensors
        nodes, rest = rest[: ctx.count], rest[ctx.count :]
        tensors, saved = rest[: ctx.tensors], iter(rest[ctx.tensors :])
        needs = ctx.needs_input_grad[5:]
        heads = _Heads(x, needs[0])
        passed = _Passed(needs[: ctx.count])
        alpha = [row.unbind() for row in weights.unbind()]
        zero = weights.new_zeros(())
        grad_alpha = [[zero] * len(row) for row in alpha]
        grad_tensors: list[Tensor | None] = []
        edge_needs = groups(plan, needs[ctx.count :], folded=False)
        for i, (on_edge, edge) in enumerate(zip(plan, groups(plan, tensors, folded=False), strict=True)):
            grad = arrange(grads[i])
            n = grad.numel() // grad.shape[1] * pack
            around_0 = shifted(grad, per_channel(channel_sum(grad, pack) / n)) if edge else grad
            for shape, column, own, needed in zip(on_edge.shapes, on_edge.columns, edge, edge_needs[i], strict=True):
                if shape.kind == "separable":
                    z1, inverse_std1, h1 = islice(saved, 3)
                    kernel = scaled(own[2], per_filter(inverse_std1))
                z, inverse_std, h = islice(saved, 3)
                # α's gradient and BN's share their one reduction over pixels.
                along = channel_sum(grad * z, pack) * inverse_std
                grad_alpha[i][column] = along[: len(along) // pack].sum()
                scale = alpha[i][column] * inverse_std
                slope = per_channel(scale * inverse_std * along / n)
                g = scaled(around_0, per_channel(scale)).addcmul_(z, slope, value=-1)
                of_tensors: list[Tensor | None] = [None] * max(len(own) - 1, 1)
                if needed[-1]:
                    of_tensors[-1] = pointwise_weight_grad(h, g)
                g = pointwise_input_grad(g, own[-1])
                if shape.kind == "separable":
                    if needed[2]:
                        of_kernel = depthwise_weight_grad(z1.relu(), kernel, g, 1, 1)
                        of_tensors[1] = of_kernel * per_filter(inverse_std1)
                    g = _where_positive(depthwise_input_grad(z1, kernel, g, 1, 1), z1)
                    g = _normalize_backward(g, z1, inverse_std1, pack)
                    if needed[1]:
                        of_tensors[0] = pointwise_weight_grad(h1, g)
                    g = pointwise_input_grad(g, own[1])
                grad_tensors += [heads.add(shape, own[0], g, needed[0]), *of_tensors][-len(own) :]
            for which, column in on_edge.passed:
                passed.add(which, grad, alpha[i][column])
                if ctx.needs_input_grad[4]:
                    grad_alpha[i][column] = inner(grad, nodes[which])
        of_weights = None
        if ctx.needs_input_grad[4]:
            of_weights = torch.stack([torch.stack(row) for row in grad_alpha])
        of_heads = None if heads.grad is None else _where_positive(heads.grad, x)
        passed.grads[0] = _plus(passed.grads[0], of_heads)
        return None, None, None, None, of_weights, *passed.grads, *grad_tensors


def _add_scaled(total: Tensor | None, x: Tensor, scale: Tensor) -> Tensor:
    return scaled(x, scale) if total is None else total.addcmul_(x, scale)


def _in_format_of(x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`tensors`, all of one number format, in that of `x`."""
    if not tensors or tensors[0].dtype == x.dtype:
        return tensors
    converted = [torch.empty_like(t, dtype=x.dtype) for t in tensors]
    torch._foreach_copy_(converted, tensors)
    return tuple(converted)


def _applied(
    function: type[torch.autograd.Function], first: Sequence[Any], nodes: Sequence[Tensor], rest: Sequence[Any]
) -> tuple[Tensor, ...]:
    """`function` of all these; under autocast the `nodes` are in its number format, and `function` sees none of it."""
    device, dtype = nodes[0].device.type, pass_dtype(nodes[0])
    if not torch.is_autocast_enabled(device):
        return function.apply(*first, *nodes, *rest)  # type: ignore[no-any-return,no-untyped-call]
    nodes = [x.to(dtype) for x in nodes]
    with torch.autocast(device, enabled=False):
        return function.apply(*first, *nodes, *rest)  # type: ignore[no-any-return,no-untyped-call]


def mix(
    plan: Plan, weights: Tensor, nodes: Sequence[Tensor], tensors: Sequence[Tensor], eps: float, pack: int = 1
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """For each edge that leaves a node the weighted sum of its operations, BN with batch statistics. # Eq. 1

    `weights` (edges, operations), a row for each edge of the `plan`; `nodes`: the node (B,C,H,W) before its ReLU, its
    normalised pools, and what a dropout left of it; `tensors`: those of every convolution of every edge, one after the
    other. All of them may be for `packed` images. Also the statistics of each BN in the same order: mean and biased
    variance, each (D,).
    """
    out = _applied(_Mix, (plan, eps, pack, len(nodes), weights), nodes, tensors)
    statistics = list(zip(out[-2].unbind(), out[-1].unbind(), strict=True)) if len(out) > len(plan) else []
    return list(out[: len(plan)]), statistics


class _MixFolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        constants = sum(1 + len(on_edge.passed) for on_edge in plan)
        nodes, affine, tensors = tensors[:count], tensors[count : count + constants], tensors[count + constants :]
        heads = _Heads(nodes[0].relu())
        saved: list[Tensor] = []
        outputs: list[Tensor] = []
        of_edge = iter(affine)
        for on_edge, edge in zip(plan, groups(plan, tensors, folded=True), strict=True):
            total, bias = None, next(of_edge)
            for shape, own in zip(on_edge.shapes, edge, strict=True):
                h = heads.output(shape, own[0])
                if shape.kind == "separable":
                    saved.append(pointwise(h, own[1], own[2]).relu_())
                    h = depthwise(saved[-1], own[3], 1, 1)
                if total is None:
                    total = pointwise(h, own[-1], bias)
                else:
                    pointwise_add(total, h, own[-1])
            for which, _ in on_edge.passed:
                if total is None:
                    total = scaled(nodes[which], next(of_edge)).add_(per_channel(bias))
                else:
                    total.addcmul_(nodes[which], next(of_edge))
            outputs.append(cast(Tensor, total))
        ctx.save_for_backward(heads.x, *nodes, *affine, *tensors, *saved)
        ctx.plan, ctx.count, ctx.constants, ctx.tensors = plan, count, constants, len(tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, *rest = ctx.saved_tensors
        nodes, rest = rest[: ctx.count], rest[ctx.count :]
        affine, rest = iter(rest[: ctx.constants]), rest[ctx.constants :]
        tensors, saved = rest[: ctx.tensors], iter(rest[ctx.tensors :])
        needs = ctx.needs_input_grad[2:]
        heads = _Heads(x, needs[0])
        passed = _Passed(needs[: ctx.count])
        affine_needs = iter(needs[ctx.count : ctx.count + ctx.constants])
        edge_needs = groups(plan, needs[ctx.count + ctx.constants :], folded=True)
        grad_affine: list[Tensor | None] = []
        grad_tensors: list[Tensor | None] = []
        for i, (on_edge, edge) in enumerate(zip(plan, groups(plan, tensors, folded=True), strict=True)):
            grad = arrange(grads[i])
            next(affine)
            grad_affine.append(channel_sum(grad) if next(affine_needs) else None)
            for shape, own, needed in zip(on_edge.shapes, edge, edge_needs[i], strict=True):
                separable = shape.kind == "separable"
                z = next(saved) if separable else x
                of_tensors: list[Tensor | None] = [None] * max(len(own) - 1, 1)
                if needed[-1]:
                    h = depthwise(z, own[3], 1, 1) if separable else heads.output(shape, own[0])
                    of_tensors[-1] = pointwise_weight_grad(h, grad)
                g = pointwise_input_grad(grad, own[-1])
                if separable:
                    of_tensors[2] = depthwise_weight_grad(z, own[3], g, 1, 1) if needed[3] else None
                    g = _where_positive(depthwise_input_grad(z, own[3], g, 1, 1), z)
                    of_tensors[1] = channel_sum(g) if needed[2] else None
                    if needed[1]:
                        of_tensors[0] = pointwise_weight_grad(heads.output(shape, own[0]), g)
                    g = pointwise_input_grad(g, own[1])
                grad_tensors += [heads.add(shape, own[0], g, needed[0]), *of_tensors][-len(own) :]
            for which, _ in on_edge.passed:
                scale = next(affine)
                passed.add(which, grad, scale)
                of_scale = channel_sum(grad * nodes[which]).view(-1, 1, 1) if next(affine_needs) else None
                grad_affine.append(of_scale)
        of_heads = None if heads.grad is None else _where_positive(heads.grad, x)
        passed.grads[0] = _plus(passed.grads[0], of_heads)
        return None, None, *passed.grads, *grad_affine, *grad_tensors


def mix_folded(
    plan: Plan, nodes: Sequence[Tensor], affine: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """For each edge that leaves a node the sum of its operations, with BN and α in the tensors already. # Eq. 1

    `nodes`: the node (B,C,H,W) before its ReLU, and its pools; `affine`: for every edge its bias (D,) and the scale
    (D,1,1) of each node that it passes on; `tensors`: those of every convolution of every edge. Biases and tensors
    have the number format of the pass.
    """
    return _applied(_MixFolded, (plan, len(nodes)), nodes, (*affine, *tensors))
