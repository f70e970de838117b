"""What the fast supernet differentiates: an edge as one function with a backward of its own, and BN.

An edge takes its operations one after the other, so that what each leaves behind is reused while it is in the cache.
It saves what its backward cannot cheaply recompute, and computes only the gradients that are asked for: with frozen
weights, none for weights. Batch statistics leave as outputs without gradient, because whoever owns the running
statistics updates them. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

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

Kind = Literal["separable", "dilated", "reduce", "direct"]


class Convolution(NamedTuple):
    """The shape of one convolutional operation of an edge.

    Its tensors, with 1x1 weights (D,C) and depthwise kernels (C,1,k,k), are for
    `separable` (depthwise, 1x1, BN, ReLU, depthwise, 1x1, BN): kernel, weight, [bias where folded,] kernel, weight;
    `dilated` (dilated depthwise, 1x1, BN): kernel, weight;
    `reduce` (1x1 of the even and odd pixels side by side, BN): weight (D,2C);
    `direct` (1x1, BN): weight.
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
        x = x.clone()
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


TENSORS = {"separable": 4, "dilated": 2, "reduce": 1, "direct": 1}


def _grouped(shapes: Sequence[Convolution], tensors: Sequence[Any], folded: bool) -> Iterator[tuple[Any, ...]]:
    """(shape, head kernel, middle, last weight) of each operation; the middle is () unless it is separable."""
    rest = list(tensors)
    for shape in shapes:
        count = TENSORS[shape.kind] + (folded and shape.kind == "separable")
        own, rest = rest[:count], rest[count:]
        yield shape, own[0] if count > 1 else None, tuple(own[1:-1]), own[-1]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shapes: Sequence[Convolution],
        eps: float,
        x: Tensor,
        alpha: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = list(_grouped(shapes, ctx.needs_input_grad[4:], folded=False))
        saved: list[Tensor | None] = []
        statistics: list[tuple[Tensor, Tensor]] = []
        total = None
        for (shape, kernel, middle, weight), (_, _, needs_middle, needs_weight), a in zip(
            _grouped(shapes, tensors, folded=False), needs, alpha.unbind(), strict=True
        ):
            h = _head(x, shape, kernel)
            if middle:
                z = pointwise(h, middle[0])
                statistics.append(center_(z))
                inverse_std = (statistics[-1][1] + eps).rsqrt()
                saved += [h if needs_middle[0] else None, z, inverse_std]
                h = depthwise(z.relu().mul_(per_channel(inverse_std)), middle[1], 1, 1)
            z = pointwise(h, weight)
            statistics.append(center_(z))
            inverse_std = (statistics[-1][1] + eps).rsqrt()
            saved += [h if needs_weight else None, z, inverse_std]
            scale = per_channel(a * inverse_std)
            total = z * scale if total is None else total.addcmul_(z, scale)
        assert total is not None
        mean, var = (torch.stack(s) for s in zip(*statistics, strict=True))
        ctx.save_for_backward(x, alpha, *tensors, *saved)
        ctx.shapes, ctx.count = shapes, len(tensors)
        ctx.mark_non_differentiable(mean, var)
        return total, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.count], iter(rest[ctx.count :])
        needs = _grouped(ctx.shapes, ctx.needs_input_grad[4:], folded=False)
        heads = _HeadBackward(x, ctx.needs_input_grad[2])
        grad = arrange(grad)
        n = grad.numel() // grad.shape[1]
        centered = grad - per_channel(channel_sum(grad) / n)
        grad_alpha: list[Tensor] = []
        grads: list[Tensor | None] = []
        for (shape, kernel, middle, weight), (_, needs_kernel, needs_middle, needs_weight), a in zip(
            _grouped(ctx.shapes, tensors, folded=False), needs, alpha.unbind(), strict=True
        ):
            if middle:
                h1, z1, inverse_std1 = next(saved), next(saved), next(saved)
            h, z, inverse_std = next(saved), next(saved), next(saved)
            # α's gradient and BN's share their one reduction over pixels.
            along = channel_sum(grad * z) * inverse_std
            grad_alpha.append(along.sum())
            scale = a * inverse_std
            g = (centered * per_channel(scale)).addcmul_(z, per_channel(scale * inverse_std * along / n), value=-1)
            grad_weight = pointwise_weight_grad(h, g) if needs_weight else None
            g = pointwise(g, weight.t())
            grad_middle: list[Tensor | None] = []
            if middle:
                again = z1.relu().mul_(per_channel(inverse_std1)) if needs_middle[1] else None
                grad_kernel = None if again is None else depthwise_weight_grad(again, middle[1], g, 1, 1)
                g = _where_positive(depthwise_input_grad(z1, middle[1], g, 1, 1), z1)
                g = _normalize_backward(g, z1, inverse_std1)
                grad_middle = [pointwise_weight_grad(h1, g) if needs_middle[0] else None, grad_kernel]
                g = pointwise(g, middle[0].t())
            grad_head = heads.add(shape, kernel, g, bool(needs_kernel))
            grads += [*([] if kernel is None else [grad_head]), *grad_middle, grad_weight]
        return None, None, heads.grad, torch.stack(grad_alpha), *grads


def convolve(
    shapes: Sequence[Convolution], x: Tensor, alpha: Tensor, tensors: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_k α_k operation_k(x) over convolutional operations, BN with batch statistics. # Eq. 1

    `x` (B,C,H,W) after its ReLU, `alpha` (K,), `tensors`: those of every operation, one after the other. Also the
    statistics of each BN in order, mean and biased variance, (S,D) each.
    """
    return _Convolve.apply(shapes, eps, x, alpha, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class _ConvolveFolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Convolution], x: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        needs = _grouped(shapes, ctx.needs_input_grad[3:], folded=True)
        saved: list[Tensor | None] = []
        total = None
        for (shape, kernel, middle, weight), (_, _, needs_middle, needs_weight) in zip(
            _grouped(shapes, tensors, folded=True), needs, strict=True
        ):
            h = _head(x, shape, kernel)
            if middle:
                z = pointwise(h, middle[0]).add_(per_channel(middle[1])).relu_()
                saved += [h if needs_middle[0] else None, z]
                h = depthwise(z, middle[2], 1, 1)
            saved.append(h if needs_weight else None)
            if total is None:
                total = pointwise(h, weight).add_(per_channel(bias))
            else:
                pointwise_add(total, h, weight)
        assert total is not None
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.shapes, ctx.count = shapes, len(tensors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.count], iter(rest[ctx.count :])
        needs = _grouped(ctx.shapes, ctx.needs_input_grad[3:], folded=True)
        heads = _HeadBackward(x, ctx.needs_input_grad[1])
        grad = arrange(grad)
        grads: list[Tensor | None] = []
        for (shape, kernel, middle, weight), (_, needs_kernel, needs_middle, needs_weight) in zip(
            _grouped(ctx.shapes, tensors, folded=True), needs, strict=True
        ):
            if middle:
                h1, z = next(saved), next(saved)
            h = next(saved)
            grad_weight = pointwise_weight_grad(h, grad) if needs_weight else None
            g = pointwise(grad, weight.t())
            grad_middle: list[Tensor | None] = []
            if middle:
                grad_kernel = depthwise_weight_grad(z, middle[2], g, 1, 1) if needs_middle[2] else None
                g = _where_positive(depthwise_input_grad(z, middle[2], g, 1, 1), z)
                grad_middle = [
                    pointwise_weight_grad(h1, g) if needs_middle[0] else None,
                    channel_sum(g) if needs_middle[1] else None,
                    grad_kernel,
                ]
                g = pointwise(g, middle[0].t())
            grad_head = heads.add(shape, kernel, g, bool(needs_kernel))
            grads += [*([] if kernel is None else [grad_head]), *grad_middle, grad_weight]
        return None, heads.grad, channel_sum(grad) if ctx.needs_input_grad[2] else None, *grads


def convolve_folded(shapes: Sequence[Convolution], x: Tensor, bias: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Σ_k operation_k(x) + `bias` (D,), with BN and α in the tensors already: a weighted edge in eval mode. # Eq. 1

    `x` (B,C,H,W) after its ReLU; `tensors`: those of every operation, one after the other.
    """
    return _ConvolveFolded.apply(shapes, x, bias, *tensors)  # type: ignore[no-any-return,no-untyped-call]
