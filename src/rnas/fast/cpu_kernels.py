"""The few kernels that the fast supernet is made of on a CPU, forward and backward, without autograd.

A CPU keeps activations in channels_last: a 1x1 convolution is then one matrix product over all pixels, and oneDNN has
fast forward kernels for every depthwise convolution. Its backward kernels are fast only for some shapes (weights: at
most 3 columns, no dilation; input: no dilation), so the other shapes are brought to these.

Activations and weights may be bfloat16, both. What is summed up of them for each channel is float32 then, and so is
what BN makes of that; where such a vector meets an activation, they are multiplied or added in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of `x` (B,C,H,W) with `weight` (D,C), plus `bias` (D,): (B,D,H,W)."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def pointwise_add(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add `pointwise(x, weight)` to `y`, in place."""
    rows(y).addmm_(rows(x), weight.t())


def pointwise_centered(x: Tensor, weight: Tensor, pack: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`pointwise(x, weight)` less its mean over images and pixels; that mean and the (biased) variance, each (D,)."""
    n = check_many(x, pack)
    of_x = channel_sum(x) / n
    mean = over_pack(weight.to(of_x.dtype) @ of_x, pack)  # that of a linear map: so the product itself can subtract it
    z = pointwise(x, weight, -mean.to(x.dtype))
    return z, mean, channel_sum_of_squares(z, pack) / n


def pointwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `pointwise` for its input, from that of its output (B,D,H,W)."""
    return torch.matmul(grad.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def pointwise_weight_grad(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `pointwise` for its weight (D,C), from its input and the gradient of its output."""
    return rows(grad).t() @ rows(x)


def rows(x: Tensor) -> Tensor:
    """`x` (B,C,H,W) as a matrix with a row for each pixel; a view if `x` is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The depthwise convolution of `x` (B,C,H,W) with `weight` (C,1,k,k), k odd, padded to keep the size."""
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])


def depthwise_input_grad(x: Tensor, weight: Tensor, grad: Tensor, stride: int, dilation: int) -> Tensor:
    """The gradient of `depthwise` for `x`. With stride 1 it is a forward convolution with the flipped kernel."""
    if stride == 1:
        return depthwise(grad, weight.flip(2, 3), 1, dilation)
    padding = dilation * (weight.shape[2] // 2)
    return _backward(x, weight, grad, stride, (padding, padding), dilation, of_input=True)


def depthwise_weight_grad(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    stride: int,
    dilation: int,
    kept: dict[tuple[object, ...], Tensor] | None = None,
) -> Tensor:
    """The gradient of `depthwise` for `weight`. `kept`: what was derived from this `x` before, to be used again."""
    k = weight.shape[2]
    padding = dilation * (k // 2)
    kept = {} if kept is None else kept
    if dilation == 2 and stride == 1:  # the four images of every other pixel do not meet: a plain convolution of each
        if ("phases",) not in kept:
            kept["phases",] = _phases(x)
        x, grad = kept["phases",], _phases(grad)
    elif dilation != 1:
        return _backward(x, weight, grad, stride, (padding, padding), dilation, of_input=False)
    if k == 3:
        return _backward(x, weight, grad, stride, (1, 1), 1, of_input=False)
    above = k // 2 if x.shape[2] < k else 0  # padded beforehand where an image is lower than the kernel
    columns = weight.new_empty(len(weight), 1, k, 3)
    parts = []
    for first in range(0, k - 2, 2):  # three columns at a time, of the image padded so that they touch its edge
        pads = k // 2 - first, first + 2 - k // 2, above, above
        if (x.shape, *pads) not in kept:
            kept[x.shape, *pads] = F.pad(x, pads)
        padded = kept[x.shape, *pads]
        part = _backward(padded, columns, grad, stride, (k // 2 - above, 0), 1, of_input=False)
        parts.append(part if first == 0 else part[..., 1:])  # they share a column
    return torch.cat(parts, dim=-1)


def _phases(x: Tensor) -> Tensor:
    """(B,C,H,W) to (4B,C,⌈H/2⌉,⌈W/2⌉): the pixels of even and odd rows and columns as images of their own."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, w % 2, 0, h % 2))
        h, w = h + h % 2, w + w % 2
    x = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def _backward(
    x: Tensor, weight: Tensor, grad: Tensor, stride: int, padding: tuple[int, int], dilation: int, of_input: bool
) -> Tensor:
    gradients = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [stride, stride],
        list(padding),
        [dilation, dilation],
        False,
        [0, 0],
        x.shape[1],
        [of_input, not of_input, False],
    )
    result: Tensor = gradients[0 if of_input else 1]
    return result


def channel_sum(x: Tensor, pack: int = 1) -> Tensor:
    """The sum of `x` (B,C,H,W) over images and pixels: (C,), float32 or float64. Of `packed` images over these, too."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.get_num_threads() == 1:
        return over_pack(x.sum((0, 2, 3), dtype=dtype), pack)
    # Image by image first, or else each thread would fetch half of what the other has just computed.
    return over_pack(x.sum((2, 3), dtype=dtype).sum(0), pack)


def channel_sum_of_squares(x: Tensor, pack: int = 1) -> Tensor:
    """`channel_sum` of `x` (B,C,H,W) squared; the squares are not rounded to bfloat16."""
    if x.dtype == torch.bfloat16:
        norm: Tensor = torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=torch.float32)
        return over_pack(norm.square(), pack)
    return channel_sum(x * x, pack)


def over_pack(v: Tensor, pack: int) -> Tensor:
    """For each channel of packed images (pack·C,) the sum over those that are the same channel."""
    return v if pack == 1 else v.view(pack, -1).sum(0).repeat(pack)


def packed(x: Tensor, pack: int) -> Tensor:
    """`x` (B,C,H,W) with `pack` images side by side in the channels: (⌈B/pack⌉,pack·C,H,W), the rest filled with zeros.

    A processor's vectors take 16 channels in the time of 4, and so do its kernels for depthwise convolutions.
    """
    b, c, h, w = x.shape
    if b % pack:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -b % pack))
    x = x.permute(0, 2, 3, 1).view(-1, pack, h, w, c).transpose(1, 2).transpose(2, 3)
    return x.reshape(-1, h, w, pack * c).permute(0, 3, 1, 2)


def unpacked(x: Tensor, pack: int, images: int) -> Tensor:
    """The `images` (B,C,H,W) that `packed` made `x` of."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h, w, pack, c // pack).permute(0, 3, 1, 2, 4)
    return x.reshape(b * pack, h, w, c // pack).permute(0, 3, 1, 2)[:images]


def shuffled_together(first: Tensor, others: Tensor) -> Tensor:
    """`first` (B,C,H,W) and `others` (B,(K-1)·C,H,W) in the order C groups of K channels, one of each group of C."""
    (b, c, h, w), rest = first.shape, others.permute(0, 2, 3, 1)
    rest = rest.reshape(b, h, w, -1, c).transpose(3, 4)
    together = torch.cat([first.permute(0, 2, 3, 1)[..., None], rest], dim=-1)
    return together.view(b, h, w, -1).permute(0, 3, 1, 2)


def packed_weight(weight: Tensor, pack: int, parts: int = 1) -> Tensor:
    """What `weight` is for packed images. Kernels (C,1,k,k) and vectors (C,) are repeated; 1x1 weights (D,parts·C), of
    `parts` that lie side by side, each packed, are repeated along a diagonal."""
    if weight.dim() != 2:
        return weight.repeat(pack, *(1,) * (weight.dim() - 1))
    d, c = weight.shape[0], weight.shape[1] // parts
    diagonal = torch.eye(pack, dtype=weight.dtype).view(pack, 1, 1, pack, 1)
    return (diagonal * weight.view(1, d, parts, 1, c)).view(pack * d, parts * pack * c)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """`x * scale` in the number format of `x`; `scale` may be wider."""
    return x * scale if scale.dtype == x.dtype else torch.mul(x, scale, out=torch.empty_like(x))


def shifted(x: Tensor, less: Tensor) -> Tensor:
    """`x - less` in the number format of `x`; `less` may be wider."""
    return x - less if less.dtype == x.dtype else torch.sub(x, less, out=torch.empty_like(x))


def per_channel(v: Tensor) -> Tensor:
    """`v` (C,) in a shape that multiplies (B,C,H,W) channel by channel."""
    return v.view(1, -1, 1, 1)


def per_filter(v: Tensor) -> Tensor:
    """`v` (C,) in a shape that multiplies kernels (C,1,k,k) filter by filter."""
    return v.view(-1, 1, 1, 1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two tensors (B,C,H,W): a scalar, float32 or float64."""
    if a.dtype == torch.bfloat16:
        return channel_sum(a * b).sum()
    return torch.dot(rows(a).reshape(-1), rows(b).reshape(-1))


def check_many(x: Tensor, pack: int = 1) -> int:
    """How many values each channel of `x` (B,C,H,W) has: more than one, or BN has nothing to measure."""
    n = x.numel() // x.shape[1] * pack
    if n == 1:
        raise ValueError("batch normalisation in train mode needs more than one value per channel")
    return n


def centered(x: Tensor, pack: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`x` (B,C,H,W) less its mean over images and pixels; that mean and the (biased) variance, each (C,)."""
    n = check_many(x, pack)
    mean = channel_sum(x, pack) / n
    x = shifted(x, per_channel(mean))
    return x, mean, channel_sum_of_squares(x, pack) / n


def avg_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average pooling that counts no padding: (B,C,H,W) to (B,C,⌈H/stride⌉,⌈W/stride⌉)."""
    total = depthwise(x, x.new_ones(x.shape[1], 1, 3, 3), stride, 1)
    count = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), x.new_ones(1, 1, 3, 3), None, stride, 1)
    return total / count
