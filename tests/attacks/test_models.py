"""What a model may answer: float64, no gradients where none are needed; else one clear error, or a warning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.attacks.test_basics import images, small_net
from tests.evaluation.test_battery import EPS, fitted, quick
from torch import Tensor, nn

import rnas
from rnas.attacks import APGD, CW, CWL2, FAB, FGSM, PGD, Attack, AutoAttack, Square
from rnas.attacks.losses import correct
from rnas.compute.freezing import Model
from rnas.errors import RnasError
from rnas.evaluation.battery import run_attacks

__all__ = ["quick"]  # a fixture: AutoAttack with few steps

X, Y = images()
WHITE: list[Attack] = [FGSM(), PGD(steps=2), CW(steps=2), CWL2(steps=2), APGD(steps=2), FAB(steps=2), AutoAttack()]


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_float64_images_are_attacked_in_float64_and_fall_as_in_float32(norm: str) -> None:
    net, x, y = fitted()
    names = ["fgsm", "pgd3", "pgd3-any", "cw", "cw-l2", "aa"]
    eps = EPS if norm == "linf" else 0.2
    single = run_attacks(net, x, y, names, eps=eps, norm=norm).masks  # type: ignore[arg-type]
    seen: set[torch.dtype] = set()
    net.double().register_forward_hook(lambda module, x, logits: seen.add(logits.dtype))
    double = run_attacks(net, x.double(), y, names, eps=eps, norm=norm).masks  # type: ignore[arg-type]
    assert seen == {torch.float64}
    for name in names:  # random numbers differ
        assert abs(int(single[name].sum()) - int(double[name].sum())) <= 2


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (small_net(), X.double(), r"fails on images that are float64 \(6, 3, 8, 8\) on cpu"),
        (small_net().double(), X, "fails on images that are float32"),
        (small_net(), X.mean(1, keepdim=True), r"\(6, 1, 8, 8\)"),
        (small_net().half(), X.half(), "images are float16"),
        (small_net().bfloat16(), X.bfloat16(), "images are bfloat16"),
        (lambda x: small_net()(x).half(), X, "float16"),
        (lambda x: small_net()(x).argsort(1), X, "int64"),
        (lambda x: small_net()(x) > 0, X, "bool"),
        (lambda x: small_net()(x).to("meta"), X, "answers on meta: expected logits on cpu"),
    ],
)
@pytest.mark.parametrize("attack", [PGD(steps=1), Square(queries=1)], ids=lambda a: type(a).__name__)
def test_types_that_cannot_be_are_refused(attack: Attack, model: Model, x: Tensor, message: str) -> None:
    with pytest.raises(RnasError, match=message) as direct:
        attack(model, x, Y)
    with pytest.raises(RnasError, match=message):
        run_attacks(model, x, Y, ["square"], eps=0.1)
    assert "\n" not in str(direct.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "8/255"}, "eps is '8/255': expected a number"),
        ({"eps": True}, "eps is True: expected a number"),
        ({"batch_size": 2.5}, "batch size is 2.5"),
        ({"names": None}, "attacks is None: expected a list of names"),
        ({"names": [3]}, r"attacks is \[3\]: expected a list of names"),
        ({"model": "runs/demo"}, "the model is a str: expected a callable, such as rnas.load"),
    ],
)
def test_arguments_of_other_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RnasError, match=message):
        run_attacks(**{"model": small_net(), "x": X, "y": Y, "names": ["fgsm"], "eps": 0.1, **change})


def test_images_that_want_a_gradient_are_images() -> None:
    wanted = rnas.evaluate(small_net(), X, Y, ["fgsm"], 0.1)
    found = rnas.evaluate(small_net(), X.clone().requires_grad_(), Y, ["fgsm"], 0.1)
    assert found.summary["images_sha256"] == wanted.summary["images_sha256"]
    assert found.robust("fgsm") == wanted.robust("fgsm")


# --- no gradients ---------------------------------------------------------------------------------------------------


def through_numpy(net: nn.Module) -> Model:
    return lambda x: torch.from_numpy(net.eval()(x).numpy())


def detached(net: nn.Module) -> Model:
    return lambda x: net.eval()(x).detach()


def of_weights_only(net: nn.Module) -> Model:
    """The answer has a graph, but not one that reaches the images."""
    return lambda x: net.eval()(x.detach())


@pytest.mark.parametrize("cut", [through_numpy, detached, of_weights_only])
def test_without_gradients_only_square_attacks(cut: object) -> None:
    net, x, y = fitted()
    model = cut(net.requires_grad_(cut is of_weights_only))  # type: ignore[operator]
    for attack in WHITE:
        with pytest.raises(RnasError, match="only square"):
            attack(model, x, y)
    with pytest.raises(RnasError, match=r"pgd3, aa: gradients are needed"):
        run_attacks(model, x, y, ["pgd3", "square", "aa"], eps=EPS)
    square = Square(eps=EPS, queries=30, seed=0)
    assert torch.equal(square(model, x, y), square(lambda x: net(x), x, y))
    found = run_attacks(model, x, y, ["square"], eps=EPS)
    assert np.array_equal(found.masks["square"], run_attacks(net, x, y, ["square"], eps=EPS).masks["square"])
    assert any("white-box attacks were impossible" in w for w in found.warnings)


# --- no numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "right"),
    [
        ([3.0, 1.0, 2.0], True),
        ([1.0, 3.0, 2.0], False),
        ([torch.nan, 1.0, 2.0], False),  # where argmax is 0
        ([3.0, 1.0, torch.nan], False),
        ([torch.nan, torch.nan, torch.nan], False),
        ([torch.inf, 1.0, 2.0], False),
        ([-torch.inf, -torch.inf, -torch.inf], False),
    ],
)
def test_no_number_is_no_right_answer(logits: list[float], right: bool) -> None:
    assert correct(torch.tensor([logits]), torch.tensor([0])).tolist() == [right]


class Overflowing(nn.Module):
    """A network whose answer is NaN (in every logit, or in that of one class) wherever the image was touched."""

    def __init__(self, x: Tensor, value: float = torch.nan, at: int | None = None) -> None:
        super().__init__()
        self.net, self.value, self.at = small_net().eval(), value, at
        self.register_buffer("known", x)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        touched = (torch.cdist(x.flatten(1), self.known.flatten(1)).amin(1) > 0.02).unsqueeze(1)
        if self.at is not None:
            touched = touched & (torch.arange(logits.shape[1]) == self.at)
        return torch.where(touched, logits * 0 + self.value, logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [None, 0, 1])
def test_answers_that_are_no_numbers_count_as_broken_and_are_warned_of(value: float, at: int | None) -> None:
    x, _ = images(12)
    model = Overflowing(x, value, at)
    with torch.no_grad():
        y = model(x).argmax(1)
    names = ["fgsm", "pgd3", "pgd3-any", "cw", "aa", "square"]
    found = run_attacks(model, x, y, names, eps=0.1)
    assert found.masks["clean"].all()
    for name in names:
        assert not found.masks[name].any(), name
    assert any("NaN or infinity to adversarial versions of 12 images" in w for w in found.warnings)


def test_the_warning_of_nan_outlives_an_interruption(tmp_path: object) -> None:
    x, _ = images(12)
    model = Overflowing(x)
    with torch.no_grad():
        y = model(x).argmax(1)
    first = run_attacks(model, x, y, ["fgsm"], eps=0.1, state=str(tmp_path))
    again = run_attacks(model, x, y, ["fgsm"], eps=0.1, state=str(tmp_path))
    assert first.warnings == again.warnings != []


class Standardising(nn.Module):
    """Divides by the standard deviation of a patch, which on a flat patch has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net().eval()

    def forward(self, x: Tensor) -> Tensor:
        patch = x[:, :, :2, :2].flatten(1)
        deviation = (patch - patch.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        return self.net(x) * (1 + deviation)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_no_numbers_do_not_lead_out_of_them(norm: str) -> None:
    """A start on a flat patch has a NaN gradient: the attack goes on from there, and the evaluation says so."""
    x, _ = images(12)
    x[:6, :, :2, :2] = 0.5
    model = Standardising()
    with torch.no_grad():
        y = model(x).argmax(1)
    attacks: list[Attack] = [
        FGSM(norm=norm),  # type: ignore[arg-type]
        PGD(norm=norm, random_start=False, steps=3),  # type: ignore[arg-type]
        APGD(norm=norm, random_start=False, steps=3),  # type: ignore[arg-type]
        FAB(norm=norm, steps=3),  # type: ignore[arg-type]
        CWL2(steps=3),
        AutoAttack(norm=norm, seed=0),  # type: ignore[arg-type]
    ]
    for attack in attacks:
        assert attack(model, x, y).isfinite().all(), attack
    found = run_attacks(model, x, y, ["fgsm"], eps=0.1)
    assert any("gradients are NaN or infinite on 50% of images" in w for w in found.warnings)
