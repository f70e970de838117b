"""What is refused before the first attack step."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from rnas.errors import RnasError, unknown
from rnas.frozen import Model

NORMS = ("linf", "l2")
FLOATS = (torch.float32, torch.float64)


def check_threat(eps: float, norm: str) -> None:
    """RnasError unless (`eps`, `norm`) is a threat model."""
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise RnasError(f"eps is {eps!r}: expected a number, such as {'8/255' if norm == 'linf' else '0.5'}")
    if not (math.isfinite(eps) and eps > 0):
        raise RnasError(f"eps is {eps:g}: expected a radius above 0, such as {'8/255' if norm == 'linf' else '0.5'}")
    if norm == "linf" and eps > 1:
        raise RnasError(
            f"eps is {eps:g}: images lie in [0,1], so an l_inf radius is at most 1; did you mean {eps:g}/255?"
        )


def check_images(x: Tensor, y: Tensor) -> None:
    """RnasError unless `x` (B,C,H,W) are images in [0,1] and `y` (B,) their labels."""
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise RnasError(f"{name} are a {type(value).__name__}: expected a torch.Tensor")
    if x.dim() != 4 or len(x) == 0 or x.dtype not in FLOATS:
        raise RnasError(f"images are {_described(x)}: expected float32 or float64 (B,C,H,W) with at least one image")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise RnasError(f"labels are {_described(y)}: expected int64 ({len(x)},), one for each image")
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise RnasError(f"images lie in [{low:g}, {high:g}]: expected [0,1]; normalise inside the model, not before it")


def answer(model: Model, x: Tensor) -> Tensor:
    """The model's answer to images `x`, without a graph. RnasError if it cannot take such images."""
    try:
        with torch.no_grad():
            return model(x)
    except torch.OutOfMemoryError:
        raise  # says itself what to do
    except RuntimeError as e:
        raise RnasError(
            f"the model fails on images that are {_described(x)} on {x.device} ({_first_line(e)}): "
            "expected images of its own type, size and device"
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
        except RuntimeError as e:
            return f"the model has none to give ({_first_line(e)})"
    return "the model's answer is cut off from the images" if gradient is None else None


def check_logits(logits: object, y: Tensor) -> Tensor:
    """`logits`, the model's answer to images of labels `y`. RnasError unless finite floats (B,K), K > labels."""
    if not isinstance(logits, Tensor):
        raise RnasError(f"the model returns a {type(logits).__name__}: expected logits, a tensor ({len(y)},classes)")
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        raise RnasError(f"the model returns {_described(logits)} for {len(y)} images: expected ({len(y)},classes)")
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
    return str(error).partition("\n")[0]


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def check_positive(owner: str, **numbers: float) -> None:
    """RnasError naming the first of `numbers` that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise RnasError(f"{owner}'s {name} is {value:g}: expected a number above 0")
