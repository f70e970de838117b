"""The fast supernet's kernels on a GPU, in Triton: depthwise convolutions alone and with the 1x1 that follows, pools.

A program computes some pixels of one channel, or of all. It reads their neighbours by loads that the multiprocessor's
cache answers. By counting, not by a profile, these are what it waits for; so a thread of a convolution computes several
pixels of a column, and what it has read serves all that it is a neighbour of. Kernels are compiled for the sizes of the
images: a supernet has three. Images are (B,·,H,W) with contiguous planes; what leaves a node for its E edges is
(B,E,C,H,W), of any strides for images and, but for a mask and in `kernel_grad`, for edges. Sums are float32, whatever
the images are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTEGERS = """x_image x_edge mask_image grad_image grad_edge out_image out_edge out_group weight_edge weight_out
weight_in edges edges_c images share c d""".split()
"""Arguments whose values make no difference to the compiler: or else it would compile a kernel for many of them."""


@triton.jit
def _pieces(tile, width: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    """The row of the first pixel, and the column, of each of P pieces: ROWS pixels of a column, STEP rows apart."""
    q = tile * P + tl.arange(0, P)
    band = q // width
    return (band // STEP) * (ROWS * STEP) + band % STEP, q % width


@triton.jit
def _replaced(values, i: tl.constexpr, value):
    """The tuple `values` with another `i`th."""
    return values[:i] + (value,) + values[i + 1 :]


@triton.jit
def _zeros(N: tl.constexpr, P: tl.constexpr):
    """N times (P,)."""
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.zeros((P,), tl.float32),)
    return values


@triton.jit
def _neighbour(
    x, rows, columns, j: tl.constexpr, dx: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Of one plane `x`, or of its positive part, what row `j` and column `dx` of a kernel around these pixels sees.
    Rows from K on are those of the pixels below."""
    row, column = rows + (j - K // 2) * DILATION, columns + (dx - K // 2) * DILATION
    seen = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    shift = ((j - K // 2) * W + dx - K // 2) * DILATION  # apart, so that it becomes a part of the instruction
    value = tl.load((x + (rows * W + columns)) + shift, mask=seen, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _convolved(
    totals, x, kernel, rows, columns,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, JUMP: tl.constexpr, DILATION: tl.constexpr,
    FLIP: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add what the kernel (`FLIP`ped) makes of one plane `x`, or of its positive part, to each of ROWS `totals`: at
    these rows and columns of `x` to the first, r·JUMP rows of the kernel further down to the `r`th."""
    for j in tl.static_range((ROWS - 1) * JUMP + K):
        for dx in tl.static_range(K):
            value = _neighbour(x, rows, columns, j, dx, H, W, K, DILATION, RELU)
            for r in tl.static_range(ROWS):
                if j - r * JUMP >= 0 and j - r * JUMP < K:
                    tap = (j - r * JUMP) * K + dx
                    of_tap = tl.load(kernel + (K * K - 1 - tap if FLIP else tap)).to(tl.float32)
                    totals = _replaced(totals, r, totals[r] + value * of_tap)
    return totals


@triton.jit(do_not_specialize=INTEGERS)
def _mix(
    x, kernel, weight, bias, mask, out,
    x_image, x_edge, mask_image, out_image, out_edge, weight_edge, weight_out, weight_in, c, d,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    FLIP: tl.constexpr, RELU_IN: tl.constexpr, MASK: tl.constexpr, BIAS_RELU: tl.constexpr, ADD: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] (+)= weight[e] @ (depthwise(x[b,e], kernel[e]) · [mask > 0]): see `mix`. K = 0: no depthwise."""
    tile, edge, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_out, column_out = _pieces(tile, W_OUT, STEP, ROWS, P)
    rows, columns = row_out * STRIDE, column_out * STRIDE
    x += image * x_image + edge * x_edge
    mask += image * mask_image + edge * c * (H * W)
    weight += edge * weight_edge
    kernel += edge * c * (K * K)
    to = tl.arange(0, D)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((D, P), tl.float32),)
    for _ in range(c):
        z = _zeros(ROWS, P)
        if K > 0:
            z = _convolved(z, x, kernel, rows, columns, H, W, K, JUMP, DILATION, FLIP, RELU_IN, ROWS)
        column_of = tl.load(weight + to * weight_out, mask=to < d, other=0.0).to(tl.float32)
        for r in tl.static_range(ROWS):
            row = rows + r * (STEP * STRIDE)
            of_row = z[r] if K > 0 else tl.load(x + (row * W + columns), mask=row < H, other=0.0).to(tl.float32)
            if MASK:
                of_row = tl.where(tl.load(mask + (row * W + columns), mask=row < H, other=0.0) > 0, of_row, 0.0)
            totals = _replaced(totals, r, totals[r] + column_of[:, None] * of_row[None, :])
        x += H * W
        mask += H * W
        kernel += K * K
        weight += weight_in
    out += image * out_image + edge * out_edge
    if BIAS_RELU:
        of_bias = tl.load(bias + edge * d + to, mask=to < d, other=0.0).to(tl.float32)
    for r in tl.static_range(ROWS):
        total, row = totals[r], row_out + r * STEP
        at = out + (to[:, None] * (H_OUT * W_OUT) + (row * W_OUT + column_out)[None, :])
        there = (to < d)[:, None] & (row < H_OUT)[None, :]
        if BIAS_RELU:
            total += of_bias[:, None]
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ADD:
            total += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=INTEGERS)
def _stencil(
    x, kernel, out, x_image, x_edge, out_image, out_edge, c,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] = depthwise(x[b,e], kernel[e])."""
    tile, plane, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    edge, channel = plane // c, plane % c
    row_out, column_out = _pieces(tile, W_OUT, STEP, ROWS, P)
    x += image * x_image + edge * x_edge + channel * (H * W)
    kernel += plane * (K * K)
    rows, columns = row_out * STRIDE, column_out * STRIDE
    totals = _zeros(ROWS, P)
    totals = _convolved(totals, x, kernel, rows, columns, H, W, K, JUMP, DILATION, False, False, ROWS)
    out += image * out_image + edge * out_edge + channel * (H_OUT * W_OUT)
    for r in tl.static_range(ROWS):
        row = row_out + r * STEP
        tl.store(out + (row * W_OUT + column_out), totals[r].to(out.dtype.element_ty), mask=row < H_OUT)


@triton.jit
def _gathered(
    total, grad, kernel, rows, columns,
    H_OUT: tl.constexpr, W_OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Add to `total` the gradient for one plane of a stencil's input, at these rows and columns, for a stride."""
    for dy in tl.static_range(K):
        above = rows + (K // 2 - dy) * DILATION
        for dx in tl.static_range(K):
            left = columns + (K // 2 - dx) * DILATION
            row, column = above // STRIDE, left // STRIDE
            seen = (above >= 0) & (row < H_OUT) & (left >= 0) & (column < W_OUT)
            seen = seen & (above % STRIDE == 0) & (left % STRIDE == 0)
            value = tl.load(grad + (row * W_OUT + column), mask=seen, other=0.0)
            total += value.to(tl.float32) * tl.load(kernel + dy * K + dx).to(tl.float32)
    return total


@triton.jit(do_not_specialize=INTEGERS)
def _spread(
    grad, kernel, x, out, grad_image, grad_edge, x_image, out_image, out_group, edges, c,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    MASK: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_stencil` for x, summed over `edges` edges: see `spread`. (H_OUT, W_OUT) is that of `grad`."""
    tile, plane, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, channel = plane // c, plane % c
    rows, columns = _pieces(tile, W, STEP, ROWS, P)
    grad += image * grad_image + group * edges * grad_edge + channel * (H_OUT * W_OUT)
    kernel += (group * edges * c + channel) * (K * K)
    totals = _zeros(ROWS, P)
    for _ in range(edges):
        if STRIDE == 1:
            totals = _convolved(totals, grad, kernel, rows, columns, H, W, K, JUMP, DILATION, True, False, ROWS)
        else:
            for r in tl.static_range(ROWS):
                row = rows + r * STEP
                total = _gathered(totals[r], grad, kernel, row, columns, H_OUT, W_OUT, K, STRIDE, DILATION)
                totals = _replaced(totals, r, total)
        grad += grad_edge
        kernel += c * (K * K)
    x += image * x_image + channel * (H * W)
    out += image * out_image + group * out_group + channel * (H * W)
    for r in tl.static_range(ROWS):
        total, row = totals[r], rows + r * STEP
        at = row * W + columns
        if MASK:
            total = tl.where(tl.load(x + at, mask=row < H, other=0.0) > 0, total, 0.0)
        if ADD:
            total += tl.load(out + at, mask=row < H, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=row < H)


@triton.jit(do_not_specialize=INTEGERS)
def _kernel_grad(
    x, grad, out, x_image, x_edge, grad_image, images, share, edges_c, c,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr, JUMP: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_stencil` for the kernel of one channel, over a share of the images."""
    wide, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    edge, channel = wide // c, wide % c
    x += part * share * x_image + edge * x_edge + channel * (H * W)
    grad += part * share * grad_image + wide * (H_OUT * W_OUT)
    totals = _zeros(K * K, P)
    for tile in range(tl.cdiv(tl.cdiv(H_OUT, ROWS * STEP) * STEP * W_OUT, P)):
        row_out, column_out = _pieces(tile, W_OUT, STEP, ROWS, P)
        rows, columns = row_out * STRIDE, column_out * STRIDE
        x_of, grad_of = x, grad
        for _ in range(part * share, tl.minimum((part + 1) * share, images)):
            of_rows = ()
            for r in tl.static_range(ROWS):
                row = row_out + r * STEP
                value = tl.load(grad_of + (row * W_OUT + column_out), mask=row < H_OUT, other=0.0)
                of_rows = of_rows + (value.to(tl.float32),)
            for j in tl.static_range((ROWS - 1) * JUMP + K):
                for dx in tl.static_range(K):
                    value = _neighbour(x_of, rows, columns, j, dx, H, W, K, DILATION, False)
                    for r in tl.static_range(ROWS):
                        if j - r * JUMP >= 0 and j - r * JUMP < K:
                            seen = value
                            if H_OUT % (ROWS * STEP) > 0:  # from below the image nothing is, and 0·∞ would be NaN
                                seen = tl.where(row_out + r * STEP < H_OUT, value, 0.0)
                            total = totals[(j - r * JUMP) * K + dx] + seen * of_rows[r]
                            totals = _replaced(totals, (j - r * JUMP) * K + dx, total)
            x_of += x_image
            grad_of += grad_image
    out += (part * edges_c + wide) * (K * K)
    for tap in tl.static_range(K * K):
        tl.store(out + tap, tl.sum(totals[tap], axis=0))


@triton.jit(do_not_specialize=INTEGERS)
def _pass(
    x, bias, of_node, of_max, of_avg, out, argmax, x_image, out_image, out_edge, edges, c,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    STRIDE: tl.constexpr, NODE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, ADD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] (+)= bias[e] + of_node[e]·x[b] + of_max[e]·max_pool(x[b]) + of_avg[e]·avg_pool(x[b])."""
    tile, channel, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tile * P + tl.arange(0, P)
    rows, columns = (p // W_OUT) * STRIDE, (p % W_OUT) * STRIDE
    inside = p < H_OUT * W_OUT
    x += image * x_image + channel * H * W
    offset = rows * W + columns
    highest = tl.full((P,), float("-inf"), tl.float32)
    which = tl.zeros((P,), tl.int32)
    total = tl.zeros((P,), tl.float32)
    count = tl.zeros((P,), tl.float32)
    if MAX or AVG:
        for dy in tl.static_range(3):
            row = rows + dy - 1
            for dx in tl.static_range(3):
                column = columns + dx - 1
                seen = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
                value = tl.load((x + offset) + ((dy - 1) * W + dx - 1), mask=seen, other=0.0).to(tl.float32)
                total += value
                count += seen.to(tl.float32)
                higher = seen & ((value > highest) | (value != value))  # NaN stays NaN, as in torch
                highest = tl.where(higher, value, highest)
                which = tl.where(higher, dy * 3 + dx, which)
    if MAX:
        tl.store(argmax + (image * c + channel) * H_OUT * W_OUT + p, which.to(tl.int8), mask=inside)
        highest = tl.where(inside, highest, 0.0)
    mean = total / tl.maximum(count, 1.0)
    node = total
    if NODE:
        node = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    out += image * out_image + channel * H_OUT * W_OUT
    at = channel
    for _ in range(edges):
        new = tl.zeros((P,), tl.float32) + tl.load(bias + at).to(tl.float32)
        if NODE:
            new += node * tl.load(of_node + at).to(tl.float32)
        if MAX:
            new += highest * tl.load(of_max + at).to(tl.float32)
        if AVG:
            new += mean * tl.load(of_avg + at).to(tl.float32)
        if ADD:
            new += tl.load(out + p, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + p, new.to(out.dtype.element_ty), mask=inside)
        out += out_edge
        at += c


@triton.jit
def _window(
    rows, columns, k: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Of the pool's windows whose `k`th pixel is at these rows and columns: where they lie in its output, whether there
    is one, and of how many pixels."""
    above, left = rows + 1 - k // 3, columns + 1 - k % 3
    row, column = above // STRIDE, left // STRIDE
    seen = (above >= 0) & (row < H_OUT) & (left >= 0) & (column < W_OUT)
    if STRIDE > 1:
        seen = seen & (above % STRIDE == 0) & (left % STRIDE == 0)
    high = tl.minimum(row * STRIDE + 2, H) - tl.maximum(row * STRIDE - 1, 0)
    wide = tl.minimum(column * STRIDE + 2, W) - tl.maximum(column * STRIDE - 1, 0)
    return row * W_OUT + column, seen, tl.maximum(high * wide, 1)


@triton.jit(do_not_specialize=INTEGERS)
def _pass_grad(
    grad, of_node, of_max, of_avg, argmax, out, grad_image, grad_edge, out_image, edges, c,
    H: tl.constexpr, W: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    STRIDE: tl.constexpr, NODE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, ADD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_pass` for x; (H_OUT, W_OUT) is that of `grad`."""
    tile, channel, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tile * P + tl.arange(0, P)
    inside = q < H * W
    rows, columns = q // W, q % W
    argmax += (image * c + channel) * (H_OUT * W_OUT)
    highest, shares = (), ()
    for k in tl.static_range(9):
        at, seen, size = _window(rows, columns, k, H, W, H_OUT, W_OUT, STRIDE)
        if MAX:
            highest = highest + (tl.load(argmax + at, mask=seen, other=-1) == k,)
        shares = shares + (1.0 / size.to(tl.float32),)
    grad += image * grad_image + channel * (H_OUT * W_OUT)
    total = tl.zeros((P,), tl.float32)
    for edge in range(edges):
        if NODE:
            value = tl.load(grad + q, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(of_node + edge * c + channel).to(tl.float32)
        if MAX or AVG:
            for k in tl.static_range(9):
                at, seen, _ = _window(rows, columns, k, H, W, H_OUT, W_OUT, STRIDE)
                value = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32)
                if MAX:
                    total += tl.where(highest[k], value * tl.load(of_max + edge * c + channel).to(tl.float32), 0.0)
                if AVG:
                    total += value * (shares[k] * tl.load(of_avg + edge * c + channel).to(tl.float32))
        grad += grad_edge
    place = out + image * out_image + channel * H * W + q
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


COMPILED = {"num_stages": 1, "enable_fp_fusion": True}
"""The compiler keeps no loads in flight in shared memory. Fused multiply-adds are said because Triton 3.9 warns, and
3.10 does otherwise, where they are not."""


def _tile(pixels: int, most: int = 256) -> dict[str, int]:
    """The pixels of a program's tile, and its warps."""
    p = min(triton.next_power_of_2(pixels), most)
    return {"P": p, "num_warps": max(1, min(4, p // 32)), **COMPILED}


def _tiles(out: Tensor, step: int, rows: int, most: int) -> tuple[int, dict[str, int]]:
    """How many tiles cover an image of `out`, and their form: `most` pieces of columns at most, of `rows` pixels or
    fewer, `step` rows apart."""
    h, w = out.shape[-2:]
    while rows > 1 and h * w < 32 * rows:  # rather all threads of a warp
        rows //= 2
    pieces = triton.cdiv(h, rows * step) * step * w
    p = min(triton.next_power_of_2(pieces), most)
    return triton.cdiv(pieces, p), {"ROWS": rows, "P": p, "num_warps": max(1, p // 32), **COMPILED}


def _edge_stride(x: Tensor) -> int:
    """Of (B,E,C,H,W); 0 for (B,C,H,W), which all edges share."""
    return x.stride(1) if x.ndim == 5 else 0


class Stencil(NamedTuple):
    """A depthwise convolution, padded to keep the size: kernels (E·C,1,k,k) of E edges, k odd."""

    kernel: Tensor
    stride: int = 1
    dilation: int = 1

    @property
    def form(self) -> dict[str, int]:
        """What its kernels are compiled for. Rows of the output that are STEP apart see the same rows of the input,
        which are JUMP rows of the kernel apart."""
        step = self.dilation if self.stride % self.dilation else 1
        return {
            "K": self.kernel.shape[-1],
            "STRIDE": self.stride,
            "DILATION": self.dilation,
            "STEP": step,
            "JUMP": step * self.stride // self.dilation,
        }


NO_STENCIL = {"K": 0, "STRIDE": 1, "DILATION": 1, "STEP": 1, "JUMP": 1}


def _sizes(x: Tensor, out: Tensor) -> dict[str, int]:
    """Of the images before and after a kernel."""
    return {"H": x.shape[-2], "W": x.shape[-1], "H_OUT": out.shape[-2], "W_OUT": out.shape[-1]}


def mix(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    stencil: Stencil | None = None,
    *,
    flip: bool = False,
    relu: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Write into `out` (B,E,D,H',W'), or `add` to it, the 1x1 convolution of each edge with its `weight` (E,D,C).

    Of `x` (B,C,H,W) or (B,E,C,H,W), after the `stencil` if there is one: of its positive part if `relu`, with kernels
    `flip`ped, and where `mask` (B,E,C,H,W) is positive. With a `bias` (E·D,) comes a ReLU.
    """
    images, edges, d = out.shape[:3]
    form = NO_STENCIL if stencil is None else stencil.form
    wide = triton.next_power_of_2(d)
    # A thread has registers for 64 sums; for more, too, but then small images would make too few warps for a GPU.
    tiles, tile = _tiles(out, form["STEP"], rows=max(1, min(4, 64 // wide)), most=32)
    tile["num_warps"] = max(1, wide // 64)
    _mix[tiles, edges, images](
        x,
        out if stencil is None else stencil.kernel,
        weight,
        out if bias is None else bias,
        out if mask is None else mask,
        out,
        x.stride(0),
        _edge_stride(x),
        0 if mask is None else mask.stride(0),
        out.stride(0),
        out.stride(1),
        *weight.stride(),
        *(x.shape[-3], d),
        **_sizes(x, out),
        **form,
        FLIP=flip,
        RELU_IN=relu,
        MASK=mask is not None,
        BIAS_RELU=bias is not None,
        ADD=add,
        D=wide,
        **tile,
    )
    return out


def spread(grad: Tensor, stencil: Stencil, out: Tensor, mask: Tensor | None = None, add: bool = False) -> Tensor:
    """Write into `out`, or `add` to it, the gradient of a stencil's input, from that of its output (B,E,C,H',W').

    For an `out` (B,C,H,W) the sum over all edges, where `mask`, of its shape, is positive; or else (B,E,C,H,W).
    """
    images, edges, c = grad.shape[:3]
    groups = out.shape[1] if out.ndim == 5 else 1
    form = stencil.form
    tiles, tile = _tiles(out, form["STEP"], rows=4 if stencil.stride == 1 else 2, most=128)
    _spread[tiles, groups * c, images](
        grad,
        stencil.kernel,
        out if mask is None else mask,
        out,
        grad.stride(0),
        grad.stride(1),
        0 if mask is None else mask.stride(0),
        out.stride(0),
        _edge_stride(out),
        *(edges // groups, c),
        **_sizes(out, grad),
        **form,
        MASK=mask is not None,
        ADD=add,
        **tile,
    )
    return out


def convolve(x: Tensor, stencil: Stencil, out: Tensor) -> Tensor:
    """Write into `out` (B,E,C,H',W') the stencil of `x` (B,C,H,W) or (B,E,C,H,W)."""
    images, edges, c = out.shape[:3]
    form = stencil.form
    tiles, tile = _tiles(out, form["STEP"], rows=4, most=128)
    _stencil[tiles, edges * c, images](
        *(x, stencil.kernel, out, x.stride(0), _edge_stride(x), out.stride(0), out.stride(1), c),
        **_sizes(x, out),
        **form,
        **tile,
    )
    return out


PROGRAMS = 4096
"""Of one warp each, as many as fill a GPU: over so many the images of a gradient of kernels are divided."""


def kernel_grad(x: Tensor, stencil: Stencil, grad: Tensor) -> Tensor:
    """The gradient of a stencil's kernels, like them, from its input and the gradient (B,E,C,H',W') of its output."""
    images, edges, c = grad.shape[:3]
    form, k = stencil.form, stencil.kernel.shape[-1]
    share = triton.cdiv(images, min(images, triton.cdiv(PROGRAMS, edges * c)))
    parts = triton.cdiv(images, share)
    out = torch.empty(parts, edges * c, k * k, device=x.device, dtype=torch.float32)
    _kernel_grad[edges * c, parts](
        *(x, grad, out, x.stride(0), _edge_stride(x), grad.stride(0)),
        *(images, share, edges * c, c),
        **_sizes(x, grad),
        **form,
        **_tiles(grad, form["STEP"], rows=4, most=32)[1],
    )
    return out.sum(0).view_as(stencil.kernel).to(stencil.kernel.dtype)


class Passed(NamedTuple):
    """What edges pass on of a node and of its 3x3 pools: scales (E·C,), or None."""

    node: Tensor | None
    max: Tensor | None
    avg: Tensor | None
    stride: int = 1

    def scales(self, other: Tensor) -> list[Tensor]:
        """As kernels take them: `other` stands for none."""
        return [other if scale is None else scale for scale in self[:3]]

    @property
    def form(self) -> dict[str, int]:
        """What its kernels are compiled for."""
        node, most, mean = (scale is not None for scale in self[:3])
        return {"STRIDE": self.stride, "NODE": node, "MAX": most, "AVG": mean}


def pass_on(x: Tensor, passed: Passed, bias: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write into `out` (B,E,C,H',W'), or `add` to it, what is passed on of `x` (B,C,H,W), and `bias` (E·C,).

    Returns which of its nine pixels each maximum is, int8 (B,C,H',W'); its gradient wants that.
    """
    images, edges, c, h_out, w_out = out.shape
    tile = _tile(h_out * w_out)
    argmax = torch.empty(images, c, h_out, w_out, device=x.device, dtype=torch.int8)
    _pass[triton.cdiv(h_out * w_out, tile["P"]), c, images](
        *(x, bias, *passed.scales(bias), out, argmax, x.stride(0), out.stride(0), out.stride(1), edges, c),
        **_sizes(x, out),
        **passed.form,
        ADD=add,
        **tile,
    )
    return argmax


def pass_back(grad: Tensor, passed: Passed, argmax: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write into `out` (B,C,H,W), or `add` to it, the gradient of `pass_on` for x, from that of its result."""
    images, edges, c = grad.shape[:3]
    pixels = out.shape[-2] * out.shape[-1]
    tile = _tile(pixels)
    _pass_grad[triton.cdiv(pixels, tile["P"]), c, images](
        *(grad, *passed.scales(grad), argmax, out, grad.stride(0), grad.stride(1), out.stride(0), edges, c),
        **_sizes(out, grad),
        **passed.form,
        ADD=add,
        **tile,
    )
    return out
