"""What is published: the architectures of the paper's Table 1 and later ones, and the figures of its tables. No torch.

The facts lie beside this file as CSV, the cells in `rnas/published/genotypes` as JSON.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rnas.errors import RnasError, unknown
from rnas.genotype import Architecture, architecture_from_json

TABLES = {
    1: "table1_cifar10",
    2: "table2_cifar100",
    3: "table3_svhn",
    4: "table4_tiny_imagenet_transfer",
    5: "table5_tiny_imagenet_direct",
}


@dataclass(frozen=True)
class Published:
    """A published architecture."""

    name: str
    aliases: tuple[str, ...]
    table_name: str | None
    """How the paper's tables spell it; None if it is not among them."""
    kind: str
    """"cell" (built from a genotype) or "hand-made"."""
    year: int
    paper_params: float | None
    """Parameters according to the paper's Table 1, in millions."""
    source: str | None
    """Where the genotype or the definition is from; None if none is published."""
    note: str


@functools.cache
def architectures() -> dict[str, Published]:
    """Every published architecture by its name: those of Table 1 in its order, then the extras."""
    return {row["name"]: _published(row) for row in _rows("architectures")}


def find(name: str) -> Published:
    """The architecture called `name`, or with it as an alias; only letters and digits count, in either case.

    RnasError, with the nearest names, if there is none.
    """
    if not isinstance(name, str):
        raise RnasError(f"the name of the architecture is {name!r}: expected one such as RNAS-L")
    for published in architectures().values():
        if _plain(name) in map(_plain, (published.name, *published.aliases)):
            return published
    raise unknown("architecture", name, architectures())


def genotype(name: str) -> Architecture:
    """The published cells of architecture `name`. RnasError if it has none."""
    published = find(name)
    value = _cells(published.name)
    if value is None:
        reason = "it is made by hand" if published.kind == "hand-made" else published.note
        raise RnasError(f"{published.name} has no genotype: {reason}")
    return architecture_from_json(value, published.name)


def table(number: int) -> list[dict[str, float | str | None]]:
    """The rows of the paper's table `number`, 1 to 5: `model` as the paper spells it and figures (percent)."""
    return [
        {key: value if key == "model" else float(value) if value else None for key, value in row.items()}
        for row in _rows(TABLES[number])
    ]


def _published(row: dict[str, str]) -> Published:
    cells = _cells(row["name"])
    return Published(
        name=row["name"],
        aliases=tuple(row["aliases"].split()),
        table_name=row["table_name"] or None,
        kind=row["kind"],
        year=int(row["year"]),
        paper_params=float(row["paper_params_M"]) if row["paper_params_M"] else None,
        source=cells["source"] if cells else row["source"] or None,
        note=row["note"],
    )


def _rows(name: str) -> list[dict[str, str]]:
    text = (files("rnas.published") / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _cells(name: str) -> dict[str, Any] | None:
    file = files("rnas.published") / "genotypes" / f"{name.lower()}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())
