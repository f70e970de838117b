"""The fast supernet's kernels on a GPU, in Triton: depthwise convolutions alone and with the 1x1 that follows, pools.

A program computes some pixels of one channel, or of all. It reads each neighbour of its pixels by a load of its own:
they lie in the multiprocessor's cache, so memory is read once. Images are (B,·,H,W) with contiguous planes; what leaves
a node for its E edges is (B,E,C,H,W), of any strides for images and edges. Sums are float32, whatever the images are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTEGERS = """x_image x_edge mask_image grad_image grad_edge out_image out_edge out_group weight_edge weight_out
weight_in edges edges_c images share c d h w h_out w_out""".split()
"""Arguments whose values make no difference to the compiler: or else it would compile a kernel for many of them."""


@triton.jit
def _rows_and_columns(p, width, stride: tl.constexpr):
    """Where the pixels `p` of an output of this `width` lie in its input."""
    return (p // width) * stride, (p % width) * stride


@triton.jit
def _convolved(
    x, kernel, rows, columns, inside, h, w,
    K: tl.constexpr, DILATION: tl.constexpr, FLIP: tl.constexpr, RELU: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of one plane `x`: what its kernel (`FLIP`ped) makes of it, or of its positive part, at these rows and columns."""
    total = tl.zeros((P,), tl.float32)
    for dy in tl.static_range(K):
        row = rows + (dy - K // 2) * DILATION
        for dx in tl.static_range(K):
            column = columns + (dx - K // 2) * DILATION
            seen = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            shift = (dy - K // 2) * DILATION * w + (dx - K // 2) * DILATION
            value = tl.load((x + shift) + (rows * w + columns), mask=seen, other=0.0).to(tl.float32)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tap = K * K - 1 - dy * K - dx if FLIP else dy * K + dx
            total += value * tl.load(kernel + tap).to(tl.float32)
    return total


@triton.jit(do_not_specialize=INTEGERS)
def _mix(
    x, kernel, weight, bias, mask, out,
    x_image, x_edge, mask_image, out_image, out_edge, weight_edge, weight_out, weight_in,
    c, d, h, w, h_out, w_out,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, FLIP: tl.constexpr,
    RELU_IN: tl.constexpr, MASK: tl.constexpr, BIAS_RELU: tl.constexpr, ADD: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] (+)= weight[e] @ (depthwise(x[b,e], kernel[e]) · [mask > 0]): see `mix`. K = 0: no depthwise."""
    tile, edge, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tile * P + tl.arange(0, P)
    rows, columns = _rows_and_columns(p, w_out, STRIDE)
    inside = p < h_out * w_out
    x += image * x_image + edge * x_edge
    mask += image * mask_image + edge * c * h * w
    weight += edge * weight_edge
    kernel += edge * c * K * K
    to = tl.arange(0, D)
    offset = rows * w + columns
    total = tl.zeros((D, P), tl.float32)
    for _ in range(c):
        if K == 0:
            z = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        else:
            z = _convolved(x, kernel, rows, columns, inside, h, w, K, DILATION, FLIP, RELU_IN, P)
        if MASK:
            z = tl.where(tl.load(mask + offset, mask=inside, other=0.0) > 0, z, 0.0)
        column_of = tl.load(weight + to * weight_out, mask=to < d, other=0.0).to(tl.float32)
        total += column_of[:, None] * z[None, :]
        x += h * w
        mask += h * w
        kernel += K * K
        weight += weight_in
    at = out + image * out_image + edge * out_edge + to[:, None] * (h_out * w_out) + p[None, :]
    there = (to < d)[:, None] & inside[None, :]
    if BIAS_RELU:
        total += tl.load(bias + edge * d + to, mask=to < d, other=0.0).to(tl.float32)[:, None]
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ADD:
        total += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=INTEGERS)
def _stencil(
    x, kernel, out, x_image, x_edge, out_image, out_edge, c, h, w, h_out, w_out,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] = depthwise(x[b,e], kernel[e])."""
    tile, plane, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tile * P + tl.arange(0, P)
    edge, channel = plane // c, plane % c
    rows, columns = _rows_and_columns(p, w_out, STRIDE)
    inside = p < h_out * w_out
    x += image * x_image + edge * x_edge + channel * h * w
    kernel += plane * (K * K)
    total = _convolved(x, kernel, rows, columns, inside, h, w, K, DILATION, False, False, P)
    at = out + image * out_image + edge * out_edge + channel * h_out * w_out + p
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _spread(
    grad, kernel, x, out, grad_image, grad_edge, x_image, out_image, out_group, edges, c, h, w, h_out, w_out,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, MASK: tl.constexpr, ADD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_stencil` for x, summed over `edges` edges: see `spread`. (h_out, w_out) is that of `grad`."""
    tile, plane, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tile * P + tl.arange(0, P)
    group, channel = plane // c, plane % c
    inside = q < h * w
    rows, columns = q // w, q % w
    grad += image * grad_image + group * edges * grad_edge + channel * h_out * w_out
    kernel += (group * edges * c + channel) * (K * K)
    total = tl.zeros((P,), tl.float32)
    for _ in range(edges):
        for dy in tl.static_range(K):
            above = rows + (K // 2 - dy) * DILATION
            for dx in tl.static_range(K):
                left = columns + (K // 2 - dx) * DILATION
                if STRIDE == 1:
                    seen = inside & (above >= 0) & (above < h) & (left >= 0) & (left < w)
                    shift = (K // 2 - dy) * DILATION * w + (K // 2 - dx) * DILATION
                    value = tl.load((grad + shift) + q, mask=seen, other=0.0)
                else:
                    row, column = above // STRIDE, left // STRIDE
                    seen = inside & (above >= 0) & (row < h_out) & (left >= 0) & (column < w_out)
                    seen = seen & (above % STRIDE == 0) & (left % STRIDE == 0)
                    value = tl.load(grad + (row * w_out + column), mask=seen, other=0.0)
                total += value.to(tl.float32) * tl.load(kernel + dy * K + dx).to(tl.float32)
        grad += grad_edge
        kernel += c * K * K
    if MASK:
        total = tl.where(tl.load(x + image * x_image + channel * h * w + q, mask=inside, other=0.0) > 0, total, 0.0)
    at = out + image * out_image + group * out_group + channel * h * w + q
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _kernel_grad(
    x, grad, out, x_image, x_edge, grad_image, images, share, edges_c, c, h, w, h_out, w_out,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_stencil` for the kernel of one channel, over a share of the images."""
    wide, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    edge, channel = wide // c, wide % c
    tap = tl.arange(0, TAPS)
    dy, dx = (tap // K - K // 2) * DILATION, (tap % K - K // 2) * DILATION
    x += part * share * x_image + edge * x_edge + channel * (h * w)
    grad += part * share * grad_image + wide * (h_out * w_out)
    total = tl.zeros((TAPS, P), tl.float32)
    for first in range(0, h_out * w_out, P):
        p = first + tl.arange(0, P)
        rows, columns = _rows_and_columns(p, w_out, STRIDE)
        row, column = rows[None, :] + dy[:, None], columns[None, :] + dx[:, None]
        inside = p < h_out * w_out
        seen = (tap < K * K)[:, None] & inside[None, :] & (row >= 0) & (row < h) & (column >= 0) & (column < w)
        at = row * w + column
        x_of, grad_of = x, grad
        for _ in range(part * share, tl.minimum((part + 1) * share, images)):
            value = tl.load(x_of + at, mask=seen, other=0.0).to(tl.float32)
            total += value * tl.load(grad_of + p, mask=inside, other=0.0).to(tl.float32)[None, :]
            x_of += x_image
            grad_of += grad_image
    at = out + (part * edges_c + wide) * (K * K) + tap
    tl.store(at, tl.sum(total, axis=1), mask=tap < K * K)


@triton.jit(do_not_specialize=INTEGERS)
def _pass(
    x, bias, of_node, of_max, of_avg, out, argmax, x_image, out_image, out_edge, edges, c, h, w, h_out, w_out,
    STRIDE: tl.constexpr, NODE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, ADD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[b,e] (+)= bias[e] + of_node[e]·x[b] + of_max[e]·max_pool(x[b]) + of_avg[e]·avg_pool(x[b])."""
    tile, channel, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tile * P + tl.arange(0, P)
    rows, columns = _rows_and_columns(p, w_out, STRIDE)
    inside = p < h_out * w_out
    x += image * x_image + channel * h * w
    offset = rows * w + columns
    highest = tl.full((P,), float("-inf"), tl.float32)
    which = tl.zeros((P,), tl.int32)
    total = tl.zeros((P,), tl.float32)
    count = tl.zeros((P,), tl.float32)
    if MAX or AVG:
        for dy in tl.static_range(3):
            row = rows + dy - 1
            for dx in tl.static_range(3):
                column = columns + dx - 1
                seen = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
                value = tl.load((x + ((dy - 1) * w + dx - 1)) + offset, mask=seen, other=0.0).to(tl.float32)
                total += value
                count += seen.to(tl.float32)
                higher = seen & ((value > highest) | (value != value))  # NaN stays NaN, as in torch
                highest = tl.where(higher, value, highest)
                which = tl.where(higher, dy * 3 + dx, which)
    if MAX:
        tl.store(argmax + (image * c + channel) * h_out * w_out + p, which.to(tl.int8), mask=inside)
        highest = tl.where(inside, highest, 0.0)
    mean = total / tl.maximum(count, 1.0)
    node = total
    if NODE:
        node = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    out += image * out_image + channel * h_out * w_out
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


@triton.jit(do_not_specialize=INTEGERS)
def _pass_grad(
    grad, of_node, of_max, of_avg, argmax, out, grad_image, grad_edge, out_image, edges, c, h, w, h_out, w_out,
    STRIDE: tl.constexpr, NODE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, ADD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of `_pass` for x; (h_out, w_out) is that of `grad`."""
    tile, channel, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tile * P + tl.arange(0, P)
    inside = q < h * w
    rows, columns = q // w, q % w
    argmax += (image * c + channel) * h_out * w_out
    of_edge = grad + image * grad_image + channel * h_out * w_out
    total = tl.zeros((P,), tl.float32)
    at = channel
    for _ in range(edges):
        if NODE:
            value = tl.load(of_edge + q, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(of_node + at).to(tl.float32)
        if MAX or AVG:
            for dy in tl.static_range(3):
                above = rows + 1 - dy
                row = above // STRIDE
                for dx in tl.static_range(3):
                    left = columns + 1 - dx
                    column = left // STRIDE
                    seen = inside & (above >= 0) & (row < h_out) & (left >= 0) & (column < w_out)
                    if STRIDE > 1:
                        seen = seen & (above % STRIDE == 0) & (left % STRIDE == 0)
                    offset = row * w_out + column
                    value = tl.load(of_edge + offset, mask=seen, other=0.0).to(tl.float32)
                    if MAX:
                        highest = tl.load(argmax + offset, mask=seen, other=-1) == dy * 3 + dx
                        total += tl.where(highest, value * tl.load(of_max + at).to(tl.float32), 0.0)
                    if AVG:
                        high = tl.minimum(row * STRIDE + 2, h) - tl.maximum(row * STRIDE - 1, 0)
                        wide = tl.minimum(column * STRIDE + 2, w) - tl.maximum(column * STRIDE - 1, 0)
                        share = tl.load(of_avg + at).to(tl.float32) / tl.maximum(high * wide, 1).to(tl.float32)
                        total += value * share
        of_edge += grad_edge
        at += c
    place = out + image * out_image + channel * h * w + q
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def _tile(pixels: int, most: int = 256) -> dict[str, int]:
    """The pixels of a program's tile, its warps, and that the compiler keeps no loads in flight in shared memory.

    Fused multiply-adds are said because Triton 3.9 warns, and 3.10 does otherwise, where they are not.
    """
    p = min(triton.next_power_of_2(pixels), most)
    return {"P": p, "num_warps": max(1, min(4, p // 32)), "num_stages": 1, "enable_fp_fusion": True}


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
        """What its kernels are compiled for."""
        return {"K": self.kernel.shape[-1], "STRIDE": self.stride, "DILATION": self.dilation}


NO_STENCIL = {"K": 0, "STRIDE": 1, "DILATION": 1}


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
    c, h, w = x.shape[-3:]
    images, edges, d, h_out, w_out = out.shape
    wide = triton.next_power_of_2(d)
    tile = _tile(h_out * w_out, max(32, min(256, 4096 // wide)))
    tile["num_warps"] = max(tile["num_warps"], wide * tile["P"] // 2048)  # a thread has registers for 64 sums
    _mix[triton.cdiv(h_out * w_out, tile["P"]), edges, images](
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
        *(c, d, h, w, h_out, w_out),
        **(NO_STENCIL if stencil is None else stencil.form),
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
    images, edges, c, h_out, w_out = grad.shape
    h, w = out.shape[-2:]
    groups = out.shape[1] if out.ndim == 5 else 1
    tile = _tile(h * w)
    _spread[triton.cdiv(h * w, tile["P"]), groups * c, images](
        grad,
        stencil.kernel,
        out if mask is None else mask,
        out,
        grad.stride(0),
        grad.stride(1),
        0 if mask is None else mask.stride(0),
        out.stride(0),
        _edge_stride(out),
        *(edges // groups, c, h, w, h_out, w_out),
        **stencil.form,
        MASK=mask is not None,
        ADD=add,
        **tile,
    )
    return out


def convolve(x: Tensor, stencil: Stencil, out: Tensor) -> Tensor:
    """Write into `out` (B,E,C,H',W') the stencil of `x` (B,C,H,W) or (B,E,C,H,W)."""
    images, edges, c, h_out, w_out = out.shape
    tile = _tile(h_out * w_out)
    _stencil[triton.cdiv(h_out * w_out, tile["P"]), edges * c, images](
        *(x, stencil.kernel, out, x.stride(0), _edge_stride(x), out.stride(0), out.stride(1)),
        *(c, *x.shape[-2:], h_out, w_out),
        **stencil.form,
        **tile,
    )
    return out


PROGRAMS = 1024
"""As many as fill a GPU: over so many the images of a gradient of kernels are divided."""


def kernel_grad(x: Tensor, stencil: Stencil, grad: Tensor) -> Tensor:
    """The gradient of a stencil's kernels, like them, from its input and the gradient (B,E,C,H',W') of its output."""
    images, edges, c, h_out, w_out = grad.shape
    k = stencil.kernel.shape[-1]
    share = triton.cdiv(images, min(images, triton.cdiv(PROGRAMS, edges * c)))
    parts = triton.cdiv(images, share)
    out = torch.empty(parts, edges * c, k * k, device=x.device, dtype=torch.float32)
    _kernel_grad[edges * c, parts](
        *(x, grad, out, x.stride(0), _edge_stride(x), grad.stride(0)),
        *(images, share, edges * c, c, *x.shape[-2:], h_out, w_out),
        **stencil.form,
        TAPS=triton.next_power_of_2(k * k),
        **_tile(h_out * w_out, 128),
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
        *(x, bias, *passed.scales(bias), out, argmax, x.stride(0), out.stride(0), out.stride(1), edges),
        *(c, *x.shape[-2:], h_out, w_out),
        **passed.form,
        ADD=add,
        **tile,
    )
    return argmax


def pass_back(grad: Tensor, passed: Passed, argmax: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write into `out` (B,C,H,W), or `add` to it, the gradient of `pass_on` for x, from that of its result."""
    images, edges, c, h_out, w_out = grad.shape
    h, w = out.shape[-2:]
    tile = _tile(h * w)
    _pass_grad[triton.cdiv(h * w, tile["P"]), c, images](
        *(grad, *passed.scales(grad), argmax, out, grad.stride(0), grad.stride(1), out.stride(0), edges),
        *(c, h, w, h_out, w_out),
        **passed.form,
        ADD=add,
        **tile,
    )
    return out
