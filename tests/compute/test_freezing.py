"""A frozen model is itself, in eval mode: attacked as it is, unless it offers a form of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.evaluation.test_battery import EPS, fitted
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.freezing import frozen
from rnas.evaluation.battery import run_attacks


class Wrapped(nn.Module):
    """A network in the forward pass `how` of somebody else's module; what it computes stays the same."""

    def __init__(self, net: nn.Module, how: Callable[[Wrapped, Tensor], Tensor]):
        super().__init__()
        self.net, self.nets, self.how, self.seen = net, [net], how, []

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class MyError(Exception):
    pass


def refuses_others(model: Wrapped, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise MyError
    return model.net(x)  # type: ignore[no-any-return]


def unbound_for_others(model: Wrapped, x: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        z = x
    return model.net(z)  # type: ignore[no-any-return]


def takes_dicts(model: Wrapped, x: Tensor) -> Tensor:
    return model.net(x if isinstance(x, Tensor) else x["image"])  # type: ignore[no-any-return]


def branches(model: Wrapped, x: Tensor) -> Tensor:
    return model.net(x) if x.sum() > 0 else model.net(2 * x)  # type: ignore[no-any-return]


def remembers(model: Wrapped, x: Tensor) -> Tensor:
    model.seen.append(type(x))
    return model.net(x)  # type: ignore[no-any-return]


UNTRACEABLE = [
    lambda model, x: model.net(nn.Identity()(x)),
    lambda model, x: model.net(nn.Upsample(size=(8, 8))(x)),
    lambda model, x: model.nets[0](x),
    refuses_others,
    unbound_for_others,
    takes_dicts,
    branches,
    remembers,
]


@pytest.mark.parametrize("how", UNTRACEABLE)
def test_whatever_a_model_does_inside_it_is_attacked_as_it_is(how: Callable[[Wrapped, Tensor], Tensor]) -> None:
    """No attack looks into a model, which so only ever sees images; modules made in `forward` stop torch.fx."""
    net, x, y = fitted()
    model = Wrapped(net, how)
    with frozen(model) as fixed:
        assert fixed is model
    assert set(model.seen) <= {Tensor}
    plain, found = (run_attacks(m, x, y, ["pgd3", "cw"], eps=EPS).masks for m in (net, model))
    assert all((plain[name] == found[name]).all() for name in plain)
    assert torch.equal(PGD(steps=2, seed=0)(model, x, y), PGD(steps=2, seed=0)(net, x, y))


def test_a_module_may_bring_its_own_frozen_form() -> None:
    net = nn.Linear(3, 2)
    net.frozen_view = lambda: torch.sin
    with frozen(net) as fast:
        assert fast is torch.sin


class Rounded(torch.autograd.Function):
    """A defence by quantised images, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 15).round() / 15

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_the_gradient_that_a_model_gives_is_the_one_that_attacks_it() -> None:
    """A quantisation with the gradient of the identity holds no longer than one without quantisation."""
    net, x, y = fitted()
    model = Wrapped(net, lambda model, x: model.net(Rounded.apply(x)))
    with torch.no_grad():
        y = model(x).argmax(1)
    assert not run_attacks(model, x, y, ["pgd20"], eps=0.1).masks["pgd20"].any()
