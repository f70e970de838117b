"""What the fast supernet differentiates: pieces of a cell with a backward of their own.

Each saves what its backward cannot cheaply recompute, and computes only the gradients that are asked for: with frozen
weights, none for weights. Batch statistics leave as outputs without gradient, because whoever owns the running
statistics updates them. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnas.nets.fast_kernels import (
    arrange,
    center_,
    channel_sum,
    depthwise,
    depthwise_input_grad,
    depthwise_weight_grad,
    per_channel,
    pointwise,
    pointwise_add,
    pointwise_weight_grad,
)

Stride = int
Dilation = int


class _DepthwiseBank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shapes: Sequence[tuple[Stride, Dilation]], *weights: Tensor) -> tuple[Tensor, ...]:
        x = x.relu()
        # A dilated convolution with stride 2 sees only every other pixel: a plain convolution of those.
        even = arrange(x[:, :, ::2, ::2]) if (2, 2) in shapes else x.new_empty(0)
        ctx.save_for_backward(x, even, *weights)
        ctx.shapes = shapes
        ctx.set_materialize_grads(False)
        return tuple(
            depthwise(even, w, 1, 1) if (stride, dilation) == (2, 2) else depthwise(x, w, stride, dilation)
            for w, (stride, dilation) in zip(weights, shapes, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, even, *weights = ctx.saved_tensors
        grad_x = grad_even = None
        grad_weights: list[Tensor | None] = [None] * len(weights)
        for i, (g, w, shape) in enumerate(zip(grads, weights, ctx.shapes, strict=True)):
            if g is None:
                continue
            g = arrange(g)
            source, (stride, dilation) = (even, (1, 1)) if shape == (2, 2) else (x, shape)
            if ctx.needs_input_grad[2 + i]:
                grad_weights[i] = depthwise_weight_grad(source, w, g, stride, dilation)
            if ctx.needs_input_grad[0]:
                part = depthwise_input_grad(source, w, g, stride, dilation)
                if source is x:
                    grad_x = part if grad_x is None else grad_x.add_(part)
                else:
                    grad_even = part if grad_even is None else grad_even.add_(part)
        if grad_even is not None:
            grad_x = torch.zeros_like(x) if grad_x is None else grad_x
            grad_x[:, :, ::2, ::2] += grad_even
        return None if grad_x is None else _where_positive(grad_x, x), None, *grad_weights


def depthwise_bank(
    x: Tensor, shapes: Sequence[tuple[Stride, Dilation]], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """ReLU, then every depthwise convolution that reads it. `x` (B,C,H,W); `weights` (C,1,k,k) each."""
    return _DepthwiseBank.apply(x, shapes, *weights) if weights else ()  # type: ignore[no-untyped-call]


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
        x = x.clone(memory_format=torch.preserve_format)
        mean, var = center_(x)
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


class _PointwiseNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        z = pointwise(x, weight)
        mean, var = center_(z)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, z, inverse_std)
        ctx.mark_non_differentiable(mean, var)
        return z * per_channel(inverse_std), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, z, inverse_std = ctx.saved_tensors
        grad_z = _normalize_backward(arrange(grad), z, inverse_std)
        return (
            pointwise(grad_z, weight.t()) if ctx.needs_input_grad[0] else None,
            pointwise_weight_grad(x, grad_z) if ctx.needs_input_grad[1] else None,
            None,
        )


def pointwise_normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution with `weight` (D,C), then BN with batch statistics, which are returned too."""
    return _PointwiseNormalize.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]


class _MiddleNormalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        z = pointwise(x, weight)
        mean, var = center_(z)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, kernel, z, inverse_std)
        ctx.mark_non_differentiable(mean, var)
        return depthwise(z.relu().mul_(per_channel(inverse_std)), kernel, 1, 1), mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, kernel, z, inverse_std = ctx.saved_tensors
        grad = arrange(grad)
        grad_x = grad_weight = grad_kernel = None
        if ctx.needs_input_grad[2]:
            again = z.relu().mul_(per_channel(inverse_std))
            grad_kernel = depthwise_weight_grad(again, kernel, grad, 1, 1)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_z = _where_positive(depthwise_input_grad(z, kernel, grad, 1, 1), z)
            grad_z = _normalize_backward(grad_z, z, inverse_std)
            grad_x = pointwise(grad_z, weight.t()) if ctx.needs_input_grad[0] else None
            grad_weight = pointwise_weight_grad(x, grad_z) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_kernel, None


def middle_normalized(x: Tensor, weight: Tensor, kernel: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The middle of a separable convolution applied twice: 1x1 with `weight` (D,C), BN with batch statistics, ReLU,
    depthwise with `kernel` (D,1,k,k); and the statistics."""
    return _MiddleNormalized.apply(x, weight, kernel, eps)  # type: ignore[no-any-return,no-untyped-call]


class _Middle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
        h = pointwise(x, weight).add_(per_channel(bias)).relu_()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, kernel, h)
        return depthwise(h, kernel, 1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kernel, h = ctx.saved_tensors
        grad = arrange(grad)
        grad_h = _where_positive(depthwise_input_grad(h, kernel, grad, 1, 1), h)
        needs = ctx.needs_input_grad
        return (
            pointwise(grad_h, weight.t()) if needs[0] else None,
            pointwise_weight_grad(x, grad_h) if needs[1] else None,
            channel_sum(grad_h) if needs[2] else None,
            depthwise_weight_grad(h, kernel, grad, 1, 1) if needs[3] else None,
        )


def middle(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
    """1x1 convolution with `weight` (D,C) and `bias` (D,), ReLU, depthwise with `kernel` (D,1,k,k)."""
    return _Middle.apply(x, weight, bias, kernel)  # type: ignore[no-any-return,no-untyped-call]


class _WeightedSum(torch.autograd.Function):
    """The terms share the gradient of their sum, so BN's backward and α's gradient share their one reduction."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, eps: float, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = len(alpha)
        xs, weights = tensors[:k], tensors[k:]
        zs = [pointwise(x, w) for x, w in zip(xs, weights, strict=True)]
        mean, var = (torch.stack(s) for s in zip(*(center_(z) for z in zs), strict=True))
        inverse_std = (var + eps).rsqrt()
        scale = alpha[:, None] * inverse_std
        total = zs[0] * per_channel(scale[0])
        for z, s in zip(zs[1:], scale[1:], strict=True):
            total.addcmul_(z, per_channel(s))
        kept = [x if needed else None for x, needed in zip(xs, ctx.needs_input_grad[2 + k :], strict=True)]
        ctx.save_for_backward(inverse_std, scale, *kept, *weights, *zs)
        ctx.mark_non_differentiable(mean, var)
        return total, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Any, ...]:
        inverse_std, scale, *tensors = ctx.saved_tensors
        k = len(scale)
        xs, weights, zs = tensors[:k], tensors[k : 2 * k], tensors[2 * k :]
        grad = arrange(grad)
        n = grad.numel() // grad.shape[1]
        dot = torch.stack([channel_sum(grad * z) for z in zs])
        along = scale * inverse_std.square() * dot / n
        grad = grad - per_channel(channel_sum(grad) / n)
        needs = ctx.needs_input_grad
        grad_xs: list[Tensor | None] = [None] * k
        grad_weights: list[Tensor | None] = [None] * k
        for i, (x, w, z) in enumerate(zip(xs, weights, zs, strict=True)):
            if not (needs[2 + i] or needs[2 + k + i]):
                continue
            grad_z = (grad * per_channel(scale[i])).addcmul_(z, per_channel(along[i]), value=-1)
            grad_xs[i] = pointwise(grad_z, w.t()) if needs[2 + i] else None
            grad_weights[i] = pointwise_weight_grad(x, grad_z) if needs[2 + k + i] else None
        return (dot * inverse_std).sum(1) if needs[0] else None, None, *grad_xs, *grad_weights


def weighted_sum(
    alpha: Tensor, xs: Sequence[Tensor], weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_k α_k BN(1x1 convolution of `xs[k]` with `weights[k]`), BN with batch statistics. # Eq. 1

    `alpha` (K,), `xs` (B,C,H,W) each, `weights` (D,C) each; the statistics are (K,D).
    """
    return _WeightedSum.apply(alpha, eps, *xs, *weights)  # type: ignore[no-any-return,no-untyped-call]


class _PointwiseSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, *tensors: Tensor) -> Tensor:
        k = len(tensors) // 2
        xs, weights = tensors[:k], tensors[k:]
        total = pointwise(xs[0], weights[0])
        for x, w in zip(xs[1:], weights[1:], strict=True):
            pointwise_add(total, x, w)
        kept = [x if needed else None for x, needed in zip(xs, ctx.needs_input_grad[1 + k :], strict=True)]
        ctx.save_for_backward(*kept, *weights)
        return total.add_(per_channel(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k = len(ctx.saved_tensors) // 2
        xs, weights = ctx.saved_tensors[:k], ctx.saved_tensors[k:]
        grad = arrange(grad)
        needs = ctx.needs_input_grad
        return (
            channel_sum(grad) if needs[0] else None,
            *(pointwise(grad, w.t()) if needed else None for w, needed in zip(weights, needs[1:], strict=False)),
            *(pointwise_weight_grad(x, grad) if needed else None for x, needed in zip(xs, needs[1 + k :], strict=True)),
        )


def pointwise_sum(bias: Tensor, xs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ_k (1x1 convolution of `xs[k]` with `weights[k]`) + `bias`. `xs` (B,C,H,W), `weights` (D,C), `bias` (D,)."""
    return _PointwiseSum.apply(bias, *xs, *weights)  # type: ignore[no-any-return,no-untyped-call]
