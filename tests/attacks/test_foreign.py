"""Models as people bring them: in train mode behind a lambda, working in place, frozen, squeezing, raising."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.test_battery import EPS, fitted, quick
from torch import Tensor, nn

import rnas
from rnas.attacks import APGD, CW, CWL2, FAB, FGSM, PGD, Attack, AutoAttack, Square
from rnas.compute.freezing import Model
from rnas.errors import RnasError
from rnas.evaluation.battery import run_attacks

__all__ = ["quick"]  # a fixture: AutoAttack with few steps


def normed() -> nn.Module:
    """A small network with batch normalisation that has seen some images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    net(torch.rand(64, 3, 8, 8))
    return net


def labelled(model: Model) -> tuple[Tensor, Tensor]:
    """24 images, labelled as the model answers them together."""
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


# --- answers that hang on the images beside ---------------------------------------------------------------------------


def without_statistics(net: nn.Module) -> Model:
    for module in net.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return net


class Hiding(nn.Module):
    """A module that keeps another out of torch's sight."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.nets = [net]

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](x)  # type: ignore[no-any-return]


DEPENDENT: list[Callable[[nn.Module], Model]] = [
    lambda net: lambda x: net(x),
    lambda net: net.forward,
    lambda net: functools.partial(net),
    lambda net: functools.partial(Hiding(net)),
    without_statistics,
    lambda net: lambda x: net.eval()(x - x.mean(0)),
    lambda net: lambda x: net.eval()(x / x.amax()) * len(x),
]


@pytest.mark.parametrize("batch_size", [1, 24])
@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_model_that_looks_at_the_images_beside_is_warned_of_and_left_as_it_was(
    kind: Callable[[nn.Module], Model], batch_size: int
) -> None:
    net = normed().train()
    model = kind(net)
    x, y = labelled(model)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training = [module.training for module in net.modules()]
    found = run_attacks(model, x, y, ["fgsm"], eps=EPS, batch_size=batch_size)
    assert any("images beside" in w for w in found.warnings)
    PGD(eps=EPS, steps=2)(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == training


@pytest.mark.parametrize(
    "kind",
    [
        lambda net: net,
        lambda net: lambda x: net.eval()(x),
        lambda net: lambda x: net.eval()(x) * 1e6,
        lambda net: lambda x: net.eval()(x - x.mean((1, 2, 3), keepdim=True)),
        lambda net: lambda x: net.eval().bfloat16()(x.bfloat16()).float(),
        lambda net: nn.Sequential(nn.GroupNorm(3, 3), net),
    ],
)
def test_a_model_that_answers_each_image_by_itself_is_not(kind: Callable[[nn.Module], Model]) -> None:
    model = kind(normed().eval())
    found = run_attacks(model, *labelled(model), ["square"], eps=EPS)
    assert not any("images beside" in w or "randomised" in w for w in found.warnings)


def test_buffers_that_a_model_replaces_are_put_back() -> None:
    class Averaging(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("mean", torch.zeros(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3)).view(3, 1, 1)
            return self.net(x)  # type: ignore[no-any-return]

    model = Averaging(normed().eval())
    x, y = labelled(model)
    before = model.mean
    run_attacks(lambda x: model(x), x, y, ["fgsm"], eps=EPS)
    assert model.mean is before


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(eps=EPS),
        PGD(eps=EPS, steps=3, seed=0),
        PGD(eps=EPS, steps=3, seed=0, any_iterate=True),
        CW(eps=EPS, steps=3, seed=0),
        CWL2(steps=3),
        APGD(eps=EPS, steps=3, seed=0),
        FAB(eps=EPS, steps=3, seed=0),
        Square(eps=EPS, queries=20, seed=0),
        AutoAttack(eps=EPS, seed=0),
    ],
    ids=lambda a: type(a).__name__,
)
def test_a_model_that_works_in_place_gets_copies(attack: Attack) -> None:
    net, x, y = fitted()
    given = x.clone()
    x_adv = attack(lambda x: net(x.mul_(0.5).add_(0.25)), x, y)
    assert torch.equal(x, given)
    assert torch.equal(x_adv, attack(lambda x: net(x.mul(0.5).add(0.25)), x, y))


# --- models that refuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [AssertionError, AssertionError("size"), ValueError("size"), KeyError("k"), Exception]
)
def test_whatever_a_model_raises_becomes_a_sentence_before_the_first_step(error: Exception, tmp_path: Path) -> None:
    _, x, y = fitted()

    def model(x: Tensor) -> Tensor:
        raise error

    for attack in (PGD(steps=1), Square(queries=1)):
        with pytest.raises(RnasError, match="the model fails on images"):
            attack(model, x, y)
    with pytest.raises(RnasError, match="the model fails on images"):
        run_attacks(model, x, y, ["fgsm"], eps=EPS, state=tmp_path, progress=pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [8, 23])
def test_a_model_that_squeezes_its_answer_is_asked_about_one_image_first(batch_size: int) -> None:
    net, x, y = fitted()
    for names in (["pgd3"], ["apgd-ce"], ["square"]):
        with pytest.raises(RnasError, match="one image alone"):
            run_attacks(lambda x: net(x).squeeze(), x, y, names, eps=EPS, batch_size=batch_size, progress=pytest.fail)


@pytest.mark.parametrize("message", ["could not create a primitive", "[enforce fail] can't allocate memory: 4 TB"])
def test_memory_that_is_lacking_is_not_blamed_on_the_images(message: str) -> None:
    def model(x: Tensor) -> Tensor:
        raise RuntimeError(message)

    with pytest.raises(RnasError, match="out of memory"):
        run_attacks(model, *labelled(normed()), ["fgsm"], eps=EPS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_frozen_torchscript_is_a_callable_like_others(tmp_path: Path) -> None:
    net, x, y = fitted()
    script = torch.jit.freeze(torch.jit.script(net))  # type: ignore[no-untyped-call]
    wanted = run_attacks(net, x, y, ["pgd3", "cw-l2"], eps=EPS).masks
    for model in (script, nn.Sequential(script)):
        found = run_attacks(model, x, y, ["pgd3", "cw-l2"], eps=EPS, state=tmp_path / type(model).__name__)
        assert all(np.array_equal(found.masks[name], wanted[name]) for name in wanted)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_may_be_numpys_or_fractions(tmp_path: Path) -> None:
    net, x, y = fitted()
    wanted = rnas.evaluate(net, x, y, ["pgd3", "aa"], eps=1 / 64, seed=3, batch_size=7).masks
    for number, eps in enumerate((np.float32(1 / 64), np.float64(1 / 64), np.float16(1 / 64), Fraction(1, 64))):
        found = rnas.evaluate(
            net, x, y, ["pgd3", "aa"], eps=eps, seed=np.int64(3), batch_size=np.int32(7), state=tmp_path / str(number)
        )
        assert all(np.array_equal(found.masks[name], wanted[name]) for name in wanted)
        assert json.loads(json.dumps(found.summary))["eps"] == 1 / 64
        for kind in (FGSM, PGD, CW, APGD, FAB, Square, AutoAttack):
            assert kind(eps=eps) == kind(eps=1 / 64)
            assert type(kind(eps=eps).eps) is float
    assert PGD(step=Fraction(1, 64), steps=np.int64(2), seed=np.int64(3)) == PGD(step=1 / 64, steps=2, seed=3)
    for wrong in ({"seed": 1.5}, {"batch_size": 0}, {"batch_size": 2.5}, {"batch_size": True}):
        with pytest.raises(RnasError, match="expected a whole number"):
            rnas.evaluate(net, x, y, ["fgsm"], **wrong)  # type: ignore[arg-type]


def test_the_default_dtype_of_the_host_changes_no_verdict() -> None:
    net, x, y = fitted()
    names = ["fgsm", "pgd3", "cw-l2", "aa", "square"]
    wanted = run_attacks(net, x, y, names, eps=EPS).masks
    torch.set_default_dtype(torch.float64)
    try:
        found = run_attacks(net, x, y, names, eps=EPS).masks
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(np.array_equal(found[name], wanted[name]) for name in names)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
def test_compiled_models_are_asked_as_they_are() -> None:
    """The hook that listens for modules at first would be too much for a graph without breaks."""
    net, x, y = fitted()
    compiled = torch.compile(lambda x: net(x), backend="eager", fullgraph=True)
    assert np.array_equal(
        run_attacks(compiled, x, y, ["fgsm"], eps=EPS).masks["fgsm"],
        run_attacks(net, x, y, ["fgsm"], eps=EPS).masks["fgsm"],
    )


@pytest.mark.parametrize(("low", "high"), [(-3e-8, 1.0), (0.0, 1 + 2.4e-7), (-1e-5, 1 + 1e-5)])
def test_images_that_leave_the_box_by_a_rounding_are_clamped(low: float, high: float) -> None:
    net, x, y = fitted()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = low, high
    given = x.clone()
    x_adv = PGD(eps=EPS, steps=1)(net, x, y)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    found = run_attacks(net, x, y, ["fgsm"], eps=EPS).masks["fgsm"]
    assert np.array_equal(found, run_attacks(net, x.clamp(0, 1), y, ["fgsm"], eps=EPS).masks["fgsm"])
    assert torch.equal(x, given)


@pytest.mark.parametrize(("value", "told"), [(1.01, "0.01"), (-0.25, "0.25"), (torch.inf, "inf"), (torch.nan, "nan")])
def test_images_beyond_a_rounding_are_refused_and_told_by_how_much(value: float, told: str) -> None:
    net, x, y = fitted()
    x[3, 1, 2, 2] = value
    with pytest.raises(RnasError, match=rf"{told} beyond \[0,1\]"):
        run_attacks(net, x, y, ["fgsm"], eps=EPS)


# --- chance -----------------------------------------------------------------------------------------------------------


def answering(predicted: list[int], classes: int = 4) -> tuple[Model, Tensor]:
    """A model that gives the images which it is asked about, known by their first pixel, these answers."""
    answers = 10 * torch.eye(classes)[torch.tensor(predicted)]
    x = torch.full((len(predicted), 3, 4, 4), 0.5)
    x[:, 0, 0, 0] = torch.linspace(0, 1, len(predicted))

    def model(x: Tensor) -> Tensor:
        at = (x[:, 0, 0, 0].detach() * (len(predicted) - 1)).round().long()
        return answers[at] + 0 * x.sum((1, 2, 3)).unsqueeze(1)

    return model, x


@pytest.mark.parametrize(
    ("predicted", "labels", "chance", "warned"),
    [
        ([0] * 40, [0, 1, 2, 3] * 10, 0.25, "answers class 0"),  # one class, as right as chance
        ([0] * 39 + [3], [0, 1, 2, 3] * 10, 0.25, "answers class 0"),  # nearly one
        ([0, 1, 2, 3] * 10, [0, 1, 2, 3] * 10, 0.25, None),
        ([0, 0, 0, 3] * 10, [1, 0, 2, 3] * 10, 0.25, None),  # half right: above chance
        ([0, 1, 2, 3] * 10, [0, 2, 3, 1] * 10, 0.25, "above chance"),
        ([0] * 38 + [1] * 2, [0] * 38 + [1] * 2, 0.95, "above chance"),  # too few others to tell
        ([0] * 300 + [1] * 20, [0] * 300 + [1] * 20, 0.9375, None),  # few of the others, all found
        ([0] * 320, [0] * 300 + [1] * 20, 0.9375, "answers class 0"),
        ([2] * 40, [2] * 40, 1.0, "all images are of class 2"),
    ],
)
def test_chance_is_told_and_what_is_no_better_is_warned_of(
    predicted: list[int], labels: list[int], chance: float, warned: str | None
) -> None:
    model, x = answering(predicted)
    summary = rnas.evaluate(model, x, torch.tensor(labels), ["fgsm"], eps=1 / 4096).summary
    assert summary["chance"] == chance
    about = [w for w in summary["warnings"] if "chance" in w or "all images are" in w]
    assert [warned in w for w in about] == ([True] if warned else [])
    if warned and warned.startswith("answers"):  # its flat gradients and sturdy survivors accuse nobody
        assert len(summary["warnings"]) == 1


# --- the union --------------------------------------------------------------------------------------------------------


def test_the_union_is_of_the_attacks_in_the_ball() -> None:
    net, x, y = fitted()
    found = rnas.evaluate(net, x, y, ["pgd3", "cw-l2", "fgsm"], eps=EPS / 50)
    assert found.robust("cw-l2") < found.robust("pgd3")
    both = found.masks["pgd3"] & found.masks["fgsm"]
    assert found.summary["union"]["accuracy"] == both.mean()
    assert "union" not in rnas.evaluate(net, x, y, ["cw-l2"], eps=EPS).summary
