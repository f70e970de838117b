"""The contract of every attack: inside the ball and [0,1], the model left as it was, bad input refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnas.attacks import CW, FGSM, PGD, Attack
from rnas.attacks.norms import distance
from rnas.errors import RnasError
from rnas.frozen import frozen

ATTACKS: list[Attack] = [
    FGSM(eps=0.1),
    FGSM(eps=0.5, norm="l2"),
    PGD(eps=0.1, step=0.05, steps=3, seed=0),
    PGD(eps=0.1, step=0.05, steps=3, seed=0, any_iterate=True),
    PGD(eps=0.5, step=0.2, steps=3, norm="l2", seed=0),
    CW(eps=0.1, steps=3, seed=0),
]


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


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_adversarial_images_stay_in_the_ball_and_in_the_unit_box(attack: Attack, seed: int) -> None:
    x, y = images(seed=seed)
    x_adv = attack(small_net(seed=seed), x, y)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert float(distance(x_adv, x, attack.norm).max()) <= attack.eps + 1e-6


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_attack_leaves_the_model_and_the_images_as_it_found_them(attack: Attack) -> None:
    net, (x, y) = small_net(), images()
    net[1].eval()  # modules may be in different modes
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x_before = x.clone()
    attack(net, x, y)
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True]
    assert [p.grad is None for p in net.parameters()] == [True, True, True, False, True]


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


def test_a_seeded_attack_does_not_depend_on_the_images_beside_or_on_their_order() -> None:
    net, (x, y) = small_net(), images()
    attack = PGD(steps=3, seed=0)
    order = torch.tensor([4, 1, 5, 0])
    assert torch.allclose(attack(net, x, y)[order], attack(net, x[order], y[order]), atol=1e-6)


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
