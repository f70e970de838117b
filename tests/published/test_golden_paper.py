"""The published cells, the counts of their weights and the paper's tables, against copies recorded independently."""

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rnas import published as paper
from rnas.nets import zoo
from rnas.nets.count import parameters

GOLDEN = Path(__file__).parents[1] / "golden" / "paper"
SPELLED = {"NASNet": "NASNet-A", "AmoebaNet": "AmoebaNet-A", "DARTS": "DARTS-V2", "RNTK": "RNTK (ZCPRob)"}
PUBLISHED = [name for name, p in paper.architectures().items() if p.source]


def rows(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open(newline="") as f:
        return list(csv.DictReader(f))


@cache
def genotypes() -> dict[str, Any]:
    return json.loads((GOLDEN / "genotypes.json").read_text())


@cache
def counts() -> dict[str, int]:
    """The public definitions' own: 10 classes, 20 cells, C = 36, no auxiliary head."""
    of_cells = {name: genotypes().get(SPELLED.get(name, name), {}).get("params_C36_L20") for name in PUBLISHED}
    measured = {row["name"]: int(row["measured_params"]) for row in rows("architectures.csv") if row["measured_params"]}
    ours = {"RobNet-large": 6842710}  # none is published to the weight
    return {name: count for name, count in of_cells.items() if count} | measured | ours


def test_every_published_cell_is_the_source_one() -> None:
    with_cells = [name for name in PUBLISHED if paper.architectures()[name].kind == "cell"]
    assert {SPELLED.get(name, name) for name in with_cells} == genotypes().keys() - {"DSRNA"}
    for name in with_cells:
        theirs = genotypes()[SPELLED.get(name, name)]
        assert paper.architectures()[name].source == theirs["source"]
        ours = paper.genotype(name).to_json()
        if "code" in theirs:
            assert ours == {"codes": theirs["code"], "affine": theirs["bn_affine"]}
        else:
            assert all(theirs[key] == value for key, value in ours.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_as_many_weights_as_its_definition(name: str) -> None:
    with torch.device("meta"):
        assert parameters(zoo.build(name)) == counts()[name]
    figure = paper.architectures()[name].paper_params
    if figure and name not in ("NASNet", "RobNet-free"):  # whose figures count more, see their notes
        assert round(counts()[name] / 1e6, 1) == pytest.approx(figure, abs=0.11)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_tables_are_the_papers(number: int) -> None:
    theirs, ours = rows(f"{paper.TABLES[number]}.csv"), paper.table(number)
    assert [row["model"] for row in ours] == [row["model"] for row in theirs]
    assert all(
        ours[i][key] == float(row[key]) for i, row in enumerate(theirs) for key in row if key[:2] in ("at", "aa")
    )


def test_facts_agree_with_the_measured_list() -> None:
    theirs = {row["name"]: row for row in rows("architectures.csv")}
    ours = {name: p for name, p in paper.architectures().items() if p.table_name}
    assert list(ours) == list(theirs)
    for name, published in ours.items():
        row = theirs[name]
        assert (published.kind, str(published.year)) == (row["kind"], row["year"])
        assert published.paper_params == float(row["paper_params_M"])
        if published.kind == "hand-made":
            assert published.source == row["definition"]
