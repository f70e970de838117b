"""The evaluations that a folder holds: what can be derived is derived, what contradicts itself is named, and the best
founded is known.

The first one is evaluation.json with masks.npz and examples.npz; one of other settings is evaluation.NAME.json with
masks.NAME.npz and examples.NAME.npz, where NAME says which. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.records import codec
from rnas.records.arrays import UNBOUNDED, read_masks, union
from rnas.records.layout import EVALUATION, EXAMPLES, MASKS
from rnas.records.schema import Evaluation, Figure
from rnas.settings import Evaluate
from rnas.statistics import wilson

Mask = NDArray[np.bool_]
KIND = ("eps", "norm", "n", "seed", "images_sha256", "weights")
"""What evaluations have in common whose attacks may stand in one file."""
FEW = 100
"""An evaluation on fewer images counts only where there is no other."""


@dataclass(frozen=True)
class Files:
    """Where one evaluation lies; `name` is empty for evaluation.json."""

    folder: Path
    name: str = ""

    def _path(self, file: str) -> Path:
        stem, _, suffix = file.partition(".")
        return self.folder / ".".join(filter(None, (stem, self.name, suffix)))

    @property
    def summary(self) -> Path:
        """Accuracies, settings and warnings."""
        return self._path(EVALUATION)

    @property
    def masks(self) -> Path:
        """The verdict on every image."""
        return self._path(MASKS)

    @property
    def examples(self) -> Path:
        """Some images and what became of them."""
        return self._path(EXAMPLES)


@dataclass(frozen=True)
class Kept:
    """An evaluation that was kept: its figures agree with its masks."""

    files: Files
    summary: Evaluation
    masks: dict[str, Mask]
    labels: NDArray[np.int64] | None

    @property
    def attacks(self) -> list[str]:
        """The names of its attacks."""
        return list(self.summary.attacks)


def in_folder(folder: Path) -> list[Files]:
    """The evaluations of `folder`, unread: evaluation.json, then the others by name."""
    names = (re.fullmatch(r"evaluation(?:\.(.+))?\.json", path.name) for path in folder.glob("evaluation*.json"))
    return [Files(folder, name) for name in sorted(found[1] or "" for found in names if found)]


def read_all(folder: Path) -> list[Kept]:
    """The evaluations of `folder`, the best founded first. RnasError if one is damaged."""
    return sorted(map(read, in_folder(folder)), key=_foundation, reverse=True)


def _foundation(kept: Kept) -> tuple[Any, ...]:
    """What makes one evaluation better founded than another: the network's own test images, not too few, AutoAttack,
    many images, many attacks."""
    found = kept.summary
    return (found.data is None, found.n >= FEW, "aa" in found.attacks, found.n, len(found.attacks))


def read(files: Files) -> Kept:
    """The evaluation in `files`. Accuracies and intervals are those of the masks, whose file has a checksum; where
    evaluation.json says something else, a warning tells.

    RnasError if a file is damaged, or if what cannot be derived contradicts its neighbours.
    """
    summary = codec.read(Evaluation, files.summary)
    masks, labels = read_masks(files.masks)
    n = len(next(iter(masks.values()), ()))
    if masks and summary.n != n:
        raise RnasError(
            f"{files.masks} has verdicts on {n} images, but by {files.summary} they are {summary.n}: "
            "one of the two is damaged"
        )
    derived = _derived(summary, masks)
    changed = [
        f"{files.summary.name} says {was.accuracy:.2%} for {name}: it is damaged, and the figure of "
        f"{files.masks.name}, {new.accuracy:.2%}, is shown"
        for name, was, new in _pairs(summary, derived)
        if name != "union" and abs(was.accuracy - new.accuracy) > 1e-9
    ]
    for name, _, new in _pairs(summary, derived):
        low, high = new.interval or (0, 1)
        if not low - 1e-9 <= new.accuracy <= high + 1e-9:
            raise RnasError(f"{files.summary} is damaged: the accuracy of {name} lies outside its interval")
    return Kept(files, replace(derived, warnings=(*derived.warnings, *changed)), masks, labels)


def _pairs(summary: Evaluation, derived: Evaluation) -> Iterable[tuple[str, Figure, Figure]]:
    """Every figure by name, as `summary` has it and as `derived` has it."""
    for name in ("clean", *summary.attacks, "union"):
        was, new = summary.figure(name), derived.figure(name)
        if new is not None:
            yield name, was or new, new


def _derived(summary: Evaluation, masks: Mapping[str, Mask]) -> Evaluation:
    """`summary` with every figure that follows from the masks."""
    if "clean" not in masks:
        return summary
    attacks = {
        name: replace(entry, **vars(figure(masks[name], entry.seconds)) | {"more": entry.more})
        if name in masks
        else entry
        for name, entry in summary.attacks.items()
    }
    known = {name: masks[name] for name in ("clean", *attacks) if name in masks}
    complete = set(attacks) - set(UNBOUNDED) <= set(masks)
    return replace(
        summary,
        n=len(masks["clean"]),
        clean=figure(masks["clean"]),
        attacks=attacks,
        union=of_union(known) if complete else summary.union,
    )


def figure(mask: Mask, seconds: float | None = None) -> Figure:
    """An accuracy with its interval, from a mask of what is still right, and the `seconds` that the attack took."""
    share, n = int(mask.sum()) / len(mask), len(mask)
    return Figure(share, wilson(share, n), seconds)


def of_union(masks: Mapping[str, Mask]) -> Figure | None:
    """That of all bounded attacks together, if there is one among `masks`."""
    withstood = union(masks)
    return None if withstood is None else figure(withstood)


def alike(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations are of the same weights on the same images under the same threat."""
    return all(getattr(one, key) == getattr(other, key) for key in KIND)


def name_for(summary: Evaluation) -> str:
    """What to call an evaluation that lies beside others: its threat, its images, and a digest of all that sets its
    kind apart."""
    kind = json.dumps([getattr(summary, key) for key in KIND])
    digest = hashlib.sha256(kind.encode()).hexdigest()[:6]
    return f"{summary.norm}-{summary.eps:.4g}-n{summary.n}-seed{summary.seed}-{digest}"


def is_of(summary: Evaluation, weights: str | None) -> bool:
    """Whether an evaluation is of the network whose weights have the digest `weights`, as far as the two say."""
    return summary.weights is None or weights is None or summary.weights == weights


def radius(settings: Evaluate, dataset: str) -> float:
    """ε as it was chosen, or the usual one."""
    return settings.eps or (0.5 if settings.norm == "l2" else 16 / 255 if dataset == "digits" else 8 / 255)


def as_asked(summary: Evaluation, settings: Evaluate, weights: str | None) -> bool:
    """Whether an evaluation is on the images and under the threat of `settings`, by whichever attacks."""
    wanted = {
        "limit": settings.limit,
        "data": settings.data,
        "eps": radius(settings, str(summary.dataset)),
        "norm": settings.norm,
        "seed": settings.seed,
        "weights": weights,
    }
    return all(getattr(summary, key) == value for key, value in wanted.items())


def answers(summary: Evaluation, settings: Evaluate, weights: str | None) -> bool:
    """Whether an evaluation holds what one with `settings` would find, and maybe more attacks."""
    return as_asked(summary, settings, weights) and set(settings.attacks) <= set(summary.attacks)
