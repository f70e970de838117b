"""Adversarial attacks on any callable from images (B,3,H,W) in [0,1] to logits (B,classes).

Each attack is a frozen dataclass: `attack = PGD(eps=8/255, steps=20, seed=0)`, then `attack(model, x, y)` returns the
adversarial images. Training loops, which check their images once, call `attack.perturb(net, x, y)` under
`with frozen(model) as net`. `rnas.evaluation.battery.run_attacks` runs attacks by name on a whole test set.
"""

from rnas.attacks.apgd import APGD
from rnas.attacks.autoattack import AutoAttack
from rnas.attacks.base import Attack
from rnas.attacks.cw_l2 import CWL2
from rnas.attacks.fab import FAB
from rnas.attacks.gradient import CW, FGSM, PGD
from rnas.attacks.square import Square

__all__ = [
    "APGD",
    "CW",
    "CWL2",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Square",
]
