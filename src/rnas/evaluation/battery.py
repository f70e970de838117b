"""Named attacks on a whole set of images: batch by batch, every success re-checked, every batch remembered on disk."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnas.attacks.autoattack import MEMBERS, member, standard
from rnas.attacks.base import Attack, confirmed, numeric
from rnas.attacks.checks import (
    answer,
    check_classes,
    check_gradient,
    check_images,
    check_logits,
    check_threat,
    missing_gradient,
    whole,
)
from rnas.attacks.cw_l2 import CWL2
from rnas.attacks.foreign import opened
from rnas.attacks.gradient import CW, FGSM, PGD
from rnas.attacks.losses import correct
from rnas.attacks.noise import derived_seed
from rnas.attacks.norms import Norm, distance
from rnas.compute.freezing import Model
from rnas.errors import RnasError, unknown
from rnas.evaluation import trust
from rnas.evaluation.verdicts import BROKEN, NAN, PROBED, STANDING, UNKNOWN, Mask, Table, digest, identify
from rnas.records.arrays import UNBOUNDED

CHECKED = 8  # images that a model is asked about before everything else
Progress = Callable[[str, int, int, int, float], None]
"""Called after every batch: attack ("aa/fab-t" within AutoAttack), images done, images to do, survivors, seconds."""

NAMES = ("fgsm", "pgd20", "pgd100", "pgd20-any", "pgd100-any", "cw", "cw-l2", "aa", *MEMBERS)


@dataclass(frozen=True)
class Evaluation:
    """What `run_attacks` found."""

    masks: dict[str, Mask]
    """For "clean" and every attack (N,): True where the image is (still) classified correctly."""
    seconds: dict[str, float]
    """What every attack took. Batches that it shares with another count for both, those before an interruption too."""
    warnings: list[str]
    """Reasons to distrust these figures; empty if there are none."""


def attack_named(
    name: str, eps: float, norm: Norm = "linf", seed: int | None = None, rows: int | None = None
) -> Attack:
    """The attack called `name`: fgsm, pgdN, pgdN-any, cw, cw-l2 or a part of AutoAttack. RnasError if there is none.

    PGD and cw take steps of ε/4, which at the paper's ε = 8/255 is its 2/255.
    """
    if name in MEMBERS:
        return member(name, eps, norm, seed, rows)
    if name == "fgsm":
        return FGSM(eps=eps, norm=norm)
    if name == "cw":
        return CW(eps=eps, step=eps / 4, norm=norm, seed=derived_seed(seed, name))
    if name == "cw-l2":
        return CWL2()
    if pgd := re.fullmatch(r"pgd([1-9][0-9]{0,5})(-any)?", name):
        start = derived_seed(seed, "pgd")  # the same for all, so that pgdN-any breaks all that pgdN breaks
        return PGD(eps=eps, step=eps / 4, steps=int(pgd[1]), any_iterate=pgd[2] is not None, norm=norm, seed=start)
    raise unknown("attack", name, [*NAMES, "any pgdN and pgdN-any"])


def run_attacks(
    model: Model,
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    *,
    eps: float,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 256,
    state: Path | str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack `model` on images `x` (N,C,H,W) in [0,1] with labels `y` (N,) by each of the attacks `names`.

    The images may lie on another device than the model: no more than `batch_size` of them are moved at a time. An image
    counts as broken only if the unmodified model, in full float32 (float64 for float64 images), misclassifies an image
    in [0,1] within `eps` of it (cw-l2: at any distance), or answers it with NaN or infinity, which is warned of; images
    that are misclassified without an attack count as broken by all.

    Every image's randomness follows from `seed`, the attack and the image, so neither the batch size, nor the order of
    images, nor an interruption changes it. With `state`, a folder, what is known is written there after every batch,
    and a call with the same model, images, `eps`, `norm`, `seed` and `batch_size` goes on from it: an attack that is
    complete there costs nothing.

    RnasError before the first attack step: unknown names, images outside [0,1], labels that the model has no class
    for, an answer that is not logits, NaN, no gradients (only square does without), an impossible ε, too few classes, a
    `state` of another evaluation.
    """
    eps = check_threat(eps, norm)
    if isinstance(names, str):
        raise RnasError(f"attacks is '{names}': expected a list of names, such as ['{names}']")
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise RnasError(f"attacks is {names!r}: expected a list of names, such as ['pgd20', 'aa']")
    for name in names:
        if name != "aa":
            attack_named(name, eps, norm)
    seed, batch_size = whole("seed", seed), whole("batch size", batch_size, 1)
    if not callable(model):
        raise RnasError(f"the model is a {type(model).__name__}: expected a callable, such as rnas.load of a folder")
    x = check_images(x, y)
    device, some = _device(model, x), min(batch_size, CHECKED)
    with (
        torch.inference_mode(False),
        opened(model, x[:some].to(device, copy=True), y[:some].to(device, copy=True)) as (plain, net),
    ):
        run = _Run(plain, net, x, y, eps, norm, seed, batch_size, device)
        predicted, classes = run.predictions()
        clean = predicted == y.cpu().numpy()
        run.check_attacks(names, classes)
        identity = {} if state is None else run.identity(model)
        table = Table.open(None if state is None else Path(state), identity, len(x))
        warnings = run.doubts()
        masks, seconds = {"clean": clean}, dict.fromkeys(names, 0.0)
        for name in seconds:
            masks[name] = clean.copy()
            for part in standard(classes) if name == "aa" else (name,):
                where = masks[name].copy()
                run.attack(part, where, table, _within(progress, name, seconds[name]))
                seconds[name] += table.seconds(part, where)
                masks[name] &= table.mask(part)
        warnings += (
            run.warnings(masks, table, predicted) if clean.any() else ["the model classifies no image correctly"]
        )
        if "aa" in names and classes < 3:
            warnings.append("AutoAttack's APGD-T needs 3 classes (DLR loss): APGD on the margin took its place")
    return Evaluation(masks, seconds, warnings)


def _within(progress: Progress | None, name: str, before: float) -> Progress:
    """Progress of a part of the attack `name`, whose earlier parts took `before` seconds."""

    def report(part: str, done: int, total: int, survivors: int, seconds: float) -> None:
        if progress is not None:
            progress(part if part == name else f"{name}/{part}", done, total, survivors, before + seconds)

    return report


@dataclass(frozen=True)
class _Run:
    """The model twice, as it is (`plain`) and made fast (`net`), and what it is attacked on."""

    plain: Model
    net: Model
    x: Tensor
    y: Tensor
    eps: float
    norm: Norm
    seed: int
    batch_size: int
    device: torch.device

    def batch(self, indices: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """The images and labels at `indices`, on the model's device."""
        at = torch.from_numpy(indices)
        return self.x[at.to(self.x.device)].detach().to(self.device), self.y[at.to(self.y.device)].to(self.device)

    def batches(self, where: Mask) -> Iterator[NDArray[np.intp]]:
        """The indices of the images `where`, a batch at a time."""
        (indices,) = where.nonzero()
        return (indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size))

    def predictions(self) -> tuple[NDArray[np.int64], int]:
        """The model's answer (N,) to every image, and its number of classes. RnasError on anything but logits."""
        predicted, classes = np.zeros(len(self.x), dtype=np.int64), 0
        for indices in self.batches(np.ones(len(self.x), dtype=bool)):
            x, y = self.batch(indices)
            logits = check_logits(answer(self.plain, x), y)
            predicted[indices] = logits.argmax(1).cpu().numpy()
            classes = logits.shape[1]
        return predicted, classes

    def check_attacks(self, names: Sequence[str], classes: int) -> None:
        """RnasError if one of the attacks `names` is not defined for such a model."""
        for name in set(names) & {"apgd-dlr", "apgd-t"}:
            check_classes(torch.empty(0, classes), 3, name)
        white = [n for n in names if n == "aa" or not attack_named(n, self.eps, self.norm).black_box]
        if white:
            check_gradient(self.plain, self.first(2)[0], ", ".join(white))

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first `n` images and labels, or a batch of them."""
        return self.batch(np.arange(min(n, self.batch_size, len(self.x))))

    def identity(self, model: Model) -> dict[str, Any]:
        """What tells this evaluation of `model` from others."""
        threat = {"eps": self.eps, "norm": self.norm, "seed": self.seed, "batch_size": self.batch_size}
        return {**identify(model, self.plain, *self.first(PROBED)), "images": digest(self.x, self.y), **threat}

    def attack(self, part: str, where: Mask, table: Table, progress: Progress) -> None:
        """Find out whether the attack `part` breaks the images `where`; skips what `table` knows already."""
        row, attack = table.row(part), attack_named(part, self.eps, self.norm, self.seed, self.batch_size)
        for indices in self.batches(where & (row == UNKNOWN)):
            start = time.perf_counter()
            verdicts = self.verdicts(attack, *self.batch(indices))
            table.record(part, indices, verdicts, time.perf_counter() - start)
            done = where & (row != UNKNOWN)
            survivors = where & ((row == STANDING) | (row == UNKNOWN))
            progress(part, int(done.sum()), int(where.sum()), int(survivors.sum()), table.seconds(part, where))

    def verdicts(self, attack: Attack, x: Tensor, y: Tensor) -> NDArray[np.str_]:
        """What the attack makes of the images `x`, by the answers of the model as it is.

        An image is broken if the model misclassifies an admissible version of it, or has no finite answer to one.
        """
        x_adv = confirmed(attack, self.plain, self.net, x, y)
        inside = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        if not isinstance(attack, CWL2):
            inside &= distance(x_adv, x, self.norm) <= self.eps * (1 + 1e-5) + 1e-6
        with torch.no_grad():
            logits = self.plain(x_adv)
        finite = logits.isfinite().all(1)
        broken = inside & ~(finite & correct(logits, y))
        fell, answered = torch.stack([broken, finite]).cpu().numpy()
        return np.where(fell, np.where(answered, BROKEN, NAN), STANDING)

    def doubts(self) -> list[str]:
        """Whether the model has one answer to an image: asked before the attacks, which work on that assumption."""
        x, _ = self.first(max(min(self.batch_size // 2, CHECKED), 1))
        doubt = trust.randomised(self.plain, x) or trust.depends_on_neighbours(self.plain, x)
        return [] if doubt is None else [doubt]

    def warnings(self, masks: dict[str, Mask], table: Table, predicted: NDArray[np.int64]) -> list[str]:
        """The self-checks, on the first images that are classified correctly."""
        if not masks["clean"].any():
            return ["the model classifies no image correctly"]
        x, y = self.batch(np.flatnonzero(masks["clean"])[: min(self.batch_size, trust.IMAGES)])
        # cw-l2 has no radius: what holds within ε may well fall to it.
        standing = np.logical_and.reduce([mask for name, mask in masks.items() if name not in UNBOUNDED])
        survivors = self.batch(np.flatnonzero(standing)[: min(self.batch_size, trust.IMAGES)])
        labels = self.y.cpu().numpy()
        one_class = trust.answers_one_class(predicted, labels)
        found = [
            one_class or trust.not_above_chance(predicted, labels),
            trust.softmaxed(self.plain, x),
            trust.answers_nan(table.nans()),
            trust.black_box_wins(table.known()),
        ]
        if missing := missing_gradient(self.plain, x):
            found.append(f"white-box attacks were impossible, for {missing}: this figure is an upper bound")
        elif not one_class:  # of which gradients that vanish and survivors that nothing moves are only the consequence
            found.append(trust.vanishing_gradients(self.net, x, y))
            found.append(trust.insensitive_to_eps(numeric(self.net), *survivors, eps=self.eps, norm=self.norm))
        return [warning for warning in found if warning is not None]


def _device(model: Model, x: Tensor) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x.device if parameter is None else parameter.device
