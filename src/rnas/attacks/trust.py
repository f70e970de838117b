"""Reasons to distrust an evaluation: each check returns a warning that a person can act on, or None."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnas.attacks.gradient import PGD, ascent_direction
from rnas.attacks.losses import correct, cross_entropy, margin
from rnas.attacks.norms import Norm
from rnas.frozen import Model

IMAGES = 64  # as many are looked at
WHITE_BOX = ("pgd", "cw", "apgd", "fab")  # beginnings of their names; FGSM is too weak to be compared with


@torch.no_grad()
def softmaxed(model: Model, x: Tensor) -> str | None:
    """Outputs that are probabilities: cross-entropy then takes the softmax twice, and gradients shrink."""
    outputs = model(x)
    if float(outputs.min()) >= 0 and bool(((outputs.sum(1) - 1).abs() < 1e-3).all()):
        return "outputs are probabilities, not logits: attack the network without its softmax"
    return None


@torch.no_grad()
def randomised(model: Model, x: Tensor) -> str | None:
    """Two answers to the same images that differ: gradients are noise, and a verdict is luck."""
    first, second = model(x), model(x)
    if bool(((first - second).abs() > 1e-4 * (1 + first.abs())).any()):
        return "the model is randomised: the same images get different logits; attack its average over many passes"
    return None


def vanishing_gradients(net: Model, x: Tensor, y: Tensor) -> str | None:
    """Gradients with nothing to follow: a zero cross-entropy gradient, or a margin that no change of x could close.

    The second, to first order: even if every pixel moved by 1 the margin would change by less than a thousandth.
    Gradients that are no numbers are worse still.
    """
    by_loss, _ = ascent_direction(net, x, y, cross_entropy)
    by_margin, logits = ascent_direction(net, x, y, margin)
    lost = ~(by_loss + by_margin).flatten(1).isfinite().all(1)
    if lost.any():
        return (
            f"gradients are NaN or infinite on {float(lost.float().mean()):.0%} of images, which leaves white-box "
            "attacks little to follow: mend the operation (a norm, a root, a division) that has no gradient there"
        )
    zero = by_loss.flatten(1).abs().amax(1) == 0
    flat = by_margin.flatten(1).abs().sum(1) <= 1e-3 * margin(logits, y).abs()
    share = float((zero | flat).float().mean())
    if share > 0.02:
        return (
            f"gradients vanish on {share:.0%} of images: white-box attacks have nothing to follow (gradient masking); "
            "trust square more than them"
        )
    return None


def black_box_wins(known: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> str | None:
    """Square breaks what no white-box attack broke. `known`: per attack, images tried and images that still stand."""
    white = [name for name in known if name.startswith(WHITE_BOX) and name != "cw-l2"]
    if "square" not in known or not white:
        return None
    tried, standing = known["square"]
    won = tried & ~standing
    for name in white:
        won &= known[name][0] & known[name][1]
    n, most = int(won.sum()), 0.005 * len(won)
    if n > max(1, most):
        return f"square, a black-box attack, breaks {n} images that no white-box attack broke: gradients may be masked"
    return None


def answers_nan(images: int) -> str | None:
    """Images on whose adversarial versions the model answers NaN or infinity. `images`: how many."""
    if images == 0:
        return None
    return (
        f"the model answers NaN or infinity to adversarial versions of {images} images, which count as broken but say "
        "little of its robustness: mend the operation that overflows, or divides by 0, and evaluate anew"
    )


def insensitive_to_eps(net: Model, x: Tensor, y: Tensor, *, eps: float, norm: Norm) -> str | None:
    """Survivors `x` that still hold at a radius so large that every image can become plain grey."""
    if len(x) == 0:
        return None
    large = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5
    if eps >= large:
        return None
    x_adv = PGD(eps=large, step=large / 8, steps=20, loss="margin", norm=norm, any_iterate=True, seed=0).perturb(
        net, x, y
    )
    with torch.no_grad():
        holds = float(correct(net(x_adv), y).float().mean())
    if holds > 0.3:
        return (
            f"accuracy does not fall as eps grows: {holds:.0%} of the survivors hold even at eps = {large:g}, where an "
            "image can lose all its content: the attacks fail, the model is not robust"
        )
    return None
