"""Reasons to distrust an evaluation: each check returns a warning that a person can act on, or None."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnas.attacks.gradient import PGD, ascent_direction
from rnas.attacks.losses import correct, cross_entropy, margin
from rnas.attacks.norms import Norm
from rnas.compute.freezing import Model

IMAGES = 64  # as many are looked at
WHITE_BOX = ("pgd", "cw", "apgd", "fab", "aa")  # beginnings of their names; FGSM is too weak to be compared with
BY_CROSS_ENTROPY = ("pgd", "apgd-ce")  # of these, the ones that follow cross-entropy


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
    if _differ(model(x), model(x)):
        return (
            "the model is randomised: the same images get different logits (dropout in train mode? call eval()); "
            "attack its average over many passes"
        )
    return None


@torch.no_grad()
def depends_on_neighbours(model: Model, x: Tensor) -> str | None:
    """Answers to images `x` that change with the images beside them: figures then change with the batch size.

    Other neighbours in a batch of the same size change nothing in any other model, whatever precision it works in. An
    image alone may take another path through a library, whose rounding does not count.
    """
    among, beside_others = (model(torch.cat([x, others]))[: len(x)] for others in (x, 1 - x))
    alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    if _differ(among, beside_others) or bool((among - alone).abs().max() > 0.05 * among.abs().max()):
        return (
            "the model's answers depend on the images beside them, so that all figures change with the batch size: "
            "likely batch normalisation in train mode (call eval()) or without running statistics, or a mean over the "
            "batch; attack a model that answers about each image by itself"
        )
    return None


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two answers to the same images differ by more than rounding."""
    return bool(((one - other).abs() > 1e-4 * (1 + one.abs())).any())


def chance(y: NDArray[np.int64]) -> float:
    """The accuracy of always answering the largest class: its share among the labels `y` (N,)."""
    return float(np.bincount(y).max() / len(y))


def above_chance(right: float, by_chance: float, n: int) -> bool:
    """Whether an accuracy on `n` images is above chance: Wilson's 95 % interval lies over it."""
    return right - by_chance > 1.96 * math.sqrt(by_chance * (1 - by_chance) / n)


def answers_one_class(predicted: NDArray[np.int64], y: NDArray[np.int64]) -> str | None:
    """Answers (N,) that are (nearly) all the same: of what labels (N,) lie outside the largest class, a tenth as many.

    Such a network cannot be attacked away from its answer, which looks like robustness.
    """
    given = np.bincount(predicted)
    share, by_chance = given.max() / len(y), chance(y)
    if by_chance == 1 or 1 - share > 0.1 * (1 - by_chance):
        return None
    return (
        f"the model answers class {given.argmax()} to {share:.1%} of the images and has learnt nothing that could be "
        f"robust: it is right about {np.mean(predicted == y):.1%}, and chance is {by_chance:.1%}, the share of the "
        "largest class"
    )


def not_above_chance(predicted: NDArray[np.int64], y: NDArray[np.int64]) -> str | None:
    """An accuracy that always answering the largest class could reach too, as far as so many images can tell."""
    right, by_chance = float(np.mean(predicted == y)), chance(y)
    if by_chance == 1:
        return f"all images are of class {y[0]}: whoever always answers that is right; take images of every class"
    if above_chance(right, by_chance, len(y)):
        return None
    return (
        f"a clean accuracy of {right:.1%} on {len(y)} images is not shown to be above chance, {by_chance:.1%} (the "
        "share of the largest class): of a network that has learnt nothing, figures under attack say nothing; train it "
        "longer, or take more images"
    )


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
    if share > 0.02 and not flat.any():
        return (
            f"gradients vanish on {share:.0%} of images for cross-entropy, whose softmax saturates: fgsm, pgd and "
            "apgd-ce have nothing to follow there; run cw or aa, which follow the logits"
        )
    if share > 0.02:
        return (
            f"gradients vanish on {share:.0%} of images: white-box attacks have nothing to follow (gradient masking); "
            "trust square more than them"
        )
    return None


def black_box_wins(known: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> str | None:
    """Square breaks what no white-box attack broke. `known`: per attack, images tried and images that still stand.

    It is a reason to suspect the gradients only where an attack that follows the logits failed as well: cross-entropy
    is a weak guide on many honest networks.
    """
    white = [name for name in known if name.startswith(WHITE_BOX) and name != "cw-l2"]
    if "square" not in known or not white:
        return None
    tried, standing = known["square"]
    won = tried & ~standing
    for name in white:
        won &= known[name][0] & known[name][1]
    n, most = int(won.sum()), 0.005 * len(won)
    if n <= max(1, most):
        return None
    found = f"square, a black-box attack, breaks {n} images that {', '.join(white)} left"
    if all(name.startswith(BY_CROSS_ENTROPY) for name in white):
        return f"{found}: run aa, which tells whether cross-entropy is a weak guide here or gradients are masked"
    return f"{found}, though not by cross-entropy alone: gradients may be masked; attack what they see badly adaptively"


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
