"""AutoAttack `standard`: APGD-CE, APGD-T, FAB-T and Square, each on what the ones before left (Croce & Hein 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnas.attacks.apgd import APGD
from rnas.attacks.base import Attack
from rnas.attacks.checks import check_threat, plain_numbers
from rnas.attacks.fab import FAB
from rnas.attacks.losses import correct
from rnas.attacks.noise import derived_seed
from rnas.attacks.norms import Norm
from rnas.attacks.square import Square
from rnas.compute.freezing import Model


def member(name: str, eps: float, norm: Norm, seed: int | None, rows: int | None = None) -> Attack:
    """AutoAttack's part `name` with its standard settings; `rows`: the most images in one pass, where few are left."""
    seed = derived_seed(seed, name)
    match name:
        case "apgd-ce":
            return APGD(eps=eps, norm=norm, loss="ce", seed=seed, rows=rows)
        case "apgd-dlr":
            return APGD(eps=eps, norm=norm, loss="dlr", seed=seed, rows=rows)
        case "apgd-margin":
            return APGD(eps=eps, norm=norm, loss="margin", seed=seed, rows=rows)
        case "apgd-t":
            return APGD(eps=eps, norm=norm, loss="dlr-targeted", seed=seed, rows=rows)
        case "fab-t":
            return FAB(eps=eps, norm=norm, seed=seed, rows=rows)
        case "square":
            return Square(eps=eps, norm=norm, seed=seed, rows=rows)
    raise KeyError(name)


MEMBERS = ("apgd-ce", "apgd-dlr", "apgd-margin", "apgd-t", "fab-t", "square")


def standard(classes: int) -> tuple[str, ...]:
    """The parts of AutoAttack `standard`. DLR needs 3 classes: with 2, APGD on the margin takes APGD-T's place."""
    return ("apgd-ce", "apgd-t" if classes > 2 else "apgd-margin", "fab-t", "square")


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack `standard`; images that hold against all four attacks are returned as they are."""

    eps: float = 8 / 255
    norm: Norm = "linf"
    seed: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_threat(self.eps, self.norm)

    def perturb(self, net: Model, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images; inputs unchecked, `net` frozen."""
        with torch.no_grad():
            logits = net(x)
        result, alive = x.clone(), correct(logits, y).nonzero().squeeze(1)
        for name in standard(logits.shape[1]):
            if len(alive) == 0:
                break
            x_adv = member(name, self.eps, self.norm, self.seed).perturb(net, x[alive], y[alive])
            with torch.no_grad():
                standing = correct(net(x_adv), y[alive])
            result[alive[~standing]] = x_adv[~standing]
            alive = alive[standing]
        return result
