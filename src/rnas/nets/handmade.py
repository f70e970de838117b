"""The hand-made networks of the paper's Table 1 in their CIFAR forms: the first convolution keeps the image's size.

Each is a sequence of named stages (`normalize`, `stem`, `stage1`, ..., `classifier`) whose outputs a forward hook can
read. Images (B,3,H,W) in [0,1], logits (B,classes). The last features are averaged over their positions, so that every
image size fits the same weights. Parameters are, to the one, those of the definitions that `rnas.published` names.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from rnas.compute.freezing import Model
from rnas.nets.folding import folded
from rnas.nets.ops import Normalize

Statistics = tuple[float, ...]  # a mean or standard deviation per colour channel


class Stages(nn.Sequential):
    """A hand-made network: its named stages, one after the other."""

    def frozen_view(self) -> Model:
        """Its form for attacks."""
        return folded(self)


class Residual(nn.Module):
    """body(x) + shortcut(x); the shortcut is a 1x1 convolution and BN where the channels or the size change."""

    def __init__(self, body: nn.Module, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.body = body
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)  # type: ignore[no-any-return]


class Branches(nn.Module):
    """The channels of every branch's output for the same input, joined."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SecondHalf(nn.Module):
    """Applies `body` to the second half of the channels and passes the first on."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([first, self.body(second)], dim=1)


class Shuffle(nn.Module):
    """Interleaves the two halves of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)


def vgg16(classes: int, mean: Statistics, std: Statistics) -> nn.Sequential:
    """VGG16 with BN and one linear layer (Simonyan and Zisserman 2015)."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    last_of_stage = {2, 4, 7, 10, 13}
    network = _start(mean, std)
    for i, (c_in, c_out) in enumerate(itertools.pairwise(widths), 1):
        layers: list[nn.Module] = _conv_bn_relu(c_in, c_out, 3, bias=True)
        if i in last_of_stage:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # which leaves a single pixel as it is
        network.add_module(f"conv{i}", nn.Sequential(*layers))
    network.add_module("classifier", _classifier(512, classes))
    return network


def resnet18(classes: int, mean: Statistics, std: Statistics, width: int = 64) -> nn.Sequential:
    """ResNet18 (He et al. 2016), whose first stage has `width` channels."""
    network = _start(mean, std, *_conv_bn_relu(3, width, 3))
    c_in = width
    for stage, c_out in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
        stride = 1 if stage == 1 else 2
        network.add_module(
            f"stage{stage}", nn.Sequential(_basic_block(c_in, c_out, stride), _basic_block(c_out, c_out, 1))
        )
        c_in = c_out
    network.add_module("classifier", _classifier(c_in, classes))
    return network


def _basic_block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    body = nn.Sequential(*_conv_bn_relu(c_in, c_out, 3, stride), *_conv_bn(c_out, c_out, 3))
    return nn.Sequential(Residual(body, c_in, c_out, stride), nn.ReLU())


def densenet121(classes: int, mean: Statistics, std: Statistics) -> nn.Sequential:
    """DenseNet121 with growth 32 (Huang et al. 2017). BN and ReLU come before each convolution."""
    growth = 32
    channels = 2 * growth
    network = _start(mean, std, nn.Conv2d(3, channels, 3, padding=1, bias=False))
    for stage, layers in enumerate((6, 12, 24, 16), 1):
        block = nn.Sequential()
        for _ in range(layers):
            body = nn.Sequential(
                *_bn_relu_conv(channels, 4 * growth, 1),
                *_bn_relu_conv(4 * growth, growth, 3),
            )
            block.append(Branches(body, nn.Identity()))
            channels += growth
        if stage < 4:
            block.extend([*_bn_relu_conv(channels, channels // 2, 1), nn.AvgPool2d(2)])
            channels //= 2
        else:
            block.extend([nn.BatchNorm2d(channels), nn.ReLU()])
        network.add_module(f"stage{stage}", block)
    network.add_module("classifier", _classifier(channels, classes))
    return network


def mobilenetv2(classes: int, mean: Statistics, std: Statistics) -> nn.Sequential:
    """MobileNetV2 (Sandler et al. 2018)."""
    network = _start(mean, std, *_conv_bn_relu(3, 32, 3))
    c_in = 32
    plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for stage, (expansion, c_out, blocks, first_stride) in enumerate(plan, 1):
        layers = nn.Sequential()
        for stride in (first_stride, *[1] * (blocks - 1)):
            layers.append(_inverted_residual(c_in, c_out, expansion * c_in, stride))
            c_in = c_out
        network.add_module(f"stage{stage}", layers)
    network.add_module("head", nn.Sequential(*_conv_bn_relu(c_in, 1280, 1)))
    network.add_module("classifier", _classifier(1280, classes))
    return network


def _inverted_residual(c_in: int, c_out: int, width: int, stride: int) -> nn.Module:
    body = nn.Sequential(
        *_conv_bn_relu(c_in, width, 1),
        *_conv_bn_relu(width, width, 3, stride, groups=width),
        *_conv_bn(width, c_out, 1),
    )
    return Residual(body, c_in, c_out) if stride == 1 else body


def shufflenetv2(classes: int, mean: Statistics, std: Statistics) -> nn.Sequential:
    """ShuffleNetV2 of width 1x (Ma et al. 2018)."""
    network = _start(mean, std, *_conv_bn_relu(3, 24, 3))
    c_in = 24
    for stage, (c_out, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
        layers = nn.Sequential(_shuffle_reduction(c_in, c_out // 2), Shuffle())
        for _ in range(blocks):
            layers.extend([SecondHalf(_shuffle_branch(c_out // 2, c_out // 2, 1)), Shuffle()])
        network.add_module(f"stage{stage}", layers)
        c_in = c_out
    network.add_module("head", nn.Sequential(*_conv_bn_relu(c_in, 1024, 1)))
    network.add_module("classifier", _classifier(1024, classes))
    return network


def _shuffle_reduction(c_in: int, c_out: int) -> Branches:
    left = nn.Sequential(*_conv_bn(c_in, c_in, 3, 2, groups=c_in), *_conv_bn_relu(c_in, c_out, 1))
    return Branches(left, _shuffle_branch(c_in, c_out, 2))


def _shuffle_branch(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_conv_bn_relu(c_in, c_out, 1),
        *_conv_bn(c_out, c_out, 3, stride, groups=c_out),
        *_conv_bn_relu(c_out, c_out, 1),
    )


def squeezenet(classes: int, mean: Statistics, std: Statistics) -> nn.Sequential:
    """SqueezeNet with simple bypass and BN (Iandola et al. 2017)."""
    network = _start(mean, std, *_conv_bn_relu(3, 96, 3, bias=True), nn.MaxPool2d(2))
    plan = ((96, 128), (128, 128), (128, 256), (256, 256), (256, 384), (384, 384), (384, 512), (512, 512))
    for i, (c_in, c_out) in enumerate(plan, 2):
        fire = _fire(c_in, c_out)
        bypassed = c_in == c_out and i < 9
        stage = nn.Sequential(Residual(fire, c_in, c_out) if bypassed else fire)
        if i in (4, 8):
            stage.append(nn.MaxPool2d(2))
        network.add_module(f"fire{i}", stage)
    head = nn.Sequential(nn.Conv2d(512, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.add_module("classifier", head)
    return network


def _fire(c_in: int, c_out: int) -> nn.Sequential:
    squeezed = c_out // 8
    one = nn.Sequential(*_conv_bn_relu(squeezed, c_out // 2, 1, bias=True))
    three = nn.Sequential(*_conv_bn_relu(squeezed, c_out // 2, 3, bias=True))
    return nn.Sequential(*_conv_bn_relu(c_in, squeezed, 1, bias=True), Branches(one, three))


def _start(mean: Statistics, std: Statistics, *stem: nn.Module) -> nn.Sequential:
    network = Stages()
    network.add_module("normalize", Normalize(mean, std))
    if stem:
        network.add_module("stem", nn.Sequential(*stem))
    return network


def _conv_bn(
    c_in: int, c_out: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [convolution, nn.BatchNorm2d(c_out)]


def _conv_bn_relu(
    c_in: int, c_out: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    return [*_conv_bn(c_in, c_out, kernel, stride, groups=groups, bias=bias), nn.ReLU()]


def _bn_relu_conv(c_in: int, c_out: int, kernel: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)]


def _classifier(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
