"""`rnas reproduce`, tables: figures in closed form, empty cells with reasons, four formats that say the same."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report_runs import make_network, write_json
from rnas.errors import RnasError
from rnas.published import table
from rnas.reproduce import write
from rnas.reproduce.caption import caption
from rnas.reproduce.plan import Plan, make_plan
from rnas.reproduce.results import Line, Value, collect, value
from rnas.reproduce.tables import latex, reasons, to_csv, to_html, to_latex, to_markdown
from rnas.settings import Reproduce
from rnas.statistics import wilson


def line(**values: Value) -> Line:
    return Line("RNAS-L", 3.21, 3.2, values)


SAID = ["Table 1 of the paper, reproduced. Images: some."]


def test_mean_deviation_interval_and_difference() -> None:
    v = value([0.5, 0.6, 0.7], 100, 52.34)
    assert v.mean == pytest.approx(60)
    assert v.std == pytest.approx(10)  # √((1 + 0 + 1)/2) of 10
    assert v.difference == pytest.approx(7.66)
    assert v.interval == pytest.approx(tuple(100 * b for b in wilson(0.6, 100)))
    assert value([0.5], 100).std is None
    assert value([0.5], 100).difference is None
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def evaluated(plan: Plan, warnings: list[str] | None = None, **accuracies: float) -> None:
    """Write an evaluation for every run of the plan: `at_clean` and so on, 0.01 more for each further seed."""
    for row in plan.rows:
        for training, folders in row.runs.items():
            for seed, folder in enumerate(folders):
                shares = {k.removeprefix(f"{training}_"): v + seed / 100 for k, v in accuracies.items()}
                entry = {k: {"accuracy": v, "interval": [v, v], "seconds": 1.0} for k, v in shares.items()}
                write_json(
                    folder / "evaluation.json",
                    {
                        "n": 100,
                        "eps": 8 / 255,
                        "norm": "linf",
                        "dataset": "cifar10",
                        "warnings": warnings or [],
                        "clean": entry.pop("clean"),
                        "attacks": entry,
                    },
                )
                about = {"arch": "genotype", "classes": ["a", "b"], "image_size": [32, 32]}
                write_json(folder / "model.json", {**about, "parameters": 3_210_000})


def test_a_table_of_finished_runs(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("table2", tmp_path, "paper", seeds=3, only=("RNAS-H",)))
    evaluated(plan, clean=0.60, pgd20=0.30)
    lines = {line.model: line for line in collect(plan, {})}
    found = lines["RNAS-H"].values
    assert found["at_clean"].mean == pytest.approx(61)
    assert found["at_clean"].std == pytest.approx(1)
    assert found["at_clean"].seeds == 3
    published = next(row for row in table(2) if row["model"] == "RNAS-H")
    assert found["at_clean"].difference == pytest.approx(61 - float(str(published["clean"])))
    assert found["at_aa"].reason == "not run yet"
    assert found["at_aa"].paper == published["aa"]
    assert lines["RNAS-H"].parameters == 3.21
    assert lines["DARTS"].values["at_clean"].reason == "not among the architectures asked for (--only)"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("table2", tmp_path, "paper", only=("RNAS-H",)))
    ((folder,),) = [row.runs["at"] for row in plan.rows if row.runs]
    (found,) = [line for line in collect(plan, {folder: "training loss became nan"}) if line.model == "RNAS-H"]
    assert found.values["at_clean"].reason == "failed: training loss became nan"


def test_csv_has_a_line_for_each_figure() -> None:
    lines = [line(at_clean=value([0.5, 0.6], 100, 85.16), at_aa=Value(paper=52.34, reason="not run yet"))]
    first, second = csv.DictReader(io.StringIO(to_csv(lines)))
    assert (first["model"], first["training"], first["attack"]) == ("RNAS-L", "at", "clean")
    assert (first["accuracy"], first["std"], first["seeds"], first["images"]) == ("55.00", "7.07", "2", "100")
    assert (first["paper"], first["difference"], first["parameters_M"]) == ("85.16", "-30.16", "3.210")
    assert (second["accuracy"], second["difference"], second["reason"]) == ("", "", "not run yet")


def test_markdown_shows_ours_the_papers_and_the_difference() -> None:
    lines = [line(at_clean=value([0.5, 0.6], 100, 85.16), at_aa=Value(paper=52.34, reason="no | genotype"))]
    text = to_markdown(lines, SAID)
    assert "55.0 ± 7.1 [45.2, 64.4]<br>paper 85.16 (−30.2)" in text
    assert "– (1)<br>paper 52.34" in text
    assert text.endswith("Empty:\n1. no | genotype\n")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| Clean | AutoAttack |" in rows[0]


def test_standard_training_is_named_in_the_headings() -> None:
    text = to_markdown([line(at_clean=value([0.5], 10), st_clean=value([0.5], 10))], SAID)
    assert "| AT Clean | ST Clean |" in text


def test_latex_escapes_and_is_balanced() -> None:
    assert latex("50 % & C_1 ≤ ε {x}\\") == r"50 \% \& C\_1 $\le$ $\varepsilon$ \{x\}\textbackslash{}"
    lines = [line(at_clean=value([0.5, 0.6], 100, 85.16), at_cw=Value(paper=1.0, reason="a_b & 5 %"))]
    text = to_latex(lines, [*SAID, "C&W at 100 %."])
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert re.search(r"(?<!\\)%", text.split("\n", 1)[1]) is None  # beside the comment of line 1
    rows = [row for row in text.splitlines() if row.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3}  # four columns
    assert r"a\_b \& 5 \%" in text
    assert "[45.2, 64.4]" in text  # 55 of 100 (Wilson)


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_html_is_a_page_by_itself() -> None:
    lines = [line(at_clean=value([0.5], 100, 85.16), at_aa=Value(paper=52.34, reason="<no> genotype"))]
    text = to_html(lines, SAID, "Table 1")
    head, row = _Page(text).rows
    assert head == ["Model", "Size", "Clean", "AutoAttack"]
    assert row[0] == "RNAS-L"
    assert row[2].startswith("50.0")
    assert "paper 85.16 (−35.2)" in row[2]
    assert "&lt;no&gt; genotype" in text
    assert "<no>" not in text
    assert 'id="theme"' in text  # the page's script asks for it
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)


def test_reasons_are_numbered_once() -> None:
    a, b = Value(reason="x"), Value(reason="y")
    assert reasons([line(at_clean=a, at_aa=b), line(at_clean=b, at_aa=a)]) == ["x", "y"]


def test_all_files_are_written(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("table1", tmp_path, "smoke", data="x/cifar10.npz", data_note="lossy"))
    evaluated(plan, clean=0.5, fgsm=0.4)
    files = write(plan, {})
    assert [f.name for f in files] == ["table1.csv", "table1.md", "table1.tex", "table1.html"]
    for file in files[1:]:
        text = file.read_text()
        assert "lossy" in text
        assert "no genotype" in text  # DSRNA's reason
        assert "2 training epochs instead of 600" in text


def test_the_caption_counts_warnings(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("table2", tmp_path, "paper", seeds=2, only=("RNAS-H", "DARTS")))
    evaluated(plan, ["zero gradients: 12 % of them"], clean=0.5)
    text = " ".join(caption(plan))
    assert "zero gradients (4 of 4 networks)" in text
    assert "100 test images, l∞ attacks with ε = 8/255" in text


def test_fig1_and_fig5_draw_what_is_there(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("fig1", tmp_path, "smoke", only=("RNAS-L", "ResNet18", "DARTS")))
    with pytest.raises(RnasError, match="none of its runs succeeded"):
        write(plan, {})
    evaluated(plan, clean=0.6, aa=0.3)
    svg, png, note = write(plan, {})
    assert svg.read_text().count("<circle") == 3
    assert png.stat().st_size > 1000
    assert "AutoAttack accuracy against clean accuracy" in note.read_text()
    plan = make_plan(Reproduce("fig5", tmp_path, "smoke", bounds=("1e-3", "1e-4", "1e-5")))
    evaluated(plan, clean=0.6, pgd20=0.3)
    svg, *_ = write(plan, {})
    assert svg.read_text().count("<circle") == 3 * 3 * 2  # data sets, bounds, clean and robust
    for name in ("cifar10", "cifar100", "svhn"):
        assert f">{name}<" in svg.read_text()


def test_fig4_needs_no_run(tmp_path: Path) -> None:
    svg, *_ = write(make_plan(Reproduce("fig4", tmp_path, "paper")), {})
    assert "RNAS-H" in svg.read_text()
    assert "RNAS-L" in svg.read_text()


def test_a_damaged_evaluation_is_no_result(tmp_path: Path) -> None:
    plan = make_plan(Reproduce("table2", tmp_path, "paper", only=("RNAS-H",)))
    ((folder,),) = [row.runs["at"] for row in plan.rows if row.runs]
    make_network(folder)
    found = json.loads((folder / "evaluation.json").read_text())
    write_json(folder / "evaluation.json", {**found, "clean": {"accuracy": 7}})
    with pytest.raises(RnasError, match=r"evaluation\.json is damaged: .*\$\.clean\.accuracy"):
        collect(plan, {})
