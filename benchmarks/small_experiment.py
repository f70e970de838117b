"""Published cells, a cell found here, and ResNet18, at the same cost: which is the most robust?

    python -m benchmarks.small_experiment --data cifar10 --out DIR [--seeds 3] [--stage train|evaluate|all] [--json F]

Every network has 5 cells (ResNet18: its own blocks) and as many channels as bring it nearest to RNAS-L's
multiply-accumulates at C = 8 and 16x16 pixels. For each seed the search is run anew, and every network is trained
adversarially (PGD-7) on the same 500 images of each class, then attacked. What is finished in DIR is not done again;
the stages may run at the same time in two processes. At this size accuracies compare with each other only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rnas
from benchmarks.timing import machine, program, save
from rnas import data as images
from rnas.console import Console
from rnas.data import Dataset
from rnas.data.dataset import stratified
from rnas.evaluation.evaluate import wilson
from rnas.files import read_json, replacing, write_json
from rnas.genotype import Genotype, architecture_from_json
from rnas.nas.methods.rnas import Settings as Search
from rnas.nas.search import search
from rnas.nets import zoo
from rnas.nets.count import macs, parameters
from rnas.nets.handmade import resnet18
from rnas.records.arrays import write_arrays
from rnas.records.layout import GENOTYPE
from rnas.settings import SearchSpace, Source, Train
from rnas.statistics import mcnemar, paired_interval
from rnas.training.train import fit

PUBLISHED = ("RNAS-L", "RNAS-H", "DARTS", "PC-DARTS", "AdvRush")
SEARCHED, RESIDUAL = "RNAS, searched here", "ResNet18"
CELLS, CHANNELS, SIZE = 5, 8, 16
ATTACKS = {"pgd20": 2000, "aa": 100}  # and on how many test images, of each class its share
WEIGHTS, RESULT = "weights.pt", "result.json"


def source(data: str, root: Path | None, per_class: int) -> Source:
    return Source(data, root, image_size=SIZE, limit_per_class=per_class)


def found_here(where: Source, out: Path, seed: int) -> Genotype:
    """The cell of RNAS under half of the warm-up's vulnerability, searched on 250 training images of each class."""
    folder = out / f"search-s{seed}"
    if (folder / GENOTYPE).exists():
        genotype = architecture_from_json(read_json(folder / GENOTYPE))
        assert isinstance(genotype, Genotype)
        return genotype
    settings = Search(
        folder,
        source(where.data, where.data_root, 250),
        SearchSpace(cells=CELLS, channels=CHANNELS),
        bound="0.5x",
        epochs=6,
        warmup=3,
        batch_size=64,
        lr=0.05,
        alpha_lr=3e-3,
        projection_steps=40,
        projection_lr=0.4,
        monitor=128,
        seed=seed,
        resume=True,
    )
    return search(settings, Console())


def width_for(build: Any, target: float) -> int:
    """The number of channels whose network is nearest to `target` multiply-accumulates."""
    return min(range(4, 17), key=lambda channels: abs(macs(build(channels), SIZE) - target))


def network(name: str, where: Source, out: Path, seed: int, data: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """An untrained network of the common cost, and what is to be said of it."""
    classes, (mean, std) = len(data.classes), data.statistics()
    options: dict[str, Any] = {"cells": CELLS, "image_size": SIZE, "mean": mean, "std": std}
    genotype = found_here(where, out, seed) if name == SEARCHED else None

    def build(channels: int) -> nn.Module:
        if name == RESIDUAL:
            return resnet18(classes, mean, std, width=channels)
        if genotype is not None:
            return zoo.build_genotype(genotype, classes, channels=channels, **options)
        return zoo.build(name, classes, channels=channels, **options)

    target = macs(zoo.build("RNAS-L", classes, channels=CHANNELS, **options), SIZE)
    channels = width_for(build, target)
    torch.manual_seed(seed)
    net = build(channels)
    facts = {"channels": channels, "macs": macs(net, SIZE), "parameters": parameters(net)}
    return net, facts | ({"genotype": genotype.to_json()} if genotype else {})


def folder_of(name: str, seed: int, out: Path) -> Path:
    return out / f"{name}-s{seed}".replace(" ", "-").replace(",", "")


def train_all(runs: list[tuple[int, str]], where: Source, out: Path, data: Dataset) -> None:
    for seed, name in runs:
        folder = folder_of(name, seed, out)
        if (folder / WEIGHTS).exists():
            continue
        net, facts = network(name, where, out, seed, data)
        settings = Train(name, folder, where, epochs=10, batch_size=64, drop_path=0.0, seed=seed, resume=True)
        started = time.process_time()
        fit(net, data, settings, Console(), facts)
        write_json(folder / "facts.json", {**facts, "train_cpu_seconds": time.process_time() - started})
        with replacing(folder / WEIGHTS) as path:
            torch.save(net.state_dict(), path)


def evaluate_all(runs: list[tuple[int, str]], where: Source, out: Path, data: Dataset, wait: bool) -> None:
    for seed, name in runs:
        folder = folder_of(name, seed, out)
        while wait and not (folder / WEIGHTS).exists():
            time.sleep(5)
        if (folder / RESULT).exists():
            continue
        net, _ = network(name, where, out, seed, data)
        net.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
        found: dict[str, Any] = {"facts": read_json(folder / "facts.json"), "attacks": {}, "warnings": []}
        masks: dict[str, np.ndarray[Any, Any]] = {}
        for attack, n in ATTACKS.items():
            at = stratified(data.test.labels, n, seed=0).nonzero()[:, 0]
            split = data.test[at]
            x, y = split.images.float().div_(255), split.labels
            result = rnas.evaluate(net, x, y, [attack], seed=seed, state=folder / f"state-{attack}")
            found["attacks"][attack] = {"n": n, **result.summary["attacks"][attack]}
            found["warnings"] += result.summary["warnings"]
            if attack == "pgd20":
                found["clean"] = {"n": n, **result.summary["clean"]}
                masks["clean"] = result.masks["clean"]
            masks[attack] = result.masks[attack]
        write_arrays(folder / "masks.npz", masks)
        write_json(folder / RESULT, found)
        print(name, seed, {k: round(v["accuracy"], 3) for k, v in found["attacks"].items()}, flush=True)


def rows(runs: list[tuple[int, str]], out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every architecture: mean and standard deviation over the seeds, and the paired comparison with RNAS-L."""
    for name in dict.fromkeys(name for _, name in runs):
        seeds = [seed for seed, other in runs if other == name]
        folders = [folder_of(name, seed, out) for seed in seeds]
        found = [read_json(folder / RESULT) for folder in folders]
        row: dict[str, Any] = {"facts": [f["facts"] for f in found], "seeds": seeds}
        for key in ("clean", *ATTACKS):
            cells = [f["clean"] if key == "clean" else f["attacks"][key] for f in found]
            accuracies, n = [c["accuracy"] for c in cells], cells[0]["n"]
            mean = statistics.fmean(accuracies)
            row[key] = {
                "mean": mean,
                "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "interval": list(wilson_of_mean(mean, n)),
                "n": n,
                "accuracies": accuracies,
                "against RNAS-L": [
                    _paired(out, key, folder, seed) for folder, seed in zip(folders, seeds, strict=True)
                ],
            }
        row["warnings"] = [w for f in found for w in f["warnings"]]
        yield name, row


def wilson_of_mean(mean: float, n: int) -> tuple[float, float]:
    return wilson(round(mean * n), n)


def _paired(out: Path, key: str, folder: Path, seed: int) -> dict[str, Any]:
    """This network minus RNAS-L of the same seed on the same images, with McNemar's exact p."""
    with np.load(folder / "masks.npz") as a, np.load(out / f"RNAS-L-s{seed}" / "masks.npz") as b:
        only_a, only_b, n = int((a[key] & ~b[key]).sum()), int((b[key] & ~a[key]).sum()), len(a[key])
    interval = list(paired_interval(only_a, only_b, n))
    return {"difference": (only_a - only_b) / n, "interval": interval, "p": mcnemar(only_a, only_b)}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: percent, mean ± standard deviation over the seeds, 95 % Wilson interval of the mean."""
    keys = ("clean", *ATTACKS)
    lines = [
        f"{result['data']}. {result['training']}. In brackets what the number of test images leaves open (95 %).",
        "",
        f"| | C | MACs | parameters | {' | '.join(keys)} | PGD-20 minus RNAS-L, by seed (p) |",
        f"|{' - |' * (5 + len(keys))}",
    ]
    for name, row in result["networks"].items():
        facts = row["facts"]
        sizes = [_range([f["channels"] for f in facts], 1, "")]
        sizes += [_range([f["macs"] for f in facts], 1e6, " M"), _range([f["parameters"] for f in facts], 1e3, " k")]
        cells = [_percent(row[key]) for key in keys]
        paired = [f"{100 * d['difference']:+.1f} ({d['p']:.2g})" for d in row["pgd20"]["against RNAS-L"]]
        lines.append(f"| {name} | {' | '.join([*sizes, *cells])} | {'' if name == 'RNAS-L' else ', '.join(paired)} |")
    return "\n".join(lines) + "\n"


def _range(values: list[float], unit: float, suffix: str) -> str:
    shown = dict.fromkeys(f"{v / unit:.3g}" for v in sorted(values))
    return " to ".join([*shown][:: max(1, len(shown) - 1)]) + suffix


def _percent(cell: dict[str, Any]) -> str:
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    low, high = (100 * v for v in cell["interval"])
    return f"{100 * cell['mean']:.1f}{spread} [{low:.1f}, {high:.1f}] (n = {cell['n']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--data-name", default=None, help="how the results call the data, such as: CIFAR-10, lossy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stage", choices=("train", "evaluate", "all"), default="all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    where = source(arguments.data, arguments.data_root, 500)
    data = images.load(where.data, root=where.data_root, image_size=SIZE, limit_per_class=500, seed=0)
    runs = [(seed, name) for seed in range(arguments.seeds) for name in (*PUBLISHED, RESIDUAL, SEARCHED)]
    if arguments.stage != "evaluate":
        train_all(runs, where, arguments.out, data)
    if arguments.stage != "train":
        evaluate_all(runs, where, arguments.out, data, wait=arguments.stage == "evaluate")
        result = {
            "data": f"{arguments.data_name or data.name}, {len(data.train)} training images at {SIZE}x{SIZE}",
            "training": "PGD-7 (8/255), 10 epochs of batch 64, SGD 0.1 falling along a cosine, crop and flip",
            "machine": machine("cpu"),
            "networks": dict(rows(runs, arguments.out)),
        }
        print(table(result))
        save(arguments.json, result)
        if arguments.json is not None:
            arguments.json.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    program(main)
