"""A frozen model answers as in eval mode, follows every change of its weights, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.frozen import Model, frozen, unfolded
from rnas.nets.zoo import build


class Residual(nn.Module):
    """What the folding must see through: shared ReLUs, a joined BN, views, and BN that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.left = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 5, 2, 4, 2, groups=8, bias=False), nn.Conv2d(8, 8, 1))
        self.right = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8, affine=False))
        self.even, self.odd = nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(8, 4, 1, stride=2)
        self.joined, self.alone = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.pool, self.classifier = nn.MaxPool2d(3, 2, 1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = self.joined(torch.cat([self.even(x.relu()), self.odd(x.relu())], dim=1))
        x = self.alone(self.left(x) + self.right(x) + skip)
        return self.classifier(self.pool(x).view(x.shape[0], -1))  # type: ignore[no-any-return]


def trained(net: nn.Module, side: int = 16, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`net` with BN statistics and parameters that are not the initial ones, in training mode."""
    torch.manual_seed(0)
    net.to(dtype).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net(torch.rand(8, 3, side, side, dtype=dtype))
    return net


def answers(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of one function of them for the images."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad((logits * logits.detach().sin()).sum(), x)
    return logits.detach(), gradient


def assert_equal_in_float64(net: nn.Module, x: Tensor) -> None:
    with unfolded(net) as plain:
        expected = answers(plain, x)
    with frozen(net) as fast:
        assert fast is not net
        for got, want in zip(answers(fast, x), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 13)])
def test_frozen_is_the_model_in_eval_mode_for_even_and_odd_sizes(height: int, width: int) -> None:
    net = trained(Residual())
    if (height, width) != (16, 16):
        net.pool = nn.AdaptiveMaxPool2d(4)
    assert_equal_in_float64(net, torch.rand(4, 3, height, width, dtype=torch.float64))


@pytest.mark.parametrize("name", ["RNAS-L", "AdvRush", "ResNet18", "MobileNetV2", "ShuffleNetV2"])
def test_networks_of_the_zoo_are_made_fast_and_stay_themselves(name: str) -> None:
    cells = {"cells": 3, "channels": 4} if name in ("RNAS-L", "AdvRush") else {}
    net = trained(build(name, classes=10, **cells), side=32)
    assert_equal_in_float64(net, torch.rand(2, 3, 32, 32, dtype=torch.float64))


def test_frozen_follows_training_and_loading_and_moving() -> None:
    net = trained(Residual())
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    assert_equal_in_float64(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net(x)  # new BN statistics
    assert_equal_in_float64(net, x)
    net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()})
    assert_equal_in_float64(net, x)
    net.classifier = nn.Linear(8 * 16, 3).double()
    assert_equal_in_float64(net, x)
    net.float()
    with frozen(net) as fast:
        assert fast(x.float()).dtype == torch.float32


def test_the_model_keeps_its_parameters_gradients_and_modules() -> None:
    net = trained(Residual(), dtype=torch.float32)
    names = [name for name, _ in net.named_modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(2):
        PGD(steps=2)(net, torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
    assert [name for name, _ in net.named_modules()] == names
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_plain_attributes_may_change_between_two_attacks() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Conv2d(3, 2, 1).double(), 1.0
            self.pair = (torch.zeros(2), torch.ones(2))  # no reason to trip over

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(x).mean((2, 3))

    net, x = Scaled(), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert_equal_in_float64(net, x)
    net.scale, net.pair = 3.0, (torch.ones(2), torch.ones(2))
    assert_equal_in_float64(net, x)


class Switching(nn.Module):
    """What it computes hangs on attributes that are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.settings = {"scales": [1.0, 1.0]}
        self.kept = Kept(1.0)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.settings["scales"][0] * self.kept.scale
        return self.act(self.conv(x) * scale).mean((2, 3))


@dataclass
class Kept:
    scale: float


@pytest.mark.parametrize("change", ["function", "list in a dict", "attribute of an attribute"])
def test_what_a_model_computes_may_change_between_two_attacks(change: str) -> None:
    net, x = Switching().eval(), torch.rand(4, 3, 8, 8)
    with frozen(net) as fast:
        fast(x)
    if change == "function":
        net.act = torch.tanh
    elif change == "list in a dict":
        net.settings["scales"][0] = 3.0
    else:
        net.kept.scale = -2.0
    with frozen(net) as fast, torch.no_grad():
        assert torch.allclose(fast(x), net(x), atol=1e-6)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 2, 1), None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last.mean((2, 3))


class Dicing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3)) * torch.rand(())


class DicingElsewhere(nn.Module):
    """Draws from a generator that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1.0 if self.draw() < 2 else 0.0)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3)) * (2 if x.sum() > 0 else 1)


@pytest.mark.parametrize(
    "kind",
    [Remembering, Dicing, Branching, partial(DicingElsewhere, random.random), partial(DicingElsewhere, np.random.rand)],
)
def test_what_is_no_fixed_sequence_of_operations_runs_as_it_is(kind: Callable[[], nn.Module]) -> None:
    net = kind()
    with frozen(net) as fixed:
        assert fixed is net
    assert getattr(net, "last", None) is None


def test_hooks_are_respected() -> None:
    net, seen = trained(Residual()), []
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with frozen(net) as fast:
        fast(x)
    handle = net.alone.register_forward_hook(lambda *_: seen.append(1))
    with frozen(net) as fixed:
        fixed(x)
    assert seen == [1]
    handle.remove()
    assert_equal_in_float64(net, x)


def test_a_module_may_bring_its_own_frozen_form() -> None:
    net = nn.Linear(3, 2)
    net.frozen_view = lambda: torch.sin
    with frozen(net) as fast:
        assert fast is torch.sin


class _Rounded(torch.autograd.Function):
    """A defence by quantised images, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 15).round() / 15

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return self.net(_Rounded.apply(x))
        if self.how == "no_grad":
            with torch.no_grad():
                error = (x * 15).round() / 15 - x
            return self.net(x + error)
        with torch.set_grad_enabled(False):
            gate = self.net[0](x).mean((1, 2, 3), keepdim=True).tanh()
        return self.net(x * (1 + gate))


@pytest.mark.parametrize("how", ["function", "no_grad", "gate"])
def test_the_gradient_that_a_model_gives_is_the_one_that_attacks_it(how: str) -> None:
    """A trace forgets the backward of a foreign function and where gradients are off: the logits alone do not tell."""
    torch.manual_seed(0)
    model = StraightThrough(how).eval()
    x = torch.rand(4, 3, 8, 8)

    def gradient(net: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)[0]

    wanted = gradient(model)
    assert wanted.norm() > 0
    for _ in range(2):
        with frozen(model) as net:
            assert torch.allclose(net(x), model(x), atol=1e-5)
            assert (gradient(net) - wanted).norm() < 1e-4 * wanted.norm()


def test_what_is_changed_between_two_attacks_counts() -> None:
    """Also what is nobody's tensor or attribute: a module that is there twice, a forward that replaces another."""
    torch.manual_seed(0)
    conv, body = nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    model = nn.Sequential(conv, body, nn.Flatten(), nn.Linear(192, 5)).eval()
    x = torch.rand(4, 3, 8, 8)
    old = conv.forward

    def checked() -> Tensor:
        with frozen(model) as net:
            logits = net(x)
        assert torch.allclose(logits, model(x), atol=1e-5)
        return logits

    first = checked()
    body.append(conv)
    second = checked()
    conv.forward = lambda z: 2 * old(z)  # type: ignore[method-assign]
    assert not torch.allclose(checked(), second, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)


class Remembering(nn.Module):
    """Keeps what it has seen in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.net(x))
        return self.seen[-1]


def test_a_list_that_a_model_keeps_holds_what_the_model_put_there() -> None:
    model = Remembering().eval()
    x = torch.rand(2, 3, 8, 8)
    with frozen(model) as net:
        assert not model.seen
        net(x)
    assert [type(value) for value in model.seen] == [Tensor]
