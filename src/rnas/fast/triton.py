"""The fast supernet on a GPU with kernels of its own, in Triton: `fast_gpu`'s plan in fewer passes over memory.

In train mode the depthwise convolutions and BN are Triton's, the rest is `fast_gpu`'s. In eval mode, with everything
folded, a cell is one autograd function: its nodes lie side by side in one tensor, which is the cell's output, and every
operation adds to the nodes at the ends of its edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnas.fast import cuda as fast_gpu
from rnas.fast.cuda import FoldedOperation
from rnas.fast.kernels.batch_norm import normalized
from rnas.fast.kernels.stencils import Passed, Stencil, convolve, kernel_grad, mix, pass_back, pass_on, spread
from rnas.fast.plan import Backend, CellExecutor, CellPlan, Convolution, Executor, Source, TrainExecutor


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Within, Triton launches where `x` is; it would on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class _Depthwise(torch.autograd.Function):
    """The depthwise convolutions of `x` (B,C,H,W) with the kernels (E·C,1,k,k) of E edges: (B,E·C,H',W')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stride: int, dilation: int) -> Tensor:
        x, kernel = x.contiguous(), kernel.contiguous()
        b, c, h, w = x.shape
        ctx.save_for_backward(x, kernel)
        ctx.stencil = stride, dilation
        out = x.new_empty(b, len(kernel) // c, c, -(-h // stride), -(-w // stride))
        return convolve(x, Stencil(kernel, stride, dilation), out).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        stencil = Stencil(kernel, *ctx.stencil)
        b, wide, h, w = grad.shape
        grad = grad.contiguous().view(b, wide // x.shape[1], x.shape[1], h, w)
        of_x = spread(grad, stencil, torch.empty_like(x)) if ctx.needs_input_grad[0] else None
        of_kernel = kernel_grad(x, stencil, grad) if ctx.needs_input_grad[1] else None
        return of_x, of_kernel, None, None


def depthwise(x: Tensor, kernel: Tensor, stride: int, dilation: int) -> Tensor:
    """The depthwise convolutions of `x` (B,C,H,W) with the kernels (E·C,1,k,k) of E edges: (B,E·C,H',W')."""
    with on_device_of(x):
        out: Tensor = _Depthwise.apply(x, kernel, stride, dilation)  # type: ignore[no-untyped-call]
    return out


class Node(fast_gpu.Node):
    """A node after its ReLU, which all edges read."""

    def depthwise(self, kernel: Tensor, stride: int, dilation: int) -> Tensor:
        return depthwise(self._x, kernel, stride, dilation)


class BatchStatistics(fast_gpu.BatchStatistics):
    """BN as in train mode."""

    node = Node

    def normalized(self, x: Tensor, scale: Tensor, plus: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        with on_device_of(x):
            return normalized(x, scale, self._eps, plus, relu)

    def depthwise(self, x: Tensor, kernel: Tensor) -> Tensor:
        return depthwise(x, kernel, 1, 1)


class _FoldedSource(NamedTuple):
    """All that leaves a node for the E nodes at the ends of its edges, folded."""

    stride: int
    operations: Sequence[FoldedOperation]
    passed: Passed
    bias: Tensor

    def forward(self, x: Tensor, ends: Tensor, add: bool) -> list[Tensor]:
        """Write what node `x` (B,C,H,W) brings to its `ends` (B,E,C,H',W') there, or `add` it.

        Returns what `backward` wants: which pixels the maxima are, and the middles of separable convolutions.
        """
        kept = [pass_on(x, self.passed, self.bias, ends, add)]
        for operation in self.operations:
            if operation.shape.kind == "reduce":
                mix(_halves(x.relu()), operation.tensors[0], ends, add=True)
                continue
            kernel, weight, *second = operation.tensors
            if operation.middle is None:
                mix(x, weight, ends, _first(operation.shape, kernel), relu=True, add=True)
                continue
            out, first = x.new_empty(ends.shape), _first(operation.shape, kernel)
            middle = mix(x, weight, out, first, relu=True, bias=operation.middle)
            mix(middle, second[1], ends, Stencil(second[0]), add=True)
            kept.append(middle)
        return kept

    def backward(self, x: Tensor, grad: Tensor, kept: Sequence[Tensor], out: Tensor, add: bool) -> None:
        """Write the gradient of node `x` into `out`, or `add` it, from that of its ends (B,E,C,H',W')."""
        argmax, *middles = kept
        pass_back(grad, self.passed, argmax, out, add)
        middle = iter(middles)
        for operation in self.operations:
            if operation.shape.kind == "reduce":
                _reduce_back(operation.tensors[0], grad, x, out)
                continue
            kernel, weight = operation.tensors[:2]
            inner = mix(grad, operation.tensors[-1].transpose(1, 2), x.new_empty(grad.shape))
            if operation.middle is not None:
                second, like = Stencil(operation.tensors[2]), torch.empty_like(inner)
                inner = mix(inner, weight.transpose(1, 2), like, second, flip=True, mask=next(middle))
            spread(inner, _first(operation.shape, kernel), out, mask=x, add=True)


def _first(shape: Convolution, kernel: Tensor) -> Stencil:
    """The first depthwise convolution of an operation."""
    return Stencil(kernel, shape.stride, 2 if shape.kind == "dilated" else 1)


def _halves(x: Tensor) -> Tensor:
    """The even and the odd pixels of `x` (B,C,H,W) side by side: (B,2C,H/2,W/2)."""
    return torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)


def _reduce_back(weight: Tensor, grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Add to `out` the gradient for node `x` (B,C,H,W) of 1x1 convolutions (E,D,2C) of its `_halves`' positive part."""
    b, _, _, h, w = grad.shape
    of_halves = torch.matmul(weight.flatten(0, 1).t(), grad.flatten(1, 2).flatten(2)).view(b, -1, h, w)
    even, odd = of_halves.chunk(2, dim=1)
    for of_half, start in ((even, 0), (odd, 1)):
        out[:, :, start::2, start::2] += torch.where(x[:, :, start::2, start::2] > 0, of_half, 0.0)


class _Cell(torch.autograd.Function):
    """A folded cell, from its two inputs after their preprocessing (B,C,H,W): its output (B,nodes·C,H',W')."""

    @staticmethod
    def forward(ctx: Any, s0: Tensor, s1: Tensor, sources: Sequence[_FoldedSource]) -> Tensor:
        (b, c, h, w), stride = s0.shape, sources[0].stride
        nodes = s0.new_empty(b, len(sources) - 1, c, -(-h // stride), -(-w // stride))
        inputs = s0.contiguous(), s1.contiguous()
        kept = [
            of.forward(_state(i, inputs, nodes), nodes[:, max(i - 1, 0) :], add=i > 0) for i, of in enumerate(sources)
        ]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*inputs, nodes, *(t for of in kept for t in of))
            ctx.sources, ctx.counts = sources, [len(of) for of in kept]
        return nodes.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s0, s1, nodes, *rest = ctx.saved_tensors
        of_nodes = grad.clone(memory_format=torch.contiguous_format).view_as(nodes)
        of_inputs = torch.empty_like(s0), torch.empty_like(s1)
        end = len(rest)
        for i, of in reversed(list(enumerate(ctx.sources))):  # a node's own gradient is complete when its turn comes
            kept, end = rest[end - ctx.counts[i] : end], end - ctx.counts[i]
            of.backward(
                _state(i, (s0, s1), nodes), of_nodes[:, max(i - 1, 0) :], kept, _state(i, of_inputs, of_nodes), i > 1
            )
        return *of_inputs, None


def _state(i: int, inputs: Sequence[Tensor], nodes: Tensor) -> Tensor:
    """Of a cell: input 0 or 1, or the node that follows."""
    return inputs[i] if i < 2 else nodes[:, i - 2]


class Folded(fast_gpu.Folded, CellExecutor):
    """BN as in eval mode, folded with α into the 1x1 convolutions; differentiable by the images alone."""

    def __init__(self, plan: CellPlan, weights: Tensor):
        super().__init__(plan, weights)
        self._preprocessing = plan.inputs
        self._folded_sources = [self._of(source) for source in plan.sources]

    def _of(self, source: Source) -> _FoldedSource:
        bias, scales = self._affine[id(source)]
        names = [*(["node"] if source.skipping else []), *(name[:3] for name in source.pool_names)]
        by_name = {name: scale.flatten() for name, scale in zip(names, scales, strict=True)}
        passed = Passed(by_name.get("node"), by_name.get("max"), by_name.get("avg"), source.stride)
        return _FoldedSource(source.stride, self._operations[id(source)], passed, bias.flatten())

    def run(self, s0: Tensor, s1: Tensor) -> Tensor:
        s0, s1 = (self.preprocessed(s, o) for s, o in zip((s0, s1), self._preprocessing, strict=True))
        with on_device_of(s0):
            out: Tensor = _Cell.apply(s0, s1, self._folded_sources)  # type: ignore[no-untyped-call]
        return out


class OnTriton(Backend):
    """The fast supernet on a GPU, in kernels of our own."""

    def on_batch_statistics(self, plan: CellPlan, weights: Tensor, kept: dict[int, Tensor]) -> TrainExecutor:
        return BatchStatistics(plan, weights, kept)

    def folded(self, plan: CellPlan, weights: Tensor) -> Executor:
        # Torch's are differentiated by parameters and weights too, and know cells of other forms.
        if torch.is_grad_enabled() or not plan.is_whole():
            return fast_gpu.Folded(plan, weights)
        return Folded(plan, weights)
