"""Run folders as values. Whatever is there is read and checked before anything is drawn or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.files import read_json
from rnas.genotype import Architecture, architecture_from_json
from rnas.records import codec
from rnas.records.arrays import read_arrays
from rnas.records.evaluations import Kept, in_folder, is_of, read_all
from rnas.records.folder import read_events
from rnas.records.layout import ALPHAS, DISTORTION, ENVIRONMENT, GENOTYPE, LOG, META, SETTINGS, STRENGTHS
from rnas.records.schema import (
    Description,
    Environment,
    Epoch,
    Evaluation,
    LayerDistortion,
    SearchEpoch,
    TrainEpoch,
    Warned,
)

T = TypeVar("T")
Record = dict[str, Any]
"""A JSON object."""


@dataclass(frozen=True)
class Part:
    """A folder of one search or of one network; `name` is unique on the page."""

    name: str
    folder: Path
    settings: Record
    environment: Environment | None
    epochs: tuple[Epoch, ...]
    warnings: tuple[str, ...]
    """What the log warns of, and what is wrong with the folder."""

    def column(self, *names: str) -> tuple[Any, ...]:
        """One figure of every epoch, such as `column("val", "clean_accuracy")`; None where there is none."""
        return tuple(reduce(getattr, names, epoch) for epoch in self.epochs)

    def numbers(self) -> list[int]:
        """The number of every epoch that was logged."""
        return [e.epoch for e in self.epochs]


@dataclass(frozen=True)
class SearchPart(Part):
    """A search: the architecture that it found or has reached, and how much of each operation after every epoch."""

    epochs: tuple[SearchEpoch, ...]
    genotype: Architecture | None = None
    finished: bool = False
    strengths: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """normal, reduce (or cell0, cell1, ...): (epochs + 1, edges, operations), the first at the start; 0: pruned."""
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Images before and after an attack: uint8 (K,H,W,3) and float (K,H,W,3) in [0,1]; class numbers (K,)."""

    attack: str
    clean: NDArray[np.uint8]
    adversarial: NDArray[np.float64]
    label: NDArray[np.int64]
    clean_prediction: NDArray[np.int64]
    adversarial_prediction: NDArray[np.int64]


@dataclass(frozen=True)
class NetworkPart(Part):
    """A network: how it was trained, and how it stood up to attack."""

    epochs: tuple[TrainEpoch, ...]
    model: Description | None = None
    kept: tuple[Kept, ...] = ()
    """Its evaluations, the best founded first."""
    shown: str = ""
    """The name of the file of the one that is shown: what follows is its content."""
    evaluation: Evaluation | None = None
    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    examples: Examples | None = None
    distortion: LayerDistortion | None = None

    def showing(self, kept: Kept) -> NetworkPart:
        """The same network with the evaluation `kept`, one of its own."""
        return replace(
            self,
            shown=kept.files.summary.name,
            evaluation=kept.summary,
            masks=kept.masks,
            labels=kept.labels,
            examples=_examples(kept.files.examples),
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if model.json is missing."""
        return () if self.model is None else self.model.classes

    @property
    def genotype(self) -> Architecture | None:
        """The cells of a network of one's own."""
        return None if self.model is None else self.model.genotype

    @property
    def parameters(self) -> int | None:
        """How many there are, if model.json says so."""
        return None if self.model is None else self.model.parameters

    @property
    def arch(self) -> str:
        """The name of the architecture, `genotype` for a cell of one's own."""
        return self.model.arch if self.model is not None else str(self.settings.get("arch") or self.folder.name)


def read_parts(folders: Sequence[Path]) -> list[Part]:
    """Every search and network in `folders`, in order: each folder itself, or what lies side by side in it.

    RnasError if a folder is missing, holds no run, or is damaged."""
    found: list[tuple[str, Path, type[SearchPart] | type[NetworkPart]]] = []
    several = len(folders) > 1
    for folder in folders:
        if not folder.is_dir():
            raise RnasError(f"{folder} is no folder: expected one that rnas run, search or train made")
        here = _kind(folder)
        if here:
            found.append((_name(folder), folder, here))
            continue
        inside = [(child, kind) for child in sorted(folder.iterdir()) if child.is_dir() and (kind := _kind(child))]
        if not inside:
            raise RnasError(
                f"{folder} holds no run: expected settings.json, log.jsonl or evaluation.json in it, "
                "or folders such as search/ and train/"
            )
        prefix = f"{_name(folder)}/" if several else ""
        found += [(prefix + child.name, child, kind) for child, kind in inside]
    parts: list[Part] = []
    for name, folder, kind in found:
        taken = sum(part.name == name or part.name.startswith(f"{name} (") for part in parts)
        read = _search if kind is SearchPart else _network
        parts.append(read(f"{name} ({taken + 1})" if taken else name, folder))
    return _alike(parts)


def _alike(parts: Sequence[Part]) -> list[Part]:
    """`parts`, whose networks show evaluations of one test if all of them have such, the best founded of these."""
    networks = [p for p in parts if isinstance(p, NetworkPart) and p.kept]
    for first in networks[0].kept if networks else ():
        same = [next((e for e in p.kept if not differing(first.summary, e.summary)), None) for p in networks]
        if all(same):
            shown = {p.name: p.showing(e) for p, e in zip(networks, same, strict=True) if e is not None}
            return [shown.get(p.name, p) for p in parts]
    return list(parts)


def differing(one: Evaluation, other: Evaluation) -> str | None:
    """In what the tests of two evaluations differ: images or threat; None if in nothing."""
    known = one.images_sha256 and other.images_sha256  # or else by their name
    for key in ("images_sha256" if known else "dataset", "n", "norm"):
        if getattr(one, key) != getattr(other, key):
            return key
    return None if math.isclose(one.eps, other.eps, rel_tol=1e-6) else "eps"


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _kind(folder: Path) -> type[SearchPart] | type[NetworkPart] | None:
    command = None
    if (folder / SETTINGS).is_file():
        command = _object(folder / SETTINGS).get("command")
    if command == "search" or any((folder / name).is_file() for name in (STRENGTHS, ALPHAS)):
        return SearchPart
    if command == "train" or (folder / META).is_file() or in_folder(folder):
        return NetworkPart
    return None


def _object(path: Path) -> Record:
    """The JSON object in `path`, or an empty one if there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise RnasError(f"{path} is damaged: expected a JSON object")
    return value


def _read(kind: type[T], path: Path) -> T | None:
    """The record of the class `kind` in `path`, or None if there is no such file."""
    return codec.read(kind, path) if path.exists() else None


def _common(name: str, folder: Path, finished: bool, kind: type[Epoch]) -> Record:
    """What searches and networks share. RnasError if the log of one that is `finished` lacks epochs."""
    epochs, others = read_events(folder, kind)
    settings = _object(folder / SETTINGS)
    planned = settings.get("epochs")
    if finished and (folder / LOG).exists() and type(planned) is int and len(epochs) != planned:
        raise RnasError(
            f"{folder / LOG} is damaged: it tells of {len(epochs)} of the {planned} epochs of a run that is through"
        )
    return {
        "name": name,
        "folder": folder,
        "settings": settings,
        "environment": _read(Environment, folder / ENVIRONMENT),
        "epochs": epochs,
        "warnings": tuple(event.message for event in others if isinstance(event, Warned)),
    }


def _search(name: str, folder: Path) -> SearchPart:
    path = folder / GENOTYPE
    finished = path.exists()
    common = _common(name, folder, finished, SearchEpoch)
    genotype = common["epochs"][-1].genotype if common["epochs"] else None
    if finished:
        genotype = architecture_from_json(read_json(path), str(path))
    strengths, operations = _strengths(folder)
    return SearchPart(**common, genotype=genotype, finished=finished, strengths=strengths, operations=operations)


def _strengths(folder: Path) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """How much of each operation, over the epochs, and their names; of a search by version 0.1.0 the softmax of α."""
    path = next((folder / name for name in (STRENGTHS, ALPHAS) if (folder / name).exists()), None)
    if path is None:
        return {}, ()
    arrays = read_arrays(path)
    kinds = [name for name in arrays if name != "operations"]
    if not kinds or len(kinds) == len(arrays):
        raise RnasError(f"{path} is damaged: expected an array of operations, and one for each kind of cell")
    operations = tuple(map(str, arrays["operations"].reshape(-1)))
    strengths = {}
    for kind in kinds:
        a = arrays[kind]
        fits = a.ndim == 3 and a.shape[2] == len(operations) and len(a) > 0 and _nodes(a.shape[1]) is not None
        if not fits or a.dtype.kind != "f" or not np.isfinite(a).all():
            raise RnasError(
                f"{path} is damaged: {kind} has shape {a.shape}; expected finite numbers, "
                f"(epochs + 1, edges of a whole cell, {len(operations)} operations)"
            )
        a = a.astype(np.float64)
        strengths[kind] = a if path.name == STRENGTHS else _softmax(a)
    return strengths, operations


def _softmax(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights of Eq. 1 over the last axis."""
    powers = np.exp(alphas - alphas.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True), dtype=np.float64)


def _nodes(edges: int) -> int | None:
    """The intermediate nodes of a cell with so many edges: 2 + 3 + … ; None if no number of nodes fits."""
    nodes = round((math.sqrt(9 + 8 * edges) - 3) / 2)
    return nodes if nodes > 0 and nodes * (nodes + 3) // 2 == edges else None


def _network(name: str, folder: Path) -> NetworkPart:
    model = _read(Description, folder / META)
    common = _common(name, folder, model is not None, TrainEpoch)
    found = read_all(folder)
    kept = [e for e in found if is_of(e.summary, None if model is None else model.weights)]
    if found and not kept:
        text = f"{found[0].files.summary.name} is of other weights than {folder / META}: it is left out"
        common["warnings"] += (text,)
    distortion = read_distortion(folder / DISTORTION)
    part = NetworkPart(**common, model=model, kept=tuple(kept), distortion=distortion)
    return part.showing(kept[0]) if kept else part


def _examples(path: Path) -> Examples | None:
    arrays = read_arrays(path)
    if not arrays:
        return None
    names = ("clean", "adversarial", "label", "clean_prediction", "adversarial_prediction")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise RnasError(f"{path} is damaged: {', '.join(missing)} missing")
    clean, adversarial = arrays["clean"], arrays["adversarial"]
    if clean.dtype != np.uint8 or clean.ndim != 4 or clean.shape[3] != 3 or adversarial.shape != clean.shape:
        raise RnasError(f"{path} is damaged: expected clean (uint8) and adversarial images of one shape (K,H,W,3)")
    for name in names[2:]:
        if arrays[name].shape != clean.shape[:1] or arrays[name].dtype.kind not in "iu":
            raise RnasError(f"{path} is damaged: {name} is not one class number for each image")
    if adversarial.dtype == np.uint8:
        adversarial = adversarial / 255.0
    return Examples(
        attack=str(arrays["attack"]) if "attack" in arrays else "the attack",
        clean=clean,
        adversarial=np.clip(np.nan_to_num(adversarial.astype(np.float64)), 0, 1),
        label=arrays["label"].astype(np.int64),
        clean_prediction=arrays["clean_prediction"].astype(np.int64),
        adversarial_prediction=arrays["adversarial_prediction"].astype(np.int64),
    )


def read_distortion(path: Path) -> LayerDistortion | None:
    """A distortion.json, or None if there is no such file. RnasError if it is damaged."""
    found = _read(LayerDistortion, path)
    if found is not None and len(found.layers) != len(found.vulnerability):
        raise RnasError(f"{path} is damaged: expected as many numbers in 'vulnerability' as names in 'layers'")
    return found
