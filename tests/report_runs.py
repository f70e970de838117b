"""Run folders as `rnas run` makes them, with made-up but plausible content, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rnas.genotype import OPERATIONS, Cell, Genotype

GENOTYPE = Genotype(
    Cell(
        (
            (("dil_conv_5x5", 0), ("dil_conv_5x5", 1)),
            (("skip_connect", 2), ("dil_conv_5x5", 0)),
            (("sep_conv_5x5", 0), ("sep_conv_3x3", 1)),
            (("skip_connect", 2), ("avg_pool_3x3", 0)),
        ),
        (2, 3, 4, 5),
    ),
    Cell(
        (
            (("sep_conv_5x5", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_5x5", 2), ("sep_conv_3x3", 1)),
            (("dil_conv_5x5", 2), ("dil_conv_3x3", 3)),
            (("sep_conv_3x3", 2), ("sep_conv_5x5", 3)),
        ),
        (2, 3, 4, 5),
    ),
)
ENVIRONMENT = {
    "command": "rnas run --data digits --out runs/demo",
    "python": "3.11.9",
    "versions": {"rnas": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
    "platform": "Linux",
    "cpus": 2,
    "device": "cpu",
    "commit": None,
    "seed": 0,
}


def wilson(right: int, n: int) -> list[float]:
    z = 1.96
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_log(folder: Path, events: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")


def make_search(folder: Path, epochs: int = 24, warmup: int = 6, seed: int = 0) -> Path:
    """A finished search."""
    draw = np.random.default_rng(seed)
    write_json(
        folder / "settings.json",
        {
            "command": "search",
            "source": {"data": "digits", "image_size": None},
            "space": {"cells": 4, "channels": 8, "nodes": 4, "operations": list(OPERATIONS)},
            "bound": "0.5x",
            "epochs": epochs,
            "seed": seed,
            "rnas": "0.1.0",
        },
    )
    write_json(folder / "environment.json", ENVIRONMENT)
    events: list[dict[str, Any]] = []
    bound = None
    for e in range(1, epochs + 1):
        warm, t = e <= warmup, e / epochs
        before = 1.5e-4 * (1 + 0.4 * math.sin(e)) * (1.3 if warm else 0.8 - 0.25 * t)
        f = before if bound is None else min(before, bound * float(draw.uniform(0.9, 0.99)))
        if e == warmup:
            bound = 0.5 * f
        clean, adversarial = 0.97 - 0.75 * math.exp(-5 * t), 0.86 - 0.7 * math.exp(-3 * t)
        halves = {
            half: {
                "clean_loss": 2.3 * math.exp(-4 * t) + 0.1 + shift,
                "clean_accuracy": clean - shift,
                "adversarial_loss": 2.3 * math.exp(-2 * t) + 0.3 + shift,
                "adversarial_accuracy": adversarial - shift,
            }
            for half, shift in (("train", 0.0), ("val", 0.02))
        }
        events.append(
            {
                "event": "epoch",
                "epoch": e,
                "phase": "warmup" if warm else "search",
                "theta_loss": 2.2 * math.exp(-2.5 * t) + 0.4,
                "alpha_loss": None if warm else 2.2 * math.exp(-2 * t) + 0.6,
                **halves,
                "F": f,
                "F_before": None if warm else before,
                "H": bound,
                "multiplier": None if warm else 0.3 + 0.8 * t,
                "distance": None if warm else 0.5 * (1.2 - t),
                "projection_steps": None if warm else 20,
                "none_share": 0.125 + 0.1 * t,
                "genotype": GENOTYPE.to_json(),
                "lr": 0.01 * (1 + math.cos(math.pi * t)) / 2,
                "seconds": 3.0,
                "images_per_second": 800.0,
            }
        )
    write_log(folder, events)
    GENOTYPE.save(folder / "genotype.json")
    alphas = {}
    for kind, cell in (("normal", GENOTYPE.normal), ("reduce", GENOTYPE.reduce)):
        steps = draw.normal(0, 0.045, (epochs + 1, 14, 8))
        edge = 0
        for node, edges in enumerate(cell.nodes):
            for source in range(node + 2):
                for operation, s in edges:
                    if s == source:
                        steps[:, edge, OPERATIONS.index(operation)] += 0.05
                edge += 1
        steps[: warmup + 1] = 0
        alphas[kind] = 1e-3 * draw.normal(size=(14, 8)) + steps.cumsum(0)
    np.savez(folder / "alphas.npz", **alphas, operations=np.array(OPERATIONS))
    return folder


def make_network(
    folder: Path,
    standard: bool = False,
    epochs: int = 20,
    n: int = 360,
    classes: list[str] | None = None,
    arch: str = "genotype",
    dataset: str = "digits",
    seed: int = 1,
    warnings: list[str] | None = None,
    extras: bool = True,
    eps: float = 16 / 255,
) -> Path:
    """A trained and evaluated network; `extras`: example images and the distortion of its layers."""
    draw = np.random.default_rng(seed)
    classes = classes or [str(k) for k in range(10)]
    write_json(
        folder / "settings.json",
        {"command": "train", "arch": arch, "standard": standard, "loss": "pgd", "epochs": epochs, "rnas": "0.1.0"},
    )
    write_json(folder / "environment.json", ENVIRONMENT)
    write_json(
        folder / "model.json",
        {
            "arch": arch,
            "genotype": GENOTYPE.to_json() if arch == "genotype" else None,
            "classes": classes,
            "cells": 4,
            "channels": 8,
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "image_size": [16, 16],
            "dataset": dataset,
            "parameters": 48_230,
        },
    )
    key = "clean_accuracy" if standard else "adversarial_accuracy"
    other = "adversarial_accuracy" if standard else "clean_accuracy"
    write_log(
        folder,
        [
            {
                "event": "epoch",
                "epoch": e,
                "loss": 2.2 * math.exp(-(5 if standard else 2.5) * e / epochs) + 0.1,
                "train": {key: 1 - 0.8 * math.exp(-4 * e / epochs), other: None},
                "lr": 0.05 * (1 + math.cos(math.pi * e / epochs)) / 2,
                "drop_path": 0.1 * e / epochs,
                "seconds": 2.1,
                "images_per_second": 900.0,
            }
            for e in range(1, epochs + 1)
        ],
    )
    clean = draw.random(n) < (0.99 if standard else 0.97)
    shares = {"fgsm": 0.6, "pgd20": 0.49, "cw": 0.47} if standard else {"fgsm": 0.88, "pgd20": 0.83, "cw": 0.82}
    hardness = draw.random(n)
    masks = {"clean": clean, **{name: clean & (hardness < share) for name, share in shares.items()}}
    union = np.logical_and.reduce(list(masks.values()))
    labels = np.arange(n) % len(classes)
    np.savez(folder / "masks.npz", **masks, labels=labels)

    def entry(mask: Any, **more: Any) -> dict[str, Any]:
        return {"accuracy": float(mask.mean()), "interval": wilson(int(mask.sum()), n), **more}

    write_json(
        folder / "evaluation.json",
        {
            "eps": eps,
            "norm": "linf",
            "n": n,
            "dataset": dataset,
            "model": arch,
            "seed": 0,
            "images_sha256": "a" * 64,
            "warnings": warnings or [],
            "clean": entry(clean),
            "attacks": {name: entry(masks[name], seconds=1.4 * k + 0.3) for k, name in enumerate(shares)},
            "union": entry(union),
        },
    )
    if extras:
        k = 8
        yy, xx = np.mgrid[:16, :16]
        images = np.stack([np.hypot(yy - 8, xx - 8 + 0.4 * i) < 5 for i in range(k)])[..., None] * np.ones(3)
        original = (255 * (0.1 + 0.8 * images)).astype(np.uint8)
        noise = 16 / 255 * np.sign(draw.normal(size=original.shape))
        np.savez(
            folder / "examples.npz",
            clean=original,
            adversarial=np.clip(original / 255 + noise, 0, 1).astype(np.float32),
            label=labels[:k],
            clean_prediction=labels[:k],
            adversarial_prediction=np.where(draw.random(k) < 0.5, labels[:k], (labels[:k] + 3) % len(classes)),
            attack=np.array("pgd20"),
        )
        growth = np.geomspace(2e-5, 4e-4 * (4 if standard else 1), 5)
        write_json(
            folder / "distortion.json",
            {"layers": ["stem", *(f"cells.{i}" for i in range(4))], "vulnerability": growth.tolist(), "eps": 16 / 255},
        )
    return folder


def make_run(folder: Path, **network: Any) -> Path:
    """What the demo leaves behind: a search, and its cell trained adversarially and on clean images."""
    make_search(folder / "search")
    make_network(folder / "train", **network)
    make_network(folder / "train-standard", standard=True, seed=2, **network)
    return folder
