"""What every attack promises, over a table of all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks.test_basics import images, small_net
from tests.evaluation.test_battery import fitted, quick
from torch import Tensor

from rnas.attacks import APGD, CW, CWL2, FAB, FGSM, PGD, Attack, AutoAttack, Square
from rnas.attacks.losses import correct
from rnas.attacks.norms import Norm, distance

__all__ = ["quick"]  # a fixture: AutoAttack with few steps

Make = Callable[[float, Norm, int], Attack]
ATTACKS: dict[str, Make] = {
    "FGSM": lambda eps, norm, seed: FGSM(eps=eps, norm=norm),
    "FGSM, margin": lambda eps, norm, seed: FGSM(eps=eps, norm=norm, loss="margin"),
    "PGD": lambda eps, norm, seed: PGD(eps=eps, norm=norm, step=eps / 2, steps=3, seed=seed),
    "PGD, any iterate": lambda eps, norm, seed: PGD(
        eps=eps, norm=norm, step=eps / 2, steps=3, seed=seed, any_iterate=True
    ),
    "CW": lambda eps, norm, seed: CW(eps=eps, norm=norm, step=eps / 2, steps=3, seed=seed),
    "CWL2": lambda eps, norm, seed: CWL2(steps=5, lr=0.1),
    "APGD": lambda eps, norm, seed: APGD(eps=eps, norm=norm, steps=5, restarts=2, seed=seed),
    "APGD, margin": lambda eps, norm, seed: APGD(eps=eps, norm=norm, loss="margin", steps=5, seed=seed),
    "APGD, dlr": lambda eps, norm, seed: APGD(eps=eps, norm=norm, loss="dlr", steps=5, random_start=False),
    "APGD-T": lambda eps, norm, seed: APGD(eps=eps, norm=norm, loss="dlr-targeted", steps=5, targets=2, seed=seed),
    "FAB": lambda eps, norm, seed: FAB(eps=eps, norm=norm, steps=3, restarts=2, targets=2, seed=seed),
    "Square": lambda eps, norm, seed: Square(eps=eps, norm=norm, queries=10, restarts=2, seed=seed),
    "AutoAttack": lambda eps, norm, seed: AutoAttack(eps=eps, norm=norm, seed=seed),
}
RADIUS: dict[Norm, float] = {"linf": 0.02, "l2": 0.2}  # at which some of the images of `fitted` hold
every = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
both = pytest.mark.parametrize("norm", RADIUS)


def test_the_table_has_every_attack_and_they_share_one_way_in() -> None:
    kinds = {kind for kind in Attack.__subclasses__() if kind.__module__.startswith("rnas.")}
    assert {type(make(0.1, "linf", 0)) for make in ATTACKS.values()} == kinds
    assert {kind.__call__ for kind in kinds} == {Attack.__call__}


@both
@every
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), eps=st.floats(0.001, 0.5))
def test_images_stay_in_the_ball_and_in_the_box(make: Make, norm: Norm, seed: int, eps: float) -> None:
    x, y = images(seed=seed)
    attack = make(eps, norm, seed)
    x_adv = attack(small_net(seed=seed), x, y)
    assert x_adv.shape == x.shape
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    if not isinstance(attack, CWL2):  # which is in no ball
        assert float(distance(x_adv, x, norm).max()) <= eps * (1 + 1e-5) + 1e-6


@every
def test_the_network_and_the_images_are_left_as_they_were_found(make: Make) -> None:
    net, (x, y) = small_net(), images()
    net[1].eval()  # modules may be in different modes
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x_before, y_before = x.clone(), y.clone()
    make(0.1, "linf", 0)(net, x, y)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert not x.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True]
    assert [p.grad is None for p in net.parameters()] == [True, True, True, False, True]


@both
@every
def test_an_images_verdict_is_its_own(make: Make, norm: Norm) -> None:
    """Whatever their order, one by one, and among those that hold only: AutoAttack and `run_attacks` rely on it."""
    net, x, y = fitted()
    net, x, y = net.double(), x[::2].double(), y[::2]  # in float64, where the size of a batch rounds nothing away
    y[0] = (y[0] + 1) % 5  # misclassified already
    attack = make(RADIUS[norm], norm, 0)

    def holds(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return correct(net(attack(net, x, y)), y)

    standing = holds(x, y)
    assert not standing[0]
    order = torch.arange(len(x)).flip(0)
    assert torch.equal(holds(x[order], y[order]), standing[order])
    assert torch.equal(torch.cat([holds(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]), standing)
    if standing.any():
        assert holds(x[standing], y[standing]).all()


@every
def test_images_keep_their_type(make: Make) -> None:
    """float64 is attacked in float64, also where the model answers in float32."""
    net, x, y = fitted()
    attack = make(0.02, "linf", 0)
    assert attack(net, x, y).dtype == torch.float32
    assert attack(lambda x: net(x.float()), x.double(), y).dtype == torch.float64
    assert attack(net.double(), x.double(), y).dtype == torch.float64
