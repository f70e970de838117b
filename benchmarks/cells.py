"""What the studies of cells share: a cell is trained adversarially at a common cost, and attacked.

A cell's network has 5 cells and as many channels as bring it nearest to RNAS-L's multiply-accumulates at C = 8. What
is finished in a folder is not done again. At this size accuracies compare with each other only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rnas
from rnas.data import Dataset, load
from rnas.data.dataset import stratified
from rnas.evaluation.distortion import layers_of
from rnas.files import read_json, write_json
from rnas.genotype import Architecture
from rnas.nets import zoo
from rnas.nets.count import macs, parameters
from rnas.published import genotype
from rnas.records.layout import WEIGHTS
from rnas.settings import Features, Reduction
from rnas.vulnerability import network_vulnerability, recorded

CELLS, CHANNELS, SIZE = 5, 8, 16
READINGS: dict[str, tuple[Reduction, Features]] = {
    "F": ("mean", "raw"),
    "F, sum": ("sum", "raw"),
    "F, standardised": ("mean", "standardized"),
    "F, standardised, sum": ("sum", "standardized"),
}
TRAINING = {"epochs": 8, "batch_size": 64, "attack_steps": 3, "drop_path": 0.0, "lr": 0.1}
EVALUATED, MEASURED = 2000, 500
"""Test images, of each class its share: of PGD-20, of F."""


@dataclass(frozen=True)
class Images:
    """Where they are, and how many of each class are trained on."""

    data: str
    data_root: Path | None = None
    per_class: int = 500

    def flags(self) -> dict[str, Any]:
        """As of rnas.search and rnas.train."""
        return {"data": self.data, "data_root": self.data_root, "image_size": SIZE, "limit_per_class": self.per_class}

    def load(self) -> Dataset:
        return load(self.data, root=self.data_root, image_size=SIZE, limit_per_class=self.per_class)


def channels_of(architecture: Architecture, classes: int) -> int:
    """The number of channels whose network is nearest to the common cost."""

    def cost(architecture: Architecture, channels: int) -> int:
        net = zoo.build_genotype(architecture, classes, cells=CELLS, channels=channels, image_size=SIZE)
        return macs(net, SIZE)

    target = cost(genotype("RNAS-L"), CHANNELS)
    return min(range(3, 25), key=lambda channels: abs(cost(architecture, channels) - target))


def trained(architecture: Architecture, folder: Path, images: Images, seed: int) -> nn.Module:
    """The network of a cell, trained in `folder`, in eval mode."""
    if (folder / WEIGHTS).exists():
        return rnas.load(folder)
    return rnas.train(
        architecture,
        out=folder,
        cells=CELLS,
        channels=channels_of(architecture, 10),
        seed=seed,
        resume=True,
        device="cpu",
        **TRAINING,
        **images.flags(),
    )


def tested(net: nn.Module, data: Dataset, attack: str, n: int, folder: Path) -> dict[str, Any]:
    """Accuracies on `n` test images, and of each image whether it is right; the evaluation can be gone on with."""
    kept = folder / f"study-{attack}.json"
    if kept.exists():
        found: dict[str, Any] = read_json(kept)
        return found
    x, y = some(data, n)
    result = rnas.evaluate(net, x, y, [attack], seed=0, state=folder / f"state-{attack}")
    found = {
        "n": n,
        "clean": result.clean,
        attack: result.robust(attack),
        "masks": {name: packed(mask) for name, mask in result.masks.items() if name in ("clean", attack)},
        "warnings": result.summary["warnings"],
    }
    write_json(kept, found)
    return found


def vulnerabilities(net: nn.Module, data: Dataset, n: int = MEASURED) -> dict[str, float]:
    """F of a trained network on test images under PGD-20, by its four readings: mean over the cells, Eq. 6."""
    x, y = some(data, n)
    x_adv = rnas.attack(net, x, y, "pgd20", data.eps_default, seed=0)
    layers = list(layers_of(net, "").values())
    with torch.no_grad(), recorded(net, layers) as outputs:
        net(x)
        clean = [outputs[name] for name in layers]
        net(x_adv)
        adversarial = [outputs[name] for name in layers]
    return {name: float(network_vulnerability(clean, adversarial, *how)) for name, how in READINGS.items()}


def facts(net: nn.Module) -> dict[str, Any]:
    return {"macs": macs(net, SIZE), "parameters": parameters(net)}


def some(data: Dataset, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` test images (n,3,H,W) in [0,1], of each class its share, and their labels (n,): always the same."""
    split = data.test[stratified(data.test.labels, n, seed=0).nonzero()[:, 0]]
    return split.images.float().div_(255), split.labels


def packed(mask: Any) -> str:
    """Booleans (n,) as hexadecimal digits."""
    return np.packbits(np.asarray(mask)).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file with one a line; none where there is no file."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        yield json.loads(line)


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
