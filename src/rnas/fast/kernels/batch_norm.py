"""Batch normalisation in training mode for a GPU, with what follows it: two launches each way, written in Triton.

Torch's kernels take several times as long as the memory needs for contiguous (B,C,H,W). Here a channel is cut into
chunks of images, and every chunk of every channel is a program of its own. A first launch sums up each chunk; in the
second each program joins the sums of its channel, which are few, and computes its chunk's part of the result. No sum
depends on which program comes first, so results are the same each time.

Importing this file needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048
"""Numbers of a tensor that a program holds at once: 16 for each of its threads, so that several programs fit into a
multiprocessor and one computes while others wait for the memory."""

PROGRAMS = 2048
"""How many there are, about, where the data allow: a large GPU runs five to eight on each of 132 multiprocessors, and
with some rounds of them all are busy until near the end."""

CHUNKS = 64
"""The most chunks of a channel: each program reads the sums of all."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Of every launch; the second is said because Triton 3.9 warns, and 3.10 does otherwise, where it is not."""


def normalized(
    x: Tensor, scale: Tensor, eps: float, plus: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """BN of `x` (B,C,H,W) over images and pixels, times `scale` (C,), and `plus` (B,C,H,W), and ReLU.

    Also the batch's mean and inverse standard deviation (C,), float32, which have no gradients. `x` is contiguous;
    it and `plus` are float32 or bfloat16, the result is as `x`; `scale` is float32. Sums are float32 always.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _Normalized.apply(x, scale, eps, plus, relu))


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, eps: float, plus: Tensor | None, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = x.contiguous(), scale.contiguous()
        plus = None if plus is None else plus.contiguous()
        cut = Cut.of(x)
        out, partial = torch.empty_like(x), cut.partial(x)
        mean, inverse_std = (torch.empty_like(scale) for _ in range(2))
        _chunk_statistics[cut.grid](x, partial, *cut, **OPTIONS)
        _normalize[cut.grid](x, plus, scale, partial, out, mean, inverse_std, eps, *cut, relu, **OPTIONS)
        ctx.save_for_backward(x, scale, mean, inverse_std, out if relu else None)
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.set_materialize_grads(False)  # zeros for the statistics would be two more launches
        return out, mean, inverse_std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse_std, out = ctx.saved_tensors
        grad = grad.contiguous()
        cut = Cut.of(x)
        partial, grad_x, grad_scale = cut.partial(x), torch.empty_like(x), torch.empty_like(scale)
        # What `plus` gets is the incoming gradient; behind a ReLU the part that passes, which has to be written.
        grad_plus = torch.empty_like(grad) if ctx.needs_input_grad[3] and out is not None else None
        sources = (grad, x, out, mean, inverse_std)
        _chunk_gradients[cut.grid](*sources, partial, *cut, **OPTIONS)
        _gradients[cut.grid](*sources, scale, partial, grad_x, grad_scale, grad_plus, *cut, **OPTIONS)
        found = (grad_x, grad_scale, None, grad if out is None else grad_plus, None)
        return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


class Cut(NamedTuple):
    """How the work on a tensor (B,C,H,W) is cut up; what all kernels are told of it, in this order."""

    images: int
    channels: int
    share: int
    """Images of a chunk; the last may have fewer."""
    chunks: int
    CHUNKS: int
    """A power of two, as many or more."""
    PIXELS: int
    ROWS: int
    """Images of a tile."""
    COLUMNS: int
    """Pixels of a tile."""

    @classmethod
    def of(cls, x: Tensor) -> Cut:
        images, channels, height, width = x.shape
        pixels = height * width
        columns = min(triton.next_power_of_2(pixels), TILE // 2)
        rows = min(triton.next_power_of_2(images), TILE // columns)
        tiles = triton.cdiv(images, rows)
        chunks = min(tiles, CHUNKS, triton.cdiv(PROGRAMS, channels))
        share = triton.cdiv(tiles, chunks) * rows
        chunks = triton.cdiv(images, share)
        return cls(images, channels, share, chunks, triton.next_power_of_2(chunks), pixels, rows, columns)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: next to each other those of neighbouring channels, which read neighbouring memory."""
        return self.channels, self.chunks

    def partial(self, x: Tensor) -> Tensor:
        """Room for two sums of each chunk, (2,C,chunks)."""
        return x.new_empty(2, self.channels, self.chunks, dtype=torch.float32)


# What a kernel is told of the numbers of images is no reason to compile it anew.
_jit = triton.jit(do_not_specialize=["images", "channels", "share", "chunks"])


@triton.jit
def _tile(image, pixel, end, channels, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the tile of this program's channel lies, (ROWS,COLUMNS), and which of its numbers there are."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    start = (tl.program_id(0).to(tl.int64) + image * channels) * PIXELS + pixel
    return start + (rows * channels * PIXELS + columns), (image + rows < end) & (pixel + columns < PIXELS)


@triton.jit
def _read(source, at, there):
    """A tile in float32, 0 where there is nothing."""
    return tl.load(source + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def _write_partial(partial, first, second, channels, chunks):
    at = tl.program_id(0) * chunks + tl.program_id(1)
    tl.store(partial + at, first)
    tl.store(partial + channels * chunks + at, second)


@triton.jit
def _read_partial(partial, channels, chunks, CHUNKS: tl.constexpr):
    """Both sums of every chunk of this program's channel, (CHUNKS,)."""
    i = tl.arange(0, CHUNKS)
    at = tl.program_id(0) * chunks + i
    first = tl.load(partial + at, mask=i < chunks, other=0.0)
    second = tl.load(partial + channels * chunks + at, mask=i < chunks, other=0.0)
    return first, second


@_jit
def _chunk_statistics(
    x,
    partial,
    images,
    channels,
    share,
    chunks,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and sum of squared deviations of each chunk.

    Sums are of differences from the first tile's mean: a large mean costs no digits, and neither does one number that
    lies far from all others.
    """
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, images)
    at, there = _tile(first, 0, end, channels, PIXELS, ROWS, COLUMNS)
    shift = _sum(_read(x, at, there)) / _sum(there.to(tl.float32))
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for image in range(first, end, ROWS):
        for pixel in range(0, PIXELS, COLUMNS):
            at, there = _tile(image, pixel, end, channels, PIXELS, ROWS, COLUMNS)
            difference = tl.where(there, _read(x, at, there) - shift, 0.0)
            sums += difference
            squares += difference * difference
    total = _sum(sums)
    mean = total / ((end - first).to(tl.float32) * PIXELS)
    _write_partial(partial, shift + mean, tl.maximum(_sum(squares) - total * mean, 0.0), channels, chunks)


@triton.jit
def _statistics(partial, eps, images, channels, share, chunks, CHUNKS: tl.constexpr, PIXELS: tl.constexpr):
    """Mean and inverse standard deviation of this program's channel, by Chan's formula."""
    means, squares = _read_partial(partial, channels, chunks, CHUNKS)
    left = images - tl.arange(0, CHUNKS) * share
    n = tl.maximum(tl.minimum(left, share), 0).to(tl.float32) * PIXELS
    total = tl.sum(n, axis=0)
    # Means differ by little: the sum of their differences from one of them is more exact than their own.
    one = tl.load(partial + tl.program_id(0) * chunks)
    mean = one + tl.sum(n * (means - one), axis=0) / total
    squares += n * (means - mean) * (means - mean)
    return mean, tl.rsqrt(tl.sum(squares, axis=0) / total + eps)


@_jit
def _normalize(
    x,
    plus,
    scale,
    partial,
    out,
    mean_out,
    inverse_std_out,
    eps,
    images,
    channels,
    share,
    chunks,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RELU: tl.constexpr,
):
    """The result, and the statistics. `plus` may be None."""
    channel, chunk = tl.program_id(0), tl.program_id(1)
    mean, inverse_std = _statistics(partial, eps, images, channels, share, chunks, CHUNKS, PIXELS)
    tl.store(mean_out + channel, mean, mask=chunk == 0)
    tl.store(inverse_std_out + channel, inverse_std, mask=chunk == 0)
    factor = tl.load(scale + channel) * inverse_std
    first = chunk * share
    end = tl.minimum(first + share, images)
    for image in range(first, end, ROWS):
        for pixel in range(0, PIXELS, COLUMNS):
            at, there = _tile(image, pixel, end, channels, PIXELS, ROWS, COLUMNS)
            y = (_read(x, at, there) - mean) * factor
            if plus is not None:
                y += _read(plus, at, there)
            if RELU:
                y = tl.where(y < 0, 0.0, y)  # NaN stays NaN
            tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _incoming(grad, out, at, there):
    """A tile of the incoming gradient, behind the ReLU whose result is `out` (None: there is none)."""
    g = _read(grad, at, there)
    if out is not None:
        g = tl.where(_read(out, at, there) <= 0, 0.0, g)
    return g


@_jit
def _chunk_gradients(
    grad,
    x,
    out,
    mean,
    inverse_std,
    partial,
    images,
    channels,
    share,
    chunks,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of the gradient, and of its products with the normalised `x`, of each chunk."""
    channel = tl.program_id(0)
    mean = tl.load(mean + channel)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, images)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for image in range(first, end, ROWS):
        for pixel in range(0, PIXELS, COLUMNS):
            at, there = _tile(image, pixel, end, channels, PIXELS, ROWS, COLUMNS)
            g = _incoming(grad, out, at, there)
            sums += g
            products += g * (_read(x, at, there) - mean)
    _write_partial(partial, _sum(sums), _sum(products) * tl.load(inverse_std + channel), channels, chunks)


@_jit
def _gradients(
    grad,
    x,
    out,
    mean,
    inverse_std,
    scale,
    partial,
    grad_x,
    grad_scale,
    grad_plus,
    images,
    channels,
    share,
    chunks,
    CHUNKS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of `x` and `scale`, and of `plus` unless `grad_plus` is None."""
    channel, chunk = tl.program_id(0), tl.program_id(1)
    sums, products = _read_partial(partial, channels, chunks, CHUNKS)
    total, of_scale = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    tl.store(grad_scale + channel, of_scale, mask=chunk == 0)
    mean, inverse_std = tl.load(mean + channel), tl.load(inverse_std + channel)
    n = images.to(tl.float32) * PIXELS
    # scale/σ · (g - mean(g) - x̂ · mean(g·x̂)), the part that all pixels share apart.
    factor = tl.load(scale + channel) * inverse_std
    constant, slope = total / n, of_scale / n * inverse_std
    first = chunk * share
    end = tl.minimum(first + share, images)
    for image in range(first, end, ROWS):
        for pixel in range(0, PIXELS, COLUMNS):
            at, there = _tile(image, pixel, end, channels, PIXELS, ROWS, COLUMNS)
            g = _incoming(grad, out, at, there)
            if grad_plus is not None:
                tl.store(grad_plus + at, g.to(grad_plus.dtype.element_ty), mask=there)
            of_x = factor * (g - constant - slope * (_read(x, at, there) - mean))
            tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=there)
