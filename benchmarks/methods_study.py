"""Every search method, several seeds, at two equal search costs: which finds cells that are robust when trained?

    python -m benchmarks.methods_study --data cifar10 --out DIR [--seeds 3] [--threads 1] [--results FILE.jsonl]
    python -m benchmarks.methods_study --results FILE.jsonl --table FILE.md

A search is of 5 cells with C = 8 on 250 images of each class at 16x16, PGD-3; `epochs`: every method has 8 epochs
(P-DARTS 9, for its three stages), `passes`: as many epochs as cost what RNAS's 8 do, counted as planning does. Each
found cell is trained alike (`benchmarks/cells.py`), and attacked. A found cell is a line of the results; lines that are
there are not made again, and a search or a training that was cut off goes on. What is not each method's own published
setting is in SHORT: batches of 64, α's learning rate ten times the published one, for a search of 160 steps in place
of tens of thousands.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import rnas
from benchmarks.cells import (
    CELLS,
    CHANNELS,
    EVALUATED,
    Images,
    append,
    facts,
    lines,
    tested,
    trained,
    unpacked,
    vulnerabilities,
)
from benchmarks.timing import machine, program
from rnas.data import Dataset
from rnas.files import write_text
from rnas.genotype import agreement, architecture_from_json
from rnas.nas.methods import load
from rnas.settings import Search, from_flags
from rnas.statistics import holm, mcnemar, paired_interval

METHODS = ("random", "rnas", "darts", "pc_darts", "p_darts", "snas", "racl", "robnet", "dsrna", "advrush")
COSTS = ("epochs", "passes")
EPOCHS = 8
SEARCHED = 250
"""Images of each class that a search is on."""
SHORT: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": 64,
    "cells": CELLS,
    "channels": CHANNELS,
    "attack_steps": 3,
    "lr": 0.05,
    "monitor": 128,
    "device": "cpu",
}
OWN: dict[str, dict[str, Any]] = {
    "rnas": {"bound": "0.5x", "projection_steps": 40, "projection_lr": 0.4},
    "p_darts": {"epochs": 9},
    "random": {"candidates": 10, "finalists": 2},
    "robnet": {"candidates": 8, "finetune": 1},
}
FASTER = 10
"""How many times its published learning rate α has."""


def flags(method: str, where: Images, epochs: int | None = None) -> dict[str, Any]:
    """Of the search by a method."""
    kind = load(method).settings
    chosen = {**SHORT, **OWN.get(method, {}), **Images(where.data, where.data_root, SEARCHED).flags(), "method": method}
    if hasattr(kind, "alpha_lr"):
        chosen["alpha_lr"] = FASTER * kind.alpha_lr
    return {**chosen, **({} if epochs is None else {"epochs": epochs})}


def passes(method: str, where: Images, epochs: int | None = None) -> float:
    """What a search costs, in gradient passes of a batch, without its measurements."""
    settings: Search = from_flags(load(method).settings, {"out": Path(), **flags(method, where, epochs)})
    of = load(method).method
    iterations = 10 * SEARCHED / (1 if of.data == "all" else 2) / settings.batch_size
    costs = [of.cost(settings, epoch, iterations) for epoch in range(1, settings.epochs + 1)]
    costs.append(of.cost_of_choosing(settings, iterations))
    return sum(c.attacks * settings.perturbation.attack_steps + c.passes for c in costs)


def epochs_of(method: str, where: Images) -> int:
    """So many epochs cost what RNAS's cost; of P-DARTS a number that its stages divide."""
    target, step = passes("rnas", where), 3 if method == "p_darts" else 1
    return min(range(step, 60, step), key=lambda epochs: abs(passes(method, where, epochs) - target))


def found(method: str, cost: str, seed: int, where: Images, data: Dataset, folder: Path) -> dict[str, Any]:
    """The line of one cell."""
    epochs = epochs_of(method, where) if cost == "passes" else None
    chosen = flags(method, where, epochs)
    started = time.process_time()
    architecture = rnas.search(out=folder / "search", seed=seed, resume=True, **chosen)
    searching = time.process_time() - started
    net = trained(architecture, folder / "train", where, seed)
    return {
        "method": method,
        "cost": cost,
        "seed": seed,
        "epochs": chosen["epochs"],
        "passes": round(passes(method, where, epochs)),
        "search_cpu_seconds": round(searching),
        "architecture": architecture.to_json(),
        **facts(net),
        **tested(net, data, "pgd20", EVALUATED, folder),
        "vulnerability": vulnerabilities(net, data),
        "machine": machine("cpu"),
    }


def run(where: Images, out: Path, results: Path, seeds: int) -> None:
    """Make the lines that are missing: seed by seed, so that what is there at any time compares."""
    there = {(line["method"], line["cost"], line["seed"]) for line in lines(results)}
    data = where.load()
    for cost in COSTS:
        for seed in range(seeds):
            for method in METHODS:
                if (method, cost, seed) in there:
                    continue
                line = found(method, cost, seed, where, data, out / f"{method}-{cost}-s{seed}")
                append(results, line)
                print(method, cost, seed, f"PGD-20 {100 * line['pgd20']:.1f} %", flush=True)


# --- the table


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: of each cost a table with a row a method, percent, mean ± standard deviation over the seeds."""
    parts = []
    for cost in COSTS:
        rows = [line for line in found if line["cost"] == cost]
        if rows:
            parts.append(f"## Equal {cost}\n\n" + "\n".join(_rows(rows)))
    return "\n\n".join(parts) + "\n"


def _rows(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    columns = ["", "epochs", "passes", "seeds", "clean", "PGD-20", "F · 10⁴", "M MACs", "agreement"]
    columns.append("PGD-20 minus random, by seed (Holm's p)")
    yield f"| {' | '.join(columns)} |"
    yield "|" + " - |" * len(columns)
    compared = dict(_compared(found))
    for method in METHODS:
        of = [line for line in found if line["method"] == method]
        if not of:
            continue
        cells = [architecture_from_json(line["architecture"]) for line in of]
        alike = [agreement(a, b) for k, a in enumerate(cells) for b in cells[:k]]
        shown = [
            method,
            str(of[0]["epochs"]),
            str(of[0]["passes"]),
            str(len(of)),
            spread([100 * line["clean"] for line in of]),
            spread([100 * line["pgd20"] for line in of]),
            spread([1e4 * line["vulnerability"]["F"] for line in of], 2),
            spread([line["macs"] / 1e6 for line in of], 2),
            f"{fmean(alike):.2f}" if alike else "-",
            ", ".join(compared[line["method"], line["seed"]] for line in of if (method, line["seed"]) in compared),
        ]
        yield f"| {' | '.join(shown)} |"


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _compared(found: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], str]]:
    """Of each cell the difference from the random one of its seed on the same images, with its 95 % interval and
    McNemar's p, corrected by Holm for all the pairs of a table."""
    random = {line["seed"]: _right(line) for line in found if line["method"] == "random"}
    pairs = {}
    for line in found:
        if line["method"] != "random" and line["seed"] in random:
            a, b = _right(line), random[line["seed"]]
            pairs[line["method"], line["seed"]] = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    corrected = holm([mcnemar(ours, theirs) for ours, theirs, _ in pairs.values()])
    for (key, (ours, theirs, n)), p in zip(pairs.items(), corrected, strict=True):
        low, high = paired_interval(ours, theirs, n)
        yield key, f"{100 * (ours - theirs) / n:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ({p:.2g})"


def _right(line: dict[str, Any]) -> Any:
    return unpacked(line["masks"]["pgd20"], line["n"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, help="the folder of searches and trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="write the table of --results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.out is not None:
        run(Images(options.data, options.data_root), options.out, options.results, options.seeds)
    text = table(list(lines(options.results)))
    print(text)
    if options.table is not None:
        write_text(options.table, text)


if __name__ == "__main__":
    program(main)
