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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.files import read_json
from rnas.records.arrays import UNBOUNDED, read_masks, union
from rnas.records.schema import Record, check_evaluation
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

    def _path(self, stem: str, suffix: str) -> Path:
        return self.folder / ".".join(filter(None, (stem, self.name, suffix)))

    @property
    def summary(self) -> Path:
        """Accuracies, settings and warnings."""
        return self._path("evaluation", "json")

    @property
    def masks(self) -> Path:
        """The verdict on every image."""
        return self._path("masks", "npz")

    @property
    def examples(self) -> Path:
        """Some images and what became of them."""
        return self._path("examples", "npz")


@dataclass(frozen=True)
class Kept:
    """An evaluation that was kept: its figures agree with its masks."""

    files: Files
    summary: Record
    masks: dict[str, Mask]
    labels: NDArray[np.int64] | None

    @property
    def attacks(self) -> list[str]:
        """The names of its attacks."""
        return list(self.summary["attacks"])


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
    n = kept.summary.get("n") or 0
    return (kept.summary.get("data") is None, n >= FEW, "aa" in kept.attacks, n, len(kept.attacks))


def read(files: Files) -> Kept:
    """The evaluation in `files`. Accuracies and intervals are those of the masks, whose file has a checksum; where
    evaluation.json says something else, a warning tells.

    RnasError if a file is damaged, or if what cannot be derived contradicts its neighbours.
    """
    summary = read_json(files.summary)
    if not isinstance(summary, dict):
        raise RnasError(f"{files.summary} is damaged: expected a JSON object")
    check_evaluation(summary, files.summary)
    masks, labels = read_masks(files.masks)
    n = len(next(iter(masks.values()), ()))
    if masks and summary.get("n") not in (None, n):
        raise RnasError(
            f"{files.masks} has verdicts on {n} images, but by {files.summary} they are {summary['n']}: "
            "one of the two is damaged"
        )
    derived = _derived(summary, masks)
    changed = [
        f"{files.summary.name} says {entry['accuracy']:.2%} for {name}: it is damaged, and the figure of "
        f"{files.masks.name}, {new['accuracy']:.2%}, is shown"
        for name, entry, new in _pairs(summary, derived)
        if entry.get("accuracy") is not None and abs(entry["accuracy"] - new["accuracy"]) > 1e-9 and name != "union"
    ]
    for name, _, entry in _pairs(summary, derived):
        low, high = entry.get("interval") or (0, 1)
        if not low - 1e-9 <= (entry.get("accuracy") or low) <= high + 1e-9:
            raise RnasError(f"{files.summary} is damaged: the accuracy of {name} lies outside its interval")
    if changed:
        derived["warnings"] = [*derived.get("warnings", []), *changed]
    return Kept(files, derived, masks, labels)


def _pairs(summary: Record, derived: Record) -> Iterable[tuple[str, Record, Record]]:
    """Every figure by name, as `summary` has it and as `derived` has it."""
    yield "clean", summary["clean"], derived["clean"]
    for name, entry in summary["attacks"].items():
        yield name, entry, derived["attacks"][name]
    if "union" in derived:
        yield "union", summary.get("union", {}), derived["union"]


def _derived(summary: Record, masks: Mapping[str, Mask]) -> Record:
    """`summary` with every figure that follows from the masks."""
    if "clean" not in masks:
        return dict(summary)
    attacks = {
        name: {**entry, **figure(masks[name])} if name in masks else entry for name, entry in summary["attacks"].items()
    }
    derived = {**summary, "n": len(masks["clean"]), "clean": {**summary["clean"], **figure(masks["clean"])}}
    if set(attacks) - set(UNBOUNDED) <= set(masks):
        derived = {key: value for key, value in derived.items() if key != "union"}
        derived |= of_union({name: masks[name] for name in ("clean", *attacks) if name in masks})
    return {**derived, "attacks": attacks}


def figure(mask: Mask) -> Record:
    """An accuracy with its interval, from a mask of what is still right."""
    share, n = int(mask.sum()) / len(mask), len(mask)
    return {"accuracy": share, "interval": list(wilson(share, n))}


def of_union(masks: Mapping[str, Mask]) -> Record:
    """The entry of all bounded attacks together, if there is one among `masks`."""
    withstood = union(masks)
    return {} if withstood is None else {"union": figure(withstood)}


def alike(one: Record, other: Record) -> bool:
    """Whether two evaluations are of the same weights on the same images under the same threat."""
    return all(one.get(key) == other.get(key) for key in KIND)


def name_for(summary: Record) -> str:
    """What to call an evaluation that lies beside others: its threat, its images, and a digest of all that sets its
    kind apart."""
    kind = json.dumps([summary.get(key) for key in KIND])
    digest = hashlib.sha256(kind.encode()).hexdigest()[:6]
    return f"{summary['norm']}-{summary['eps']:.4g}-n{summary['n']}-seed{summary['seed']}-{digest}"


def is_of(summary: Record, weights: object) -> bool:
    """Whether an evaluation is of the network whose weights have the digest `weights`, as far as the two say."""
    known = isinstance(summary.get("weights"), str) and isinstance(weights, str)
    return not known or summary["weights"] == weights


def radius(settings: Evaluate, dataset: str) -> float:
    """ε as it was chosen, or the usual one."""
    return settings.eps or (0.5 if settings.norm == "l2" else 16 / 255 if dataset == "digits" else 8 / 255)


def asked(settings: Evaluate) -> Record:
    """Which images were asked for, as evaluation.json says it."""
    return {"limit": settings.limit, "data": settings.data}


def as_asked(summary: Record, settings: Evaluate, weights: object) -> bool:
    """Whether an evaluation is on the images and under the threat of `settings`, by whichever attacks."""
    wanted = {
        **asked(settings),
        "eps": radius(settings, str(summary.get("dataset"))),
        "norm": settings.norm,
        "seed": settings.seed,
        "weights": weights,
    }
    return all(summary.get(k) == v for k, v in wanted.items())


def answers(summary: Any, settings: Evaluate, weights: object) -> bool:
    """Whether an evaluation.json holds what one with `settings` would find, and maybe more attacks."""
    if not isinstance(summary, dict) or not isinstance(summary.get("attacks"), dict):
        return False  # not as rnas writes it
    return as_asked(summary, settings, weights) and set(settings.attacks) <= set(summary["attacks"])
