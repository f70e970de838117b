"""Adversarial attacks on any callable from images (B,3,H,W) in [0,1] to logits (B,classes).

Each attack is a frozen dataclass: `attack = PGD(eps=8/255, steps=20, seed=0)`, then `attack(model, x, y)` returns the
adversarial images. Training loops, which check their images once, call `attack.perturb(net, x, y)` under
`with frozen(model) as net`.
"""

from rnas.attacks.base import Attack
from rnas.attacks.gradient import CW, FGSM, PGD

__all__ = ["CW", "FGSM", "PGD", "Attack"]
