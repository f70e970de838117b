"""Architectures as data: RobNet's codes, the published cells, the paper's tables. None of it needs torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnas import published as paper
from rnas.errors import RnasError
from rnas.genotype import CODES, Cell, CellCodes, Genotype, architecture_from_json

# RobNet's codes


@st.composite
def cell_codes(draw: st.DrawFn) -> CellCodes:
    nodes = draw(st.integers(1, 4))
    real = st.sampled_from([code for code in CODES if code != "00"])
    node = [st.tuples(real, *[st.sampled_from(list(CODES))] * (i + 1)) for i in range(nodes)]
    cell = st.tuples(*node).map(lambda rows: sum(rows, ()))
    return CellCodes(tuple(draw(st.lists(cell, min_size=1, max_size=5))), draw(st.booleans()))


@given(cell_codes())
def test_codes_survive_json(codes: CellCodes) -> None:
    assert architecture_from_json(json.loads(json.dumps(codes.to_json()))) == codes


@given(cell_codes())
def test_each_bit_of_a_code_is_an_operation(codes: CellCodes) -> None:
    for position, row in enumerate(codes.codes):
        edges = [edge for node in codes.cell(position, reduction=False).nodes for edge in node]
        text = "".join(row)
        assert len(edges) == text.count("1")
        assert sum(name == "skip_connect" for name, _ in edges) == text[::2].count("1")


def test_edges_come_in_the_order_of_nodes_and_their_sources() -> None:
    cell = CellCodes((("01", "00", "10", "00", "11"),)).cell(7, reduction=True)
    assert cell == Cell(
        nodes=((("sep_conv_3x3", 0),), (("skip_connect", 0), ("sep_conv_3x3", 2), ("skip_connect", 2))),
        concat=(2, 3),
    )


def test_one_list_of_codes_is_shared_and_several_are_not() -> None:
    shared_cell, two = CellCodes((("01", "01"),)), CellCodes((("01", "01"), ("10", "10")))
    assert shared_cell.depth is None
    assert shared_cell.cell(0, False) == shared_cell.cell(13, True)
    assert two.depth == 2
    assert two.cell(0, False) != two.cell(1, False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"codes": []}, "codes is empty"),
        ({"codes": "01"}, "f.json: 'codes' is missing or no list of lists"),
        ({"codes": [[1, 2]]}, "f.json: 'codes' is missing or no list of lists"),
        ({"codes": [["01", "12"]]}, "f.json: cell 0: 2 codes with '12'"),
        ({"codes": [["01", "01"], ["01", "01", "01"]]}, "cell 1: 3 codes with ''.* 2 are for the first node"),
        ({"codes": [["00", "00"]]}, "cell 0: node 2 has no edges"),
        ({"codes": [["01", "01"]], "affine": "no"}, "f.json: 'affine' is \"no\": expected true or false"),
        ({"normal": 3}, "f.json: 'normal' is missing"),
        ([], "f.json is no genotype"),
    ],
)
def test_damaged_architectures_are_explained(value: object, message: str) -> None:
    with pytest.raises(RnasError, match=message):
        architecture_from_json(value, "f.json")


# The published cells


def test_files_and_table_agree() -> None:
    files = {path.stem for path in Path(paper.__file__).parent.glob("genotypes/*.json")}
    assert files == {n.lower() for n, p in paper.architectures().items() if p.kind == "cell" and p.source}


def test_robnet_free_has_20_cells_of_its_own() -> None:
    robnet = paper.genotype("RobNet-free")
    assert robnet.depth == 20
    assert len({robnet.cell(i, False) for i in range(20)}) == 20
    assert isinstance(paper.genotype("RNAS-L"), Genotype)


@pytest.mark.parametrize(
    ("name", "message"),
    [("VGG16", "VGG16 has no genotype: it is made by hand"), ("DSRNA", "DSRNA has no genotype: no")],
)
def test_what_has_no_cells_says_why(name: str, message: str) -> None:
    with pytest.raises(RnasError, match=message):
        paper.genotype(name)


# The paper's tables


def test_a_figure_that_every_reader_can_look_up() -> None:
    rnas_l = paper.table(1)[-1]
    assert (rnas_l["model"], rnas_l["params_M"], rnas_l["at_pgd20"], rnas_l["ref"]) == ("RNAS-L", 3.2, 54.85, None)


def test_facts_need_no_torch() -> None:
    code = (
        "import sys, rnas.published; rnas.published.genotype('RNAS-L'); rnas.published.table(1); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
