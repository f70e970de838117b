"""Is A more robust than B? Evaluations of the same images, compared pair by pair, image by image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.records.arrays import UNBOUNDED
from rnas.report.read import NetworkPart, differing, read_parts
from rnas.report.words import attack_name
from rnas.statistics import holm, mcnemar, paired_interval
from rnas.wording import apart

Mask = NDArray[np.bool_]


LEVEL = 0.05
"""A corrected p-value below this shows a difference."""


@dataclass(frozen=True)
class Comparison:
    """Two networks under one attack, on the same `n` images. Accuracies and differences are shares, not percent."""

    attack: str
    a: str
    b: str
    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    """Images that only A classifies correctly."""
    only_b: int
    difference: float
    """Accuracy of A minus accuracy of B."""
    interval: tuple[float, float]
    """95 % for the difference: adjusted Wald interval for paired proportions (Bonett and Price 2012)."""
    p: float
    """McNemar's exact test: how likely a split of the disagreeing images at least as uneven is by chance."""
    p_holm: float = 1.0
    """`p`, corrected for all comparisons made at once (Holm 1979)."""
    evaluation_a: str = "evaluation.json"
    """The file of A's evaluation."""
    evaluation_b: str = "evaluation.json"


def compare(runs: Sequence[Path | str]) -> list[Comparison]:
    """Every two of the evaluated networks in `runs`, under every attack that both faced, and under the union of those
    that ε bounds. A folder of `rnas run` may stand for several networks; of several evaluations of a network the best
    founded counts, or the best founded of a test that all networks faced.

    RnasError if fewer than two evaluations are found, or if they are not of the same images under the same threat."""
    parts = read_parts([Path(run) for run in runs])
    return compare_networks([p for p in parts if isinstance(p, NetworkPart) and p.evaluation is not None])


def compare_networks(networks: Sequence[NetworkPart]) -> list[Comparison]:
    """`compare`, for evaluations that are already read."""
    if len(networks) < 2:
        found = f"only {networks[0].folder}" if networks else "none"
        raise RnasError(f"compare needs two or more evaluated networks, found {found}: rnas evaluate makes them")
    folders = [part.folder.resolve() for part in networks]
    for part, folder in zip(networks, folders, strict=True):
        if folders.count(folder) > 1:
            raise RnasError(f"{part.folder} is named twice: a network compared with itself shows nothing")
    for part in networks[1:]:
        _check_same(networks[0], part)
    made = []
    for a, b in combinations(networks, 2):
        attacks = [name for name in a.masks if name != "clean" and name in b.masks]
        if "clean" in a.masks and "clean" in b.masks:
            made.append(_compare("clean", a, b, a.masks["clean"], b.masks["clean"]))
        made += [_compare(name, a, b, a.masks[name], b.masks[name]) for name in attacks]
        bounded = [name for name in attacks if name not in UNBOUNDED]
        if len(bounded) > 1:
            made.append(_compare("union", a, b, *(_survivors(part, bounded) for part in (a, b))))
    corrected = holm([c.p for c in made])
    return [replace(c, p_holm=p) for c, p in zip(made, corrected, strict=True)]


def _survivors(part: NetworkPart, attacks: Sequence[str]) -> Mask:
    """Which images withstand all `attacks`, and are right to begin with."""
    names = [*attacks, *(["clean"] if "clean" in part.masks else [])]
    survivors: Mask = np.logical_and.reduce([part.masks[name] for name in names])
    return survivors


def _check_same(a: NetworkPart, b: NetworkPart) -> None:
    for part in (a, b):
        if not part.masks:
            raise RnasError(f"{part.folder} has no masks.npz: rnas evaluate {part.folder} writes one")
    one, other = a.evaluation, b.evaluation
    assert one is not None
    assert other is not None
    if (key := differing(one, other)) is not None:
        raise RnasError(
            f"{a.name} and {b.name} were not evaluated on the same images under the same threat: "
            f"{key} is {getattr(one, key)!r} in one and {getattr(other, key)!r} in the other"
        )
    lengths = {len(mask) for part in (a, b) for mask in part.masks.values()}
    labels = a.labels is None or b.labels is None or np.array_equal(a.labels, b.labels)
    if len(lengths) > 1 or not labels:
        raise RnasError(f"{a.name} and {b.name} were not evaluated on the same images: their masks.npz differ")


def _compare(
    attack: str,
    a: NetworkPart,
    b: NetworkPart,
    right_a: Mask,
    right_b: Mask,
) -> Comparison:
    n = len(right_a)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return Comparison(
        attack=attack,
        a=a.name,
        b=b.name,
        n=n,
        accuracy_a=float(right_a.mean()),
        accuracy_b=float(right_b.mean()),
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / n,
        interval=paired_interval(only_a, only_b, n),
        p=mcnemar(only_a, only_b),
        evaluation_a=a.shown,
        evaluation_b=b.shown,
    )


def shown_best(rows: Sequence[Comparison]) -> dict[str, str]:
    """For every attack the network that is shown to be better than each of the others, where there is one."""
    best: dict[str, str] = {}
    for attack in dict.fromkeys(row.attack for row in rows):
        here = [row for row in rows if row.attack == attack]
        names = {name for row in here for name in (row.a, row.b)}
        won = [row.a if row.difference > 0 else row.b for row in here if row.p_holm < LEVEL]
        best.update((attack, name) for name in names if won.count(name) == len(names) - 1)
    return best


def verdict(comparison: Comparison) -> str:
    """The comparison in a word or two, by its corrected p-value."""
    if comparison.p_holm >= LEVEL:
        return "no difference shown"
    better = comparison.a if comparison.difference > 0 else comparison.b
    return f"{better} {'more accurate' if comparison.attack == 'clean' else 'more robust'}"


def p_value(p: float) -> str:
    """A p-value as it is written: three digits, more where it would look like the level of the verdict, or a power of
    ten where it is small."""
    return apart(p, LEVEL, form=lambda v, n: f"{v:.{n}f}")[0] if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")


def points(comparison: Comparison) -> tuple[str, str]:
    """The difference and its interval in percentage points: what is not 0 does not look like 0."""
    _, difference, low, high = apart(0.0, comparison.difference, *comparison.interval, form=_points)
    return difference, f"{low} to {high}"


def _points(share: float, digits: int) -> str:
    return f"{round(100 * share, digits - 2) + 0.0:+.{digits - 2}f}".replace("-", "−")


def to_json(rows: Sequence[Comparison]) -> str:
    """The comparisons as a JSON list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)


def to_text(rows: Sequence[Comparison]) -> str:
    """The comparisons as tables of 80 columns in plain text, one for each pair, and below them what they mean."""
    head = ("attack", "A %", "B %", "A−B", "95 % interval", "A only", "B only", "p", "better")
    table: list[tuple[str, ...]] = [head]
    for r in rows:
        better = "?" if r.p_holm >= LEVEL else "A" if r.difference > 0 else "B"
        shares = apart(r.accuracy_a, r.accuracy_b, form=lambda share, digits: f"{100 * share:.{digits - 2}f}")
        counts = str(r.only_a), str(r.only_b)
        table.append((attack_name(r.attack), *shares, *points(r), *counts, p_value(r.p_holm), better))
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    lines: list[str] = []
    for i, r in enumerate(rows):
        if i == 0 or (r.a, r.b) != (rows[i - 1].a, rows[i - 1].b):
            lines += ["", f"A: {r.a}", f"B: {r.b}", f"{r.n} images", line(head)]
        lines.append(line(table[i + 1]))
    notes = (
        "A−B: percentage points, with the adjusted Wald interval for paired",
        "proportions (Bonett and Price 2012).",
        "p: McNemar's exact test on the images where A and B disagree, corrected for",
        f"all {len(rows)} rows together (Holm); better: where p is below {LEVEL:g}, else ?.",
        "An interval stands for its row alone: it can leave out 0 where the corrected",
        "test shows no difference.",
    )
    files = {name: file for r in rows for name, file in ((r.a, r.evaluation_a), (r.b, r.evaluation_b))}
    which = [f"Evaluation of {name}: {file}" for name, file in files.items()]
    return "\n".join([*lines[1:], "", *notes, *which])
