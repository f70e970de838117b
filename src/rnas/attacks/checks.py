"""What is refused before the first attack step."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rnas.compute.freezing import Model
from rnas.errors import RnasError, out_of_memory, unknown

NORMS = ("linf", "l2")
FLOATS = (torch.float32, torch.float64)
ROUNDING = 1e-4
"""Images that leave [0,1] by no more are clamped: a fortieth of a step of 1/255, some hundred roundings of float32."""


def plain_numbers(attack: Any) -> None:
    """Make Python's own numbers of those in a frozen dataclass: NumPy's, and fractions, fit neither torch nor JSON."""
    for field in fields(attack):
        value = getattr(attack, field.name)
        if isinstance(value, Real) and type(value).__module__ != "builtins":
            object.__setattr__(attack, field.name, int(value) if isinstance(value, Integral) else float(value))


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. RnasError, by the `name` it goes by, unless it is a whole number, and `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        expected = "a whole number" if least is None else f"a whole number, {least} or more"
        raise RnasError(f"{name} is {value}: expected {expected}")
    return int(value)


def check_threat(eps: float, norm: str) -> float:
    """`eps` as a float. RnasError unless (`eps`, `norm`) is a threat model."""
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise RnasError(f"eps is {eps!r}: expected a number, such as {'8/255' if norm == 'linf' else '0.5'}")
    eps = float(eps)
    if not (math.isfinite(eps) and eps > 0):
        raise RnasError(f"eps is {eps:g}: expected a radius above 0, such as {'8/255' if norm == 'linf' else '0.5'}")
    if norm == "linf" and eps > 1:
        raise RnasError(
            f"eps is {eps:g}: images lie in [0,1], so an l_inf radius is at most 1; did you mean {eps:g}/255?"
        )
    return eps


def check_images(x: Tensor, y: Tensor) -> Tensor:
    """The images `x` (B,C,H,W), detached and within [0,1]. RnasError unless they are images, and `y` (B,) their labels.

    What leaves [0,1] by a rounding is clamped.
    """
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise RnasError(f"{name} are a {type(value).__name__}: expected a torch.Tensor")
    if x.dim() != 4 or len(x) == 0 or x.dtype not in FLOATS:
        raise RnasError(f"images are {_described(x)}: expected float32 or float64 (B,C,H,W) with at least one image")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise RnasError(f"labels are {_described(y)}: expected int64 ({len(x)},), one for each image")
    x = x.detach()
    low, high = (float(v) for v in torch.aminmax(x))
    beyond = max(-low, high - 1)
    if not beyond <= ROUNDING:  # also catches NaN
        raise RnasError(
            f"images lie in [{low:.6g}, {high:.6g}], {beyond:.2g} beyond [0,1] (up to {ROUNDING:g} is taken for "
            "rounding): normalise inside the model, not before it"
        )
    return x.clamp(0, 1) if beyond > 0 else x


def answer(model: Model, x: Tensor) -> Tensor:
    """The model's answer to images `x`, without a graph. RnasError if it cannot take such images."""
    try:
        with torch.no_grad():
            return model(x)
    except RnasError:
        raise
    except Exception as e:  # a foreign model may raise anything
        raise out_of_memory(e) or RnasError(
            f"the model fails on images that are {_described(x)} on {x.device} ({_first_line(e)}): "
            "expected images of its own type, size and device"
        ) from e


def check_alone(model: Model, x: Tensor, y: Tensor) -> None:
    """RnasError unless the model, which answers several images `x` of labels `y`, also answers one."""
    try:
        check_logits(answer(model, x[:1]), y[:1])
    except RnasError as e:
        raise RnasError(
            f"attacks also ask about one image alone, and there {e} (a squeeze() that drops the batch? batch "
            "normalisation in train mode?)"
        ) from e


def check_gradient(model: Model, x: Tensor, attacks: str) -> None:
    """RnasError, naming the `attacks` that need one, unless a gradient leads from the model's answer back to `x`."""
    if missing := missing_gradient(model, x):
        raise RnasError(f"{attacks}: gradients are needed, but {missing}; only square attacks such a model")


def missing_gradient(model: Model, x: Tensor) -> str | None:
    """Why no gradient leads from the model's answer back to the images; None if one does. Asks about two images."""
    with torch.enable_grad():
        x = x[:2].detach().clone().requires_grad_()
        try:
            logits = model(x)
            gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
        except Exception as e:  # a foreign model may raise anything
            if error := out_of_memory(e):
                raise error from e
            return f"the model has none to give ({_first_line(e)})"
    return "the model's answer is cut off from the images" if gradient is None else None


def check_logits(logits: object, y: Tensor) -> Tensor:
    """`logits`, the model's answer to images of labels `y`. RnasError unless finite floats (B,K), K > labels."""
    if not isinstance(logits, Tensor):
        raise RnasError(f"the model returns a {type(logits).__name__}: expected logits, a tensor ({len(y)},classes)")
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        raise RnasError(f"the model returns {_described(logits)} for {_images(len(y))}: expected ({len(y)},classes)")
    if logits.device != y.device:
        raise RnasError(f"the model answers on {logits.device}: expected logits on {y.device}, as the images are")
    if logits.dtype not in FLOATS:
        raise RnasError(f"the model returns {_described(logits)}: expected float32 or float64 logits")
    if not bool(logits.isfinite().all()):
        broken = int((~logits.isfinite().all(1)).sum())
        raise RnasError(f"the model returns NaN or infinite logits for {broken} of {len(y)} clean images")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= logits.shape[1]:
        raise RnasError(f"labels run from {low} to {high}: the model knows the classes 0 to {logits.shape[1] - 1}")
    return logits


def check_classes(logits: Tensor, needed: int, what: str) -> None:
    """RnasError if there are fewer classes than `what` is defined for."""
    if logits.shape[1] < needed:
        raise RnasError(
            f"{what} needs {needed} classes or more, the model has {logits.shape[1]}: use ce, cw, fab-t or square"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _images(n: int) -> str:
    return "1 image" if n == 1 else f"{n} images"


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def check_positive(owner: str, **numbers: float) -> None:
    """RnasError naming the first of `numbers` that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise RnasError(f"{owner}'s {name} is {value:g}: expected a number above 0")
