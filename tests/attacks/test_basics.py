"""Attacks on what is known by hand, their seeds, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rnas.attacks import FGSM, PGD
from rnas.compute.freezing import frozen
from rnas.errors import RnasError


def small_net(classes: int = 5, seed: int = 0) -> nn.Sequential:
    """A convolutional network with batch normalisation, in training mode as PyTorch builds it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def images(n: int = 6, seed: int = 1, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((n, 3, 8, 8), generator=generator)
    return x.round(decimals=1), torch.randint(0, classes, (n,), generator=generator)  # with pixels at 0 and 1


def test_freezing_is_undone_after_an_exception() -> None:
    net = small_net()
    with pytest.raises(ZeroDivisionError), frozen(net):
        raise ZeroDivisionError
    assert net.training
    assert net[1].training
    assert all(p.requires_grad for p in net.parameters())


def test_fgsm_on_a_linear_model_is_eps_times_the_sign_of_the_weights() -> None:
    w = torch.randn((3 * 8 * 8,), generator=torch.Generator().manual_seed(0))

    def linear(x: Tensor) -> Tensor:
        z = x.flatten(1) @ w
        return torch.stack([z, -z], dim=1)

    x = torch.full((1, 3, 8, 8), 0.5)
    x_adv = FGSM(eps=0.1)(linear, x, torch.tensor([0]))
    assert torch.allclose(x_adv, x - 0.1 * w.sign().view_as(x))


def test_a_seed_fixes_the_start_and_none_uses_the_global_generator() -> None:
    net, (x, y) = small_net(), images()
    seeded, free = PGD(steps=1, seed=3), PGD(steps=1)
    assert torch.equal(seeded(net, x, y), seeded(net, x, y))
    torch.manual_seed(5)
    first = free(net, x, y)
    assert not torch.equal(first, free(net, x, y))
    torch.manual_seed(5)
    assert torch.equal(first, free(net, x, y))


X, Y = images()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X + 0.5, Y, r"\[0,1\]"),
        (X * 255, Y, r"\[0,1\]"),
        (X * float("nan"), Y, r"\[0,1\]"),
        ((X * 255).byte(), Y, "float32 or float64"),
        (X[0], Y[:1], r"\(B,C,H,W\)"),
        (X[:0], Y[:0], "at least one image"),
        (X, Y[:3], "one for each image"),
        (X, Y.float(), "int64"),
        (X, Y + 5, "classes 0 to 4"),
        (X, Y - 5, "classes 0 to 4"),
    ],
)
def test_bad_images_and_labels_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(RnasError, match=message):
        FGSM()(small_net(), x, y)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, "expected"),
        (lambda x: x.flatten(1)[:3], "for 6 images"),
        (lambda x: (x.flatten(1)[:, :5],), "tuple"),
        (lambda x: x.flatten(1)[:, :5] * float("nan"), "NaN"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused(answer: object, message: str) -> None:
    with pytest.raises(RnasError, match=message):
        FGSM()(answer, X, Y)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0}, "above 0"),
        ({"eps": -1 / 255}, "above 0"),
        ({"eps": float("nan")}, "above 0"),
        ({"eps": 8}, "8/255"),
        ({"norm": "l1"}, "unknown norm"),
        ({"loss": "dlrr"}, "unknown loss"),
        ({"steps": 0}, "steps"),
        ({"step": -1}, "step"),
    ],
)
def test_impossible_parameters_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RnasError, match=message):
        PGD(**arguments)  # type: ignore[arg-type]
