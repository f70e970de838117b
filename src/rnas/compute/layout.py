"""The memory layout that a network computes fastest in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def arrange(x: Tensor) -> Tensor:
    """`x` (B,C,H,W) in the memory layout that a CPU likes."""
    return x.contiguous(memory_format=torch.channels_last)


def arranged_for(net: nn.Module, x: Tensor) -> Tensor:
    """`x` (B,C,H,W) in the layout that `net` trains fastest in: with depthwise convolutions on a CPU, `arrange`'s."""
    if x.device.type != "cpu":
        return x
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    return arrange(x) if any(c.groups > 1 for c in convs) and not any(map(_overruns, convs)) else x


def _overruns(conv: nn.Conv2d) -> bool:
    """Whether oneDNN may write beyond its memory for the weights' gradient of `conv` in channels_last: it does for a
    strided 1x1 convolution of fewer channels than a vector register takes, 16 with AVX-512 (its issue 6035)."""
    return conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels // conv.groups < 16
