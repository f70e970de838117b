"""Names and figures as people read them."""

from __future__ import annotations

import re

from rnas.records.schema import Evaluation, LayerDistortion
from rnas.report.read import NetworkPart, Part
from rnas.wording import radius

_ATTACKS = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "cw": "C&W (margin)",
    "cw-l2": "C&W (l2)",
    "aa": "AutoAttack",
    "apgd-ce": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "apgd-margin": "APGD-margin",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
    "union": "Union",
}
CW_CAVEAT = (
    "C&W (margin) here is C&W's margin loss, optimised by PGD inside the ball of radius ε. The paper's C&W column is "
    "not comparable: the script behind it ran an unbounded l2 attack (c = 0.5, κ = 0, 100 Adam steps of 0.01) and "
    "counted successes at any distance."
)
CW_L2_CAVEAT = (
    "C&W (l2) looks for the nearest adversarial image at whatever distance: ε does not bound it, so that it stands "
    "beside the union, which does not count it."
)
PAPER_TABLES = {"cifar10": 1, "cifar100": 2, "svhn": 3, "tiny-imagenet": 4}


def attack_name(name: str) -> str:
    """`pgd20` as PGD-20."""
    if name in _ATTACKS:
        return _ATTACKS[name]
    found = re.fullmatch(r"pgd(\d+)(-any)?", name)
    return f"PGD-{found[1]}{' (any step)' if found[2] else ''}" if found else name


def training(part: NetworkPart) -> str | None:
    """How the network was trained, as far as its settings say."""
    settings = part.settings
    if "standard" not in settings:
        return None
    if settings["standard"]:
        return "standard"
    return "TRADES" if settings.get("loss") == "trades" else "adversarial"


def norm_name(norm: str) -> str:
    """`linf` as l∞."""
    return {"linf": "l∞", "l2": "l2"}.get(norm, norm)


def threat(record: Evaluation | LayerDistortion) -> str:
    """The threat model in a few words: l∞, ε = 8/255."""
    return norm_name(record.norm) + ("" if record.eps is None else f", ε = {radius(record.eps, record.norm)}")


def count(n: int) -> str:
    """12 345, with narrow spaces."""
    return f"{n:,}".replace(",", "\u202f")


def epochs(n: int) -> str:
    """One epoch, 2 epochs."""
    return "one epoch" if n == 1 else f"{n} epochs"


def work_sentence(part: Part) -> str | None:
    """What a search or a training did, as its settings say: attack, epochs, learning rate, projection."""
    settings = part.settings
    attack, epochs, lr = settings.get("perturbation"), settings.get("epochs"), settings.get("lr")
    if not isinstance(attack, dict) or epochs is None or lr is None:
        return None
    standard = settings.get("standard") is True
    how = "on clean images" if standard else f"with PGD-{attack.get('attack_steps')}"
    step = attack.get("step")
    if not standard and isinstance(step, int | float):
        how += f" (steps of {radius(step)})"
    text = f"{part.name}: {epochs} epochs {how}, learning rate {lr}, batches of {settings.get('batch_size')}"
    if "bound" in settings:
        steps = settings.get("projection_steps")
        most = "half an epoch" if steps is None else f"{steps} steps"
        text += f", H = {settings['bound']}, projections of {most} at most"
    return f"{text}."
