"""What folding would gain on models that others wrote: the question of docs/decisions/019.

    python -m benchmarks.foreign --data cifar10 [--networks resnet18 mobilenetv2 cells] [--json FILE]
    python -m benchmarks.foreign --data cifar10 --pairs 3      # whole AutoAttacks too; takes hours

Three networks in their authors' usual manner, torch.nn modules only, at their published sizes, on real images: what a
pass costs in eval mode in processor time of one thread, as the network is and in its folded form, forward and to the
gradient for the images; and on how many pairs of images the folded form passes the check that it had to pass while
foreign models were attacked in it: logits and gradient to 0.1 %. Where it fails, it gains nothing.

With `--pairs`, whole AutoAttacks, pair by pair, of narrower ones (those published would take days) that are lightly
trained on adversarial images, so that FAB and Square have something to do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks import train
from benchmarks.timing import interleaved, machine, positive, program, save
from rnas import data
from rnas.attacks import AutoAttack
from rnas.attacks.base import confirmed
from rnas.attacks.gradient import ascent_direction
from rnas.attacks.losses import cross_entropy
from rnas.compute.freezing import Model, unfolded
from rnas.nets.folding import _Folded

RESULTS = Path(__file__).parent / "results"


# --- a ResNet18, as CIFAR repositories write it ---------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, c = [], width
        for planes, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            blocks += [BasicBlock(c, planes, stride), BasicBlock(planes, planes, 1)]
            c = planes
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.avg_pool2d(self.layers(out), 4)
        return self.linear(out.view(out.size(0), -1))  # type: ignore[no-any-return]


# --- a MobileNetV2 with the strides of CIFAR --------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand: int):
        super().__init__()
        hidden = inp * expand
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    def __init__(self, width: float = 1.0, classes: int = 10):
        super().__init__()

        def channels(c: float) -> int:
            return max(8, int(c * width + 4) // 8 * 8)

        c = channels(32)
        layers: list[nn.Module] = [nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU6(inplace=True)]
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expand, planes, number, stride in table:
            for i in range(number):
                layers.append(InvertedResidual(c, channels(planes), stride if i == 0 else 1, expand))
                c = channels(planes)
        last = channels(1280)
        layers += [nn.Conv2d(c, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.mean([2, 3]))  # type: ignore[no-any-return]


# --- a network of cells, as the authors of DARTS wrote theirs ---------------------------------------------------------


class ReLUConvBN(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class SepConv(nn.Module):
    def __init__(self, c: int, kernel: int, stride: int):
        super().__init__()
        layers: list[nn.Module] = []
        for s in (stride, 1):
            depthwise = nn.Conv2d(c, c, kernel, s, kernel // 2, groups=c, bias=False)
            layers += [nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)]
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class DilConv(nn.Module):
    def __init__(self, c: int, kernel: int, stride: int):
        super().__init__()
        depthwise = nn.Conv2d(c, c, kernel, stride, kernel - 1, dilation=2, groups=c, bias=False)
        self.op = nn.Sequential(nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class FactorizedReduce(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))  # type: ignore[no-any-return]


OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "sep_conv_3x3": lambda c, stride: SepConv(c, 3, stride),
    "dil_conv_3x3": lambda c, stride: DilConv(c, 3, stride),
    "max_pool_3x3": lambda c, stride: nn.MaxPool2d(3, stride, 1),
    "skip_connect": lambda c, stride: nn.Identity() if stride == 1 else FactorizedReduce(c, c),
}
# DARTS (second order) of Liu et al. 2019: the operation and the input of both edges of each of the four nodes.
NORMAL = (
    "sep_conv_3x3 0 sep_conv_3x3 1 sep_conv_3x3 0 sep_conv_3x3 1 "
    "sep_conv_3x3 1 skip_connect 0 skip_connect 0 dil_conv_3x3 2"
)
REDUCE = (
    "max_pool_3x3 0 max_pool_3x3 1 skip_connect 2 max_pool_3x3 1 "
    "max_pool_3x3 0 skip_connect 2 skip_connect 2 max_pool_3x3 1"
)


class Cell(nn.Module):
    def __init__(self, before: int, last: int, c: int, reduction: bool, reduction_before: bool):
        super().__init__()
        self.preprocess0 = FactorizedReduce(before, c) if reduction_before else ReLUConvBN(before, c)
        self.preprocess1 = ReLUConvBN(last, c)
        words = (REDUCE if reduction else NORMAL).split()
        self._indices = [int(word) for word in words[1::2]]
        strides = [2 if reduction and index < 2 else 1 for index in self._indices]
        self._ops = nn.ModuleList(OPS[name](c, stride) for name, stride in zip(words[::2], strides, strict=True))

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(4):
            h1 = self._ops[2 * i](states[self._indices[2 * i]])
            h2 = self._ops[2 * i + 1](states[self._indices[2 * i + 1]])
            states.append(h1 + h2)
        return torch.cat(states[-4:], dim=1)


class CellNetwork(nn.Module):
    def __init__(self, c: int = 36, layers: int = 20, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        before = last = 3 * c
        reduction_before = False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            self.cells.append(Cell(before, last, c, reduction, reduction_before))
            reduction_before, before, last = reduction, last, 4 * c
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        out = F.adaptive_avg_pool2d(s1, 1)
        return self.classifier(out.view(out.size(0), -1))  # type: ignore[no-any-return]


# --- measurement ------------------------------------------------------------------------------------------------------

Make = Callable[[int], nn.Module]
# How narrow, batches of training, and the network of so many classes: narrow, and as published.
NETWORKS: dict[str, tuple[str, int, Make, Make]] = {
    "cells": ("5 cells of C = 12, not 20 of 36", 60, lambda k: CellNetwork(12, 5, k), lambda k: CellNetwork(36, 20, k)),
    "resnet18": ("a quarter of the width", 60, lambda k: ResNet18(16, k), lambda k: ResNet18(64, k)),
    "mobilenetv2": ("half the width", 90, lambda k: MobileNetV2(0.5, k), lambda k: MobileNetV2(1.0, k)),
}
Side = Callable[[nn.Module, Tensor, Tensor, AutoAttack], Tensor]


def folded_form(model: nn.Module) -> Model:
    """The form that `rnas.nets.folding` would give `model`, which is in eval mode."""
    net = _Folded(model)
    net.fold()
    return net


def folded(model: nn.Module, x: Tensor, y: Tensor, attack: AutoAttack) -> Tensor:
    """Which images (B,) hold against the attack on the folded form, by the verdict of the network as it is."""
    with unfolded(model), torch.no_grad():
        return model(confirmed(attack, model, folded_form(model), x, y)).argmax(1) == y


def as_it_is(model: nn.Module, x: Tensor, y: Tensor, attack: AutoAttack) -> Tensor:
    """Which images (B,) hold against the attack on the network as it is."""
    with unfolded(model), torch.no_grad():
        return model(attack.perturb(model, x, y)).argmax(1) == y


SIDES: dict[str, Side] = {"folded": folded, "as_it_is": as_it_is}


def passes(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds an image of a forward pass and of a gradient, of both forms, with the ratio."""
    found = {}
    with unfolded(model):
        fast = folded_form(model)
        runs: dict[str, Callable[[Model], object]] = {
            "forward": lambda net: net(x),
            "gradient": lambda net: ascent_direction(net, x, y, cross_entropy),
        }
        for what, run in runs.items():
            with torch.no_grad():
                seconds = interleaved({"folded": partial(run, fast), "as_it_is": partial(run, model)}, 3, "cpu")
            ms = {side: 1e3 * statistics.median(values) / len(x) for side, values in seconds.items()}
            gain = ms["as_it_is"] / ms["folded"]
            found[what] = {"gain": round(gain, 2), **{side: round(value, 3) for side, value in ms.items()}}
    return found


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def measure(model: nn.Module, x: Tensor, y: Tensor, attack: AutoAttack, pairs: int) -> Iterator[dict[str, Any]]:
    """The pairs of one network so far, after each of them; which side goes first alternates."""
    rows = []
    for i in range(pairs):
        order = list(SIDES)[:: 1 if i % 2 == 0 else -1]
        outcome = {side: timed(partial(SIDES[side], model, x, y, attack)) for side in order}
        seconds = {side: round(outcome[side][0], 1) for side in SIDES}
        gain = outcome["as_it_is"][0] / outcome["folded"][0]
        different = int((outcome["folded"][1] != outcome["as_it_is"][1]).sum())
        rows.append({"gain": round(gain, 3), **seconds, "different": different})
        print(rows[-1], flush=True)
        standing = int(outcome["as_it_is"][1].sum())
        yield {"gain": statistics.median(row["gain"] for row in rows), "standing": standing, "pairs": rows}


def passes_the_check(model: nn.Module, x: Tensor) -> bool:
    """Whether the folded form gives the logits and gradients of the network to 0.1 %, as decision 013 wanted it."""

    def answer(net: Model) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        logits = net(leaf)
        weights = torch.arange(logits.numel()).cos().view_as(logits)
        return logits.detach(), torch.autograd.grad((logits * weights).sum(), leaf)[0]

    with unfolded(model):
        (got, got_gradient), (logits, gradient) = answer(folded_form(model)), answer(model)
    same = torch.allclose(got, logits, 1e-3, 1e-3 * float(logits.abs().max()))
    return same and bool((got_gradient - gradient).norm() <= 1e-3 * gradient.norm())


def published(make: Make, classes: int, x: Tensor, y: Tensor, batch: int) -> dict[str, Any]:
    """What is known of a network at its published size, untrained; BN's statistics are those of the images."""
    torch.manual_seed(0)
    model = make(classes)
    with torch.no_grad():
        for part in x[:96].split(32):
            model(part)
    pairs = x[:32].split(2)
    passed = sum(passes_the_check(model, pair) for pair in pairs)
    return {"batch": batch, "ms_an_image": passes(model, x[:batch], y[:batch]), "passes_check": [passed, len(pairs)]}


def whole(make: Make, steps: int, dataset: data.Dataset, x: Tensor, y: Tensor, pairs: int) -> Iterator[dict[str, Any]]:
    """The pairs of whole AutoAttacks so far, after each of them."""
    eps = dataset.eps_default
    torch.manual_seed(0)
    model = make(len(dataset.classes))
    train(model, dataset.train, eps / 2, steps)
    with torch.no_grad():
        clean = int((model(x).argmax(1) == y).sum())
    about = {"training": f"{steps} batches of 64 against PGD-2 at half the radius", "clean": clean}
    for outcome in measure(model, x, y, AutoAttack(eps=eps, seed=0), pairs):
        yield {**about, **outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as in rnas: a name, an .npz, a folder (default: digits)")
    parser.add_argument("--data-name", help="how the results call the data")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=positive, default=128, help="of whole AutoAttacks")
    parser.add_argument("--batch-size", type=positive, default=16, help="of the published sizes")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "quick-foreign.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(arguments.data)
    x = dataset.test.images[: arguments.images].float() / 255
    y = dataset.test.labels[: arguments.images]
    result: dict[str, Any] = {
        "images": f"of the test split of {arguments.data_name or dataset.name}, {tuple(x.shape[1:])}",
        "gain_is": "processor time of the network as it is, over that of its folded form",
        "measured_on": machine("cpu"),
        "networks": {},
    }
    for name in arguments.networks:
        narrow, steps, make, as_published = NETWORKS[name]
        found: dict[str, Any] = {"published": published(as_published, len(dataset.classes), x, y, arguments.batch_size)}
        result["networks"][name] = found
        print(name, found, flush=True)
        save(arguments.json, result)
        for outcome in whole(make, steps, dataset, x, y, arguments.pairs) if arguments.pairs else ():
            found["whole AutoAttacks"] = {"narrow": narrow, "images": len(x), **outcome}
            save(arguments.json, result)


if __name__ == "__main__":
    program(main)
