"""Named attacks on a whole set of images: batch by batch, every success re-checked, every batch remembered on disk."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnas.attacks import trust
from rnas.attacks.autoattack import MEMBERS, member, standard
from rnas.attacks.base import Attack, confirmed
from rnas.attacks.checks import check_classes, check_images, check_logits, check_threat
from rnas.attacks.cw_l2 import CWL2
from rnas.attacks.gradient import CW, FGSM, PGD
from rnas.attacks.losses import correct
from rnas.attacks.noise import derived_seed
from rnas.attacks.norms import Norm, distance
from rnas.errors import RnasError, unknown
from rnas.files import read_json, write_json
from rnas.frozen import Model, frozen, unfolded

Mask = NDArray[np.bool_]
Progress = Callable[[str, int, int, int, float], None]
"""Called after every batch: attack ("aa/fab-t" within AutoAttack), images done, images to do, survivors, seconds."""

NAMES = ("fgsm", "pgd20", "pgd100", "pgd20-any", "pgd100-any", "cw", "cw-l2", "aa", *MEMBERS)
STATE = "attacks.json"
UNKNOWN, BROKEN, STANDING = "?", "0", "1"


@dataclass(frozen=True)
class Evaluation:
    """What `run_attacks` found."""

    masks: dict[str, Mask]
    """For "clean" and every attack (N,): True where the image is (still) classified correctly."""
    seconds: dict[str, float]
    """What every attack took, the parts before an interruption included."""
    warnings: list[str]
    """Reasons to distrust these figures; empty if there are none."""


def attack_named(name: str, eps: float, norm: Norm = "linf", seed: int | None = None) -> Attack:
    """The attack called `name`: fgsm, pgdN, pgdN-any, cw, cw-l2 or a part of AutoAttack. RnasError if there is none.

    PGD and cw take steps of ε/4, which at the paper's ε = 8/255 is its 2/255.
    """
    if name in MEMBERS:
        return member(name, eps, norm, seed)
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
    counts as broken only if the unmodified model, in full float32, misclassifies an image in [0,1] within `eps` of it
    (cw-l2: at any distance); images that are misclassified without an attack count as broken by all.

    Every image's randomness follows from `seed`, the attack and the image, so neither the batch size, nor the order of
    images, nor an interruption changes it. With `state`, a folder, what is known is written there after every batch,
    and a call with the same model, images, `eps`, `norm`, `seed` and `batch_size` goes on from it: an attack that is
    complete there costs nothing.

    RnasError before the first attack step: unknown names, images outside [0,1], labels that the model has no class
    for, an answer that is not logits, NaN, an impossible ε, too few classes, a `state` of another evaluation.
    """
    check_threat(eps, norm)
    for name in names:
        if name != "aa":
            attack_named(name, eps, norm)
    if batch_size < 1:
        raise RnasError(f"batch size is {batch_size}: expected 1 or more")
    check_images(x, y)
    with torch.inference_mode(False), _full_precision(), unfolded(model) as plain, frozen(model) as net:
        run = _Run(plain, net, x, y, eps, norm, seed, batch_size, _device(model, x))
        clean, classes = run.clean()
        if classes < 3:
            for name in set(names) & {"apgd-dlr", "apgd-t"}:
                check_classes(torch.empty(0, classes), 3, name)
        folder = None if state is None else Path(state)
        table = _Table.open(folder, _identity(model, x, y, eps, norm, seed, batch_size), len(x))
        masks = {"clean": clean}
        for name in names:
            masks[name] = clean.copy()
            for part in standard(classes) if name == "aa" else (name,):
                run.attack(part, name, masks[name], table, progress)
                masks[name] &= table.mask(part)
        warnings = run.warnings(masks, table) if clean.any() else ["the model classifies no image correctly"]
        if "aa" in names and classes < 3:
            warnings.append("AutoAttack's APGD-T needs 3 classes (DLR loss): APGD on the margin took its place")
    return Evaluation(masks, {name: table.seconds.get(name, 0.0) for name in names}, warnings)


@dataclass
class _Table:
    """For every attack and image: broken, standing, or not known yet; in memory and, with a folder, on disk."""

    file: Path | None
    identity: dict[str, Any]
    verdicts: dict[str, NDArray[np.str_]]
    seconds: dict[str, float]
    n: int

    @staticmethod
    def open(folder: Path | None, identity: dict[str, Any], n: int) -> _Table:
        file = None if folder is None else folder / STATE
        if file is None or not file.exists():
            return _Table(file, identity, {}, {}, n)
        kept = read_json(file)
        if not isinstance(kept, dict) or not {"identity", "verdicts", "seconds"} <= set(kept):
            raise RnasError(f"{file} is not the state of an evaluation: remove it to start over")
        if differing := [k for k, v in identity.items() if kept["identity"].get(k) != v]:
            raise RnasError(f"{file} belongs to another evaluation ({', '.join(differing)}): remove it to start over")
        verdicts = {name: np.array(list(row)) for name, row in kept["verdicts"].items()}
        if any(len(row) != n or set(row) - {UNKNOWN, BROKEN, STANDING} for row in verdicts.values()):
            raise RnasError(f"{file} is damaged: remove it to start over")
        return _Table(file, identity, verdicts, dict(kept["seconds"]), n)

    def row(self, attack: str) -> NDArray[np.str_]:
        return self.verdicts.setdefault(attack, np.full(self.n, UNKNOWN))

    def mask(self, attack: str) -> Mask:
        """Where `attack` is known to have failed."""
        return np.asarray(self.row(attack) == STANDING)

    def known(self) -> dict[str, tuple[Mask, Mask]]:
        """For every attack: which images it was tried on, and which of these still stand."""
        return {name: (np.asarray(row != UNKNOWN), self.mask(name)) for name, row in self.verdicts.items()}

    def save(self) -> None:
        if self.file is not None:
            rows = {name: "".join(row) for name, row in self.verdicts.items()}
            write_json(self.file, {"identity": self.identity, "verdicts": rows, "seconds": self.seconds})


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

    def clean(self) -> tuple[Mask, int]:
        """Which images the model gets right, and its number of classes. RnasError on anything but logits."""
        mask, classes = np.zeros(len(self.x), dtype=bool), 0
        with torch.no_grad():
            for indices in self.batches(np.ones(len(self.x), dtype=bool)):
                x, y = self.batch(indices)
                logits = check_logits(self.plain(x), y)
                mask[indices] = correct(logits, y).cpu().numpy()
                classes = logits.shape[1]
        return mask, classes

    def attack(self, part: str, name: str, where: Mask, table: _Table, progress: Progress | None) -> None:
        """Find out whether `part` of the attack `name` breaks the images `where`; skips what `table` knows already."""
        row, attack = table.row(part), attack_named(part, self.eps, self.norm, self.seed)
        shown = part if name == part else f"{name}/{part}"
        for indices in self.batches(where & (row == UNKNOWN)):
            start = time.perf_counter()
            broken = self.breaks(attack, *self.batch(indices))
            row[indices] = np.where(broken, BROKEN, STANDING)
            table.seconds[name] = table.seconds.get(name, 0.0) + time.perf_counter() - start
            table.save()
            if progress is not None:
                done = where & (row != UNKNOWN)
                survivors = where & (row != BROKEN)
                progress(shown, int(done.sum()), int(where.sum()), int(survivors.sum()), table.seconds[name])

    def breaks(self, attack: Attack, x: Tensor, y: Tensor) -> Mask:
        """Which of the images `x` the attack breaks, by the verdict of the model as it is."""
        x_adv = confirmed(attack, self.plain, self.net, x, y)
        return np.asarray(self.verified(attack, x_adv, x, y).cpu().numpy(), dtype=bool)

    @torch.no_grad()
    def verified(self, attack: Attack, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Which images (B,) of `x_adv` are admissible and misclassified by the model as it is."""
        inside = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        if not isinstance(attack, CWL2):
            inside &= distance(x_adv, x, self.norm) <= self.eps * (1 + 1e-5) + 1e-6
        return inside & ~correct(self.plain(x_adv), y)

    def warnings(self, masks: dict[str, Mask], table: _Table) -> list[str]:
        """The self-checks, on the first images that are classified correctly."""
        x, y = self.batch(np.flatnonzero(masks["clean"])[: min(self.batch_size, trust.IMAGES)])
        standing = np.logical_and.reduce(list(masks.values()))
        survivors = self.batch(np.flatnonzero(standing)[: min(self.batch_size, trust.IMAGES)])
        found = [
            trust.softmaxed(self.plain, x),
            trust.randomised(self.plain, x),
            trust.vanishing_gradients(self.net, x, y),
            trust.black_box_wins(table.known()),
            trust.insensitive_to_eps(self.net, *survivors, eps=self.eps, norm=self.norm),
        ]
        return [warning for warning in found if warning is not None]


def _device(model: Model, x: Tensor) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x.device if parameter is None else parameter.device


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32: no autocast, no TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _identity(model: Model, x: Tensor, y: Tensor, eps: float, norm: Norm, seed: int, batch_size: int) -> dict[str, Any]:
    weights = hashlib.blake2b(digest_size=16)
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                weights.update(name.encode() + _content(value))
    images = hashlib.blake2b(_content(x) + _content(y), digest_size=16).hexdigest()
    threat = {"eps": eps, "norm": norm, "seed": seed, "batch_size": batch_size}
    return {"model": weights.hexdigest(), "images": images, **threat}


def _content(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
