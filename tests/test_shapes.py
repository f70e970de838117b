"""The shapes that docstrings promise: each public function of attacks, losses, norms and vulnerability keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor, nn

from rnas import attacks, vulnerability
from rnas.attacks import losses, norms

# All different, so that a transposition shows. T: targets.
SIZES = {"B": 2, "C": 3, "H": 8, "W": 12, "K": 5, "T": 4}

IMAGES, NORMS, LOGITS = Float[Tensor, "B C H W"], Float[Tensor, "B 1 1 1"], Float[Tensor, "B K"]
LABELS, PER_IMAGE, PER_CHANNEL, SCALAR = Int[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "C"], Float[Tensor, ""]

FUNCTIONS: list[tuple[Callable[..., Any], list[Any], Any]] = [
    (losses.cross_entropy, [LOGITS, LABELS], PER_IMAGE),
    (losses.margin, [LOGITS, LABELS], PER_IMAGE),
    (losses.dlr, [LOGITS, LABELS], PER_IMAGE),
    (losses.targeted_dlr, [LOGITS, LABELS, LABELS], PER_IMAGE),
    (losses.correct, [LOGITS, LABELS], Bool[Tensor, "B"]),
    (losses.ranked, [LOGITS, LABELS, SIZES["T"]], Int[Tensor, "B T"]),
    (losses.of, [LOGITS, LABELS], PER_IMAGE),
    (losses.best_other, [LOGITS, LABELS], PER_IMAGE),
    *((function, [IMAGES, *more], returns) for function, more, returns in [
        (norms.l2, [], NORMS),
        (norms.unit, [], IMAGES),
        *((norms.distance, [IMAGES, norm], PER_IMAGE) for norm in ("linf", "l2")),
        *((norms.project, [IMAGES, 0.1, norm], IMAGES) for norm in ("linf", "l2")),
        *((norms.steepest, [norm], IMAGES) for norm in ("linf", "l2")),
        *((norms.random_point, [0.1, norm, seed], IMAGES) for norm in ("linf", "l2") for seed in (None, 0)),
    ]),
    (vulnerability.channel_vulnerability, [IMAGES, IMAGES], PER_CHANNEL),
    (vulnerability.layer_vulnerability, [IMAGES, IMAGES], SCALAR),
    (vulnerability.network_vulnerability, [[IMAGES], [IMAGES]], SCALAR),
]  # fmt: skip

ATTACKS = [
    attacks.FGSM(),
    attacks.PGD(steps=2),
    attacks.PGD(steps=2, any_iterate=True, norm="l2", eps=0.5),
    attacks.CW(steps=2),
    attacks.CWL2(steps=2),
    attacks.APGD(steps=2, loss="dlr-targeted"),
    attacks.FAB(steps=2),
    attacks.Square(queries=4),
]


def example(of: Any, dtype: torch.dtype) -> Any:
    """An argument of the annotated shape; a plain value is its own example."""
    if isinstance(of, list):
        return [example(one, dtype) for one in of]
    if not hasattr(of, "dim_str"):
        return of
    shape = [SIZES.get(size) or int(size) for size in of.dim_str.split()]
    return torch.rand(shape, dtype=dtype) if of.dtype is Float else torch.randint(SIZES["K"], shape)


def name_of(value: Any) -> str | None:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("function", "takes", "returns"), FUNCTIONS, ids=name_of)
def test_a_function_returns_the_shape_it_promises(
    function: Callable[..., Any], takes: list[Any], returns: Any, dtype: torch.dtype
) -> None:
    arguments = example(takes, dtype)
    with jaxtyped("context"):  # within, a letter is one size
        assert all(isinstance(a, t) for a, t in zip(arguments, takes, strict=True) if hasattr(t, "dim_str"))
        found = function(*arguments)
        assert isinstance(found, returns), (found.shape, found.dtype)
    assert not found.is_floating_point() or found.dtype == dtype


@pytest.mark.parametrize(("function", "takes", "returns"), FUNCTIONS, ids=name_of)
def test_the_documentation_names_the_shapes(function: Callable[..., Any], takes: list[Any], returns: Any) -> None:
    """In the docstring of the function, or in that of its module for all its functions."""
    told = f"{function.__doc__} {inspect.getmodule(function).__doc__}"
    for annotation in [*takes, returns]:
        sizes = getattr(annotation, "dim_str", "").split()
        if sizes:
            assert f"({','.join(sizes)}{',' if len(sizes) == 1 else ''})" in told


@pytest.mark.parametrize("module", [losses, norms, vulnerability])
def test_no_function_is_left_out(module: ModuleType) -> None:
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    public = {f.__name__ for f in functions if not f.__name__.startswith("_")}
    take_a_model = {"recorded", "layer_vulnerabilities", "image_vulnerabilities"}  # tests/test_vulnerability.py
    assert public <= {function.__name__ for function, _, _ in FUNCTIONS} | take_a_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_an_attack_returns_images_like_those_it_was_given(attack: attacks.Attack, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(SIZES["C"], 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(SIZES["K"])).to(dtype)
    x, y = example(IMAGES, dtype), example(LABELS, dtype)
    net(x)
    y = net(x).argmax(1)  # there is something to break
    with jaxtyped("context"):
        assert isinstance(x, IMAGES)
        x_adv = attack(net, x, y)
        assert isinstance(x_adv, IMAGES)
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad
