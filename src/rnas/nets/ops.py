"""The operations of the search space, as in DARTS (Liu et al. 2019). All map (B,C,H,W) to (B,C,H/stride,W/stride)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rnas.errors import RnasError


class Zero(nn.Module):
    """`none`: zeros of the right shape."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """The stride-2 skip: two 1x1 convolutions, on the even and on the odd pixels, side by side."""

    def __init__(self, c_in: int, c_out: int, affine: bool):
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))  # type: ignore[no-any-return]


class Normalize(nn.Module):
    """(x - mean) / std per channel: the first layer of every network here, so that attacks live in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise RnasError(f"mean is {mean} and std {std}: expected three numbers each, for std above 0")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def relu_conv_bn(c_in: int, c_out: int, affine: bool = True) -> nn.Sequential:
    """ReLU, 1x1 convolution, BN: brings a cell's input to its number of channels."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


def _depthwise_separable(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def sep_conv(channels: int, kernel: int, stride: int, affine: bool) -> nn.Sequential:
    """A depthwise-separable convolution, applied twice; the first one carries the stride."""
    return nn.Sequential(
        *_depthwise_separable(channels, kernel, stride, 1, affine),
        *_depthwise_separable(channels, kernel, 1, 1, affine),
    )


def dil_conv(channels: int, kernel: int, stride: int, affine: bool) -> nn.Sequential:
    """A depthwise-separable convolution with dilation 2."""
    return nn.Sequential(*_depthwise_separable(channels, kernel, stride, 2, affine))


def conv_7x1_1x7(channels: int, stride: int, affine: bool) -> nn.Sequential:
    """A 7x7 convolution factorised into a row and a column."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


# name -> builder(channels, stride, affine)
BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda c, stride, affine: Zero(stride),
    "max_pool_3x3": lambda c, stride, affine: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda c, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": _skip,
    "sep_conv_3x3": lambda c, stride, affine: sep_conv(c, 3, stride, affine),
    "sep_conv_5x5": lambda c, stride, affine: sep_conv(c, 5, stride, affine),
    "sep_conv_7x7": lambda c, stride, affine: sep_conv(c, 7, stride, affine),
    "dil_conv_3x3": lambda c, stride, affine: dil_conv(c, 3, stride, affine),
    "dil_conv_5x5": lambda c, stride, affine: dil_conv(c, 5, stride, affine),
    "conv_7x1_1x7": conv_7x1_1x7,
}


def operation(name: str, channels: int, stride: int, affine: bool = True) -> nn.Module:
    """The module of operation `name`: (B,channels,H,W) to (B,channels,H/stride,W/stride)."""
    return BUILDERS[name](channels, stride, affine)


def stem(channels: int, stride: int = 1) -> nn.Sequential:
    """The first convolution of every cell network: 3 to `channels`."""
    return nn.Sequential(nn.Conv2d(3, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels))


def reductions(cells: int) -> frozenset[int]:
    """Which of `cells` cells are reduction cells: those at a third and at two thirds of the depth."""
    return frozenset((cells // 3, 2 * cells // 3))


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of `terms`, tensors of one shape."""
    return functools.reduce(torch.add, terms)
