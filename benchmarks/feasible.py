"""Does the bound hold at the end of a search? Many seeds, several bounds; now, and as version 0.1.0 projected.

    python -m benchmarks.feasible --data digits [--seeds 20] [--bounds 0.8x 0.5x 0.2x] --results FILE.jsonl
    python -m benchmarks.feasible --results FILE.jsonl --json FILE.json

The search is that of `make demo` (on other images: 2,000 of them at 16x16). 0.1.0 stopped a projection after its
planned steps, feasible or not, and went on to the end of them where it was. Each search is a line of the results; those
that are there are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.cells import append, lines
from benchmarks.timing import machine, program, save
from rnas.nas.methods import rnas as method
from rnas.nas.search import search
from rnas.planning.budgets import demo
from rnas.records.folder import read_log
from rnas.settings import Source

VARIANTS = ("0.1.0", "now")


def settings(data: str, root: Path | None, bound: str, seed: int) -> method.Settings:
    """Of the demo's search."""
    chosen = demo(method.Settings).search
    source = Source(data, root) if data == "digits" else Source(data, root, image_size=16, limit_per_class=200)
    return replace(chosen, source=source, bound=bound, seed=seed, device="cpu")


def run(variant: str, chosen: method.Settings) -> dict[str, Any]:
    """One search."""
    near = method.NEAR
    if variant == "0.1.0":
        method.NEAR, chosen = 0.0, replace(chosen, projection_cap=chosen.projection_steps)
    started = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            search(replace(chosen, out=Path(folder)))
            epochs = [e for e in read_log(Path(folder)) if e["event"] == "epoch" and e["phase"] == "search"]
    finally:
        method.NEAR = near
    last = epochs[-1]
    return {
        "F/H": last["F"] / last["H"],
        "F of the cell / H": last["F_cell"] / last["H"],
        "none": last["none_share"],
        "steps": [e["projection_steps"] for e in epochs],
        "distance": [e["distance"] for e in epochs],
        "seconds": [e["seconds"] for e in epochs],
        "cpu_seconds": time.process_time() - started,
        "clean": last["val"]["clean_accuracy"],
        "adversarial": last["val"]["adversarial_accuracy"],
        "genotype": last["genotype"],
    }


def summary(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each data set, bound and variant."""
    for key in dict.fromkeys((line["data"], line["bound"], line["variant"]) for line in found):
        of = [line for line in found if (line["data"], line["bound"], line["variant"]) == key]
        ratios = [line["F/H"] for line in of]
        yield {
            **dict(zip(("data", "bound", "variant"), key, strict=True)),
            "seeds": len(of),
            "feasible": sum(r <= 1 for r in ratios),
            "F/H": [
                min(line["F/H"] for line in of),
                median(line["F/H"] for line in of),
                max(line["F/H"] for line in of),
            ],
            "steps": fmean(sum(line["steps"]) for line in of),
            "distance": fmean(sum(line["distance"]) for line in of),
            "none": fmean(line["none"] for line in of),
            "cpu_seconds": fmean(line["cpu_seconds"] for line in of),
            "adversarial": fmean(line["adversarial"] for line in of),
        }


def text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'data':10}{'bound':>7} {'variant':8}{'feasible':>9}  F/H: least, median, most   steps  moved   none  CPU s"
    ]
    for r in rows:
        ratios = ", ".join(f"{v:.3f}" for v in r["F/H"])
        lines.append(
            f"{Path(r['data']).name:10}{r['bound']:>7} {r['variant']:8}{r['feasible']:>4}/{r['seeds']:<4}  {ratios:26}"
            f"{r['steps']:6.0f} {r['distance']:6.2f} {r['none']:6.1%} {r['cpu_seconds']:6.0f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="digits, cifar10, ...")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--bounds", nargs="+", default=["0.5x", "0.8x", "0.2x"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    there = {tuple(line[k] for k in ("data", "bound", "variant", "seed")) for line in lines(options.results)}
    for data in options.data:
        for bound in options.bounds:
            for seed in range(options.seeds):
                for variant in VARIANTS:
                    if (data, bound, variant, seed) in there:
                        continue
                    done = run(variant, settings(data, options.data_root, bound, seed))
                    append(options.results, {"data": data, "bound": bound, "variant": variant, "seed": seed, **done})
                    print(data, bound, seed, variant, f"F/H {done['F/H']:.3f}, steps {done['steps']}", flush=True)
    rows = list(summary(list(lines(options.results))))
    print(text(rows))
    save(options.json, {"machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    program(main)
