"""What the runs of a plan found, as values beside the paper's. Reads run folders; no torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnas import published as paper
from rnas.records import codec
from rnas.records.evaluations import as_asked, read_all
from rnas.records.folder import read_events
from rnas.records.layout import DISTORTION, EVALUATION, GENOTYPE, META
from rnas.records.schema import Description, Evaluation, LayerDistortion, SearchEpoch
from rnas.report.read import read_distortion
from rnas.reproduce.plan import AT, ST, Plan, Row
from rnas.settings import Evaluate, Search
from rnas.statistics import wilson

KEYS = ("clean", "fgsm", "pgd20", "pgd100", "cw", "aa")


@dataclass(frozen=True)
class Value:
    """One cell of a table. Accuracies in percent."""

    mean: float | None = None
    """Over the seeds; None if nothing was measured."""
    std: float | None = None
    """Sample standard deviation over the seeds; None with fewer than two."""
    interval: tuple[float, float] | None = None
    """95 % Wilson interval of the mean: what these test images leave open, not what other seeds would."""
    seeds: int = 0
    images: int = 0
    paper: float | None = None
    reason: str | None = None
    """Why it is empty."""

    @property
    def difference(self) -> float | None:
        """Measured minus the paper's."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    model: str
    parameters: float | None
    """Measured, in millions."""
    paper_parameters: float | None
    values: dict[str, Value]
    """By column, such as at_clean."""


def columns(number: int) -> list[str]:
    """The columns of the paper's table `number`."""
    at = [f"{AT}_{key}" for key in KEYS]
    return [*at, f"{ST}_clean", f"{ST}_fgsm"] if number == 1 else at


def collect(plan: Plan, failed: Mapping[Path, str], number: int | None = None) -> list[Line]:
    """The rows of the plan's table (of table `number` if the plan is a figure's)."""
    number = number or plan.number
    published = {str(figures["model"]): figures for figures in paper.table(number)}
    lines = []
    for row in plan.rows:
        figures = published[row.model]
        values = {
            column: _value(plan, row, column, _figure(figures, column, number), failed) for column in columns(number)
        }
        parameters = next((p for folders in row.runs.values() for f in folders if (p := _parameters(f))), None)
        architecture = paper.find(row.model)
        lines.append(Line(row.model, parameters, architecture.paper_params, values))
    return lines


def _figure(figures: Mapping[str, Any], column: str, number: int) -> float | None:
    found = figures.get(column if number == 1 else column.removeprefix(f"{AT}_"))
    return float(found) if found is not None else None


def _value(plan: Plan, row: Row, column: str, published: float | None, failed: Mapping[Path, str]) -> Value:
    training, _, key = column.partition("_")
    if row.reason is not None:
        return Value(paper=published, reason=row.reason)
    folders = row.runs.get(training, ())
    if not folders:
        return Value(paper=published, reason="not part of this figure")
    found = [e for folder in folders if (e := evaluation(plan, folder, key)) is not None]
    if not found:
        why = next((failed[p] for f in folders for p in (f, f / EVALUATION) if p in failed), None)
        return Value(paper=published, reason=f"failed: {why}" if why else "not run yet")
    return value([a for a, _ in found], min(n for _, n in found), published)


def value(accuracies: Sequence[float], images: int, published: float | None = None) -> Value:
    """The cell for accuracies (0 to 1) of networks of several seeds, each on the same `images` test images."""
    mean = statistics.fmean(accuracies)
    low, high = wilson(mean, images)
    return Value(
        mean=100 * mean,
        std=100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        interval=(100 * low, 100 * high),
        seeds=len(accuracies),
        images=images,
        paper=published,
    )


def evaluation(plan: Plan, folder: Path, key: str) -> tuple[float, int] | None:
    """Accuracy under the attack `key` (or clean) and the number of images; None if it was not evaluated."""
    found = _evaluation(plan, folder)
    entry = None if found is None else found.figure(key)
    return None if found is None or entry is None else (entry.accuracy, found.n)


def _evaluation(plan: Plan, folder: Path) -> Evaluation | None:
    """The evaluation in `folder` that the plan asked for, or else the best founded one; None if there is none.
    RnasError if one is damaged."""
    step = plan.steps.get(folder / EVALUATION)
    kept = [e.summary for e in read_all(folder)]
    wanted = (e for e in kept if isinstance(step, Evaluate) and as_asked(e, step, e.weights))
    return next(wanted, kept[0] if kept else None)


@dataclass(frozen=True)
class Threats:
    """What the evaluations of a plan attacked, how strongly, and what they warn of."""

    networks: int
    images: tuple[int, ...]
    eps: tuple[float, ...]
    warnings: Mapping[str, int]
    """The first words of a warning -> the number of networks."""


def threats(plan: Plan) -> Threats:
    """The evaluations that lie in the plan's folders; for Fig. 2 and 3 the measured distortions."""
    folders = dict.fromkeys(folder for row in plan.rows for runs in row.runs.values() for folder in runs)
    found: list[Evaluation | LayerDistortion] = []
    for folder in folders:
        record = read_distortion(folder / "distortion" / DISTORTION) if plan.distorts else _evaluation(plan, folder)
        found += [record] if record else []
    return Threats(
        len(found),
        tuple(sorted({e.n for e in found if e.n is not None})),
        tuple(sorted({e.eps for e in found if e.eps is not None})),
        Counter(w.partition(":")[0] for e in found if isinstance(e, Evaluation) for w in e.warnings),
    )


def bounds_exceeded(plan: Plan) -> list[tuple[float, float]]:
    """(H, F) of every search of the plan that ended with F over its bound, the largest H first."""
    over = set()
    for folder, step in plan.steps.items():
        if isinstance(step, Search) and (folder / GENOTYPE).exists():
            epochs, _ = read_events(folder, SearchEpoch)
            h, f = (epochs[-1].H, epochs[-1].F) if epochs else (None, None)
            if h is not None and f is not None and f > h:
                over.add((h, f))
    return sorted(over, reverse=True)


def _parameters(folder: Path) -> float | None:
    parameters = codec.read(Description, folder / META).parameters if (folder / META).exists() else None
    return None if parameters is None else parameters / 1e6
