"""The page as a document: what it shows, what it escapes, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from report_runs import GENOTYPE, make_network, make_run, make_search, wilson, write_json
from rnas.errors import RnasError
from rnas.report import write_report

VOID = {"br", "img", "meta", "link", "input", "hr"}


class Document(HTMLParser):
    """A page's elements and text, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(*runs: Path, title: str | None = None) -> str:
    out = runs[0].parent / "report.html"
    write_report(runs, out, title)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(demo: Path) -> str:
    return report(demo)


def test_structure(page: str) -> None:
    found = Document(page)
    assert len(found.all("h1")) == 1
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in found.all("a")]
    assert {f"#{i}" for i in ("results", "cells", "search", "alpha", "training", "examples", "classes")} <= set(links)
    assert all(link and link.startswith("#") and link[1:] in ids for link in links)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels)), "a heading's level is skipped"


def test_figures_have_text_alternatives(page: str) -> None:
    found = Document(page)
    drawings = found.all("svg")
    assert len(drawings) > 30  # 2 cells, 28 edges, charts
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in drawings)
    assert len(found.all("title")) == len(drawings) + 1
    assert all(image["alt"] for image in found.all("img"))
    assert all(th.get("scope") for th in found.all("th"))


def test_nothing_is_loaded(page: str) -> None:
    found = Document(page)
    assert all("src" not in a or (a["src"] or "").startswith("data:") for _, a in found.elements)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_size_and_determinism(demo: Path, page: str) -> None:
    assert len(page.encode()) < 3_000_000
    assert report(demo) == page


def test_results_are_the_evaluation(demo: Path, page: str) -> None:
    text = Document(page).text.replace("\u202f", " ")
    for part in ("train", "train-standard"):
        evaluation = json.loads((demo / part / "evaluation.json").read_text())
        for entry in (evaluation["clean"], evaluation["union"], *evaluation["attacks"].values()):
            assert f"{100 * entry['accuracy']:.1f} %" in text
            assert "–".join(f"{100 * v:.1f}" for v in entry["interval"]) in text
    assert "360" in text
    assert "The paper's C&W column is not comparable" in text
    assert "rnas run --data digits --out runs/demo" in text
    assert "under its bound H" in text


def test_all_text_is_escaped(tmp_path: Path) -> None:
    """Names that look like markup make a page of the same elements as harmless ones."""
    pages = []
    for evil in ("<script>alert(1)</script>", "harmless"):
        folder = tmp_path / str(len(pages))
        network = make_network(folder / "train", classes=[evil, f"'\"&<b>{evil}"], warnings=[evil])
        for name, change in (
            ("settings.json", {evil: evil, "arch": evil}),
            ("environment.json", {evil: evil, "command": evil}),
            ("distortion.json", {"layers": [evil] * 5}),
            ("model.json", {"arch": evil}),
        ):
            write_json(network / name, {**json.loads((network / name).read_text()), **change})
        pages.append(Document(report(network, title=evil)))
    assert [tag for tag, _ in pages[0].elements] == [tag for tag, _ in pages[1].elements]
    assert [sorted(a) for _, a in pages[0].elements] == [sorted(a) for _, a in pages[1].elements]
    assert "<script>alert(1)</script>" in pages[0].text
    assert "'\"&<b>" in pages[0].text


def test_warnings_stand_above_the_results(tmp_path: Path) -> None:
    network = make_network(tmp_path / "train", warnings=["square beats pgd20 on 12 images"])
    page = report(network)
    assert page.index("square beats pgd20 on 12 images") < page.index('id="results"')


def answering_cat(folder: Path) -> Path:
    """A network that answers every image with the first of two classes."""
    network = make_network(folder, classes=["cat", "dog"])
    with np.load(network / "masks.npz") as arrays:
        labels, right = arrays["labels"], arrays["labels"] == 0
        masks = {name: right for name in arrays if name != "labels"}
    np.savez(network / "masks.npz", **masks, labels=labels)
    evaluation = json.loads((network / "evaluation.json").read_text())
    for entry in (evaluation["clean"], *evaluation["attacks"].values(), evaluation["union"]):
        entry.update(accuracy=0.5, interval=wilson(len(labels) // 2, len(labels)))
    write_json(network / "evaluation.json", evaluation)
    return network


def test_chance_stands_beside_the_results_and_what_is_no_better_is_not_the_best(tmp_path: Path) -> None:
    constant = answering_cat(tmp_path / "constant")
    page = report(make_network(tmp_path / "good", classes=["cat", "dog"]), constant)
    assert "chance 50.0\u202f%" in page  # the line in the chart
    assert ">Chance</th>" in page
    assert 'class="best"' in page
    assert 'class="best"' not in report(constant, answering_cat(tmp_path / "another"))


def test_a_search_at_chance_is_read_with_care(tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", epochs=4, warmup=1)
    assert "above chance" not in report(search)
    lines = [json.loads(line) for line in (search / "log.jsonl").read_text().splitlines()]
    lines[-1].update(chance=0.1, at_chance=True)
    (search / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "is not shown to be above chance" in report(search)


@pytest.mark.parametrize(("attack", "said"), [("cw", True), ("cw-l2", True), ("fgsm", False)])
def test_either_reading_of_cw_comes_with_why_the_papers_cannot_be_compared(
    attack: str, said: bool, tmp_path: Path
) -> None:
    network = make_network(tmp_path / "train")
    evaluation = json.loads((network / "evaluation.json").read_text())
    evaluation["attacks"] = {attack: evaluation["attacks"]["cw"]}
    (network / "evaluation.json").write_text(json.dumps(evaluation))
    assert ("The paper's C&W column is not comparable: the script" in Document(report(network)).text) == said


def test_unfinished_search_shows_what_there_is(tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", epochs=4, warmup=2)
    (search / "genotype.json").unlink()
    (search / "alphas.npz").unlink()
    text = Document(report(search)).text
    assert "not finished; the cell is that of epoch 4" in text
    assert "Normal cell" in text
    assert "After 4 epochs of the search" in text


def test_unfinished_training_says_so(tmp_path: Path) -> None:
    network = make_network(tmp_path / "train", epochs=8)
    for name in ("model.json", "evaluation.json", "masks.npz"):
        (network / name).unlink()
    log = (network / "log.jsonl").read_text().splitlines(keepends=True)
    (network / "log.jsonl").write_text("".join(log[:5]) + log[5][:20])  # killed while it wrote the sixth line
    text = Document(report(network)).text
    assert "the training is not finished; it is at epoch 5 of 8" in text
    assert "train: 5 epochs. Nothing is evaluated yet." in text


def test_search_without_a_bound(tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", epochs=4, warmup=1)
    lines = [json.loads(line) for line in (search / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line |= dict.fromkeys(("H", "F_before", "multiplier", "distance", "projection_steps"))
    (search / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Document(report(search)).text
    assert "without a bound" in text
    assert "Multiplier" not in text


def test_only_what_is_there(tmp_path: Path) -> None:
    network = make_network(tmp_path / "train", extras=False, arch="ResNet18")
    for name in ("masks.npz", "settings.json", "environment.json", "log.jsonl"):
        (network / name).unlink()
    page = report(network)
    assert 'id="results"' in page
    assert not any(f'id="{i}"' in page for i in ("cells", "search", "training", "examples", "classes", "settings"))


def test_paper_stands_beside_only_the_same_threat(tmp_path: Path) -> None:
    same = make_network(tmp_path / "a", arch="ResNet18", dataset="cifar10", eps=8 / 255)
    other = make_network(tmp_path / "b", arch="ResNet18", dataset="cifar10", eps=4 / 255)
    text = Document(report(same)).text
    assert "paper 48.8" in text  # Table 1: ResNet18 under PGD-20
    assert "Beside the paper" in text
    assert "paper 48.8" not in Document(report(other)).text


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_network(tmp_path / name, seed=seed) for seed, name in enumerate("ABC")]
    text = Document(report(*runs)).text
    assert "A − B" in text
    assert "B − C" in text
    assert text.count("McNemar") == 1


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    runs = [make_network(tmp_path / parent / "train") for parent in ("x", "y")]
    assert "train (2)" in Document(report(*runs)).text


def _break_log(run: Path) -> None:
    path = run / "train" / "log.jsonl"
    path.write_text("{broken\n" + path.read_text())


def _break_alphas(run: Path) -> None:
    np.savez(
        run / "search" / "alphas.npz", normal=np.zeros((3, 13, 8)), reduce=np.zeros((3, 14, 8)), operations=["a"] * 8
    )


def _truncate_masks(run: Path) -> None:
    path = run / "train" / "masks.npz"
    path.write_bytes(path.read_bytes()[:100])


def _pickled_masks(run: Path) -> None:
    np.savez(run / "train" / "masks.npz", clean=np.array([object()], dtype=object))


def _break_evaluation(run: Path) -> None:
    path = run / "train" / "evaluation.json"
    write_json(path, {**json.loads(path.read_text()), "clean": {"accuracy": "high"}})


def _break_genotype(run: Path) -> None:
    write_json(run / "search" / "genotype.json", {"normal": [["sep_conv_9x9", 0]]})


def _break_examples(run: Path) -> None:
    np.savez(run / "train" / "examples.npz", clean=np.zeros((2, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (_break_log, "log.jsonl"),
        (_break_alphas, "alphas.npz"),
        (_truncate_masks, "masks.npz"),
        (_pickled_masks, "masks.npz"),
        (_break_evaluation, "a number at $.clean.accuracy"),
        (_break_genotype, "genotype.json"),
        (_break_examples, "examples.npz"),
    ],
)
def test_damaged_runs_are_refused_before_anything_is_written(tmp_path: Path, damage: object, names: str) -> None:
    run = make_run(tmp_path / "demo")
    damage(run)  # type: ignore[operator]
    with pytest.raises(RnasError, match=re.escape(names)):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "nowhere", "no folder"), (tmp_path / "empty", "holds no run")):
        with pytest.raises(RnasError, match=says):
            write_report([folder], tmp_path / "report.html")
    with pytest.raises(RnasError, match="at least one"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_report_starts_without_torch() -> None:
    code = (
        "import sys, rnas.report, rnas.report.compare; assert not {'torch', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_headline_names_the_same_architecture(demo: Path, page: str) -> None:
    assert GENOTYPE.to_json() == json.loads((demo / "search" / "genotype.json").read_text())
    assert "The same architecture, trained on clean images" in Document(page).text


def test_the_page_does_not_replace_what_it_is_about(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    settings = next(iter(sorted(run.rglob("settings.json"))))
    before = settings.read_bytes()
    with pytest.raises(RnasError, match=r"settings\.json would be overwritten"):
        write_report([run], settings)
    assert settings.read_bytes() == before


def changed(network: Path, file: str, **changes: object) -> Path:
    record = json.loads((network / file).read_text())
    (network / file).write_text(json.dumps(record | changes))
    return network


@pytest.mark.parametrize("change", [{"eps": 1 / 255}, {"norm": "l2"}, {"n": 100}, {"images_sha256": "0" * 64}, {}])
def test_networks_that_were_tested_differently_are_not_ranked(change: dict[str, object], tmp_path: Path) -> None:
    runs = [make_network(tmp_path / name, seed=k) for k, name in enumerate("abc")]
    for run in runs:
        changed(run, "evaluation.json", images_sha256="f" * 64)
    if "n" in change:
        (runs[1] / "masks.npz").unlink()  # which has verdicts on another number of images
    changed(runs[1], "evaluation.json", **change)
    text = report(*runs)
    assert ("the one of 3 that keeps most" in text) == (not change)
    assert 'class="best"' not in text or not change
    assert ("The networks were not tested alike" in text) == bool(change)
    if "eps" in change:
        assert "l∞, ε = 1/255" in text


def test_unions_of_different_attacks_are_not_ranked(tmp_path: Path) -> None:
    runs = [make_network(tmp_path / name, seed=k) for k, name in enumerate("abc")]
    attacks = json.loads((runs[0] / "evaluation.json").read_text())["attacks"]
    attacks.popitem()
    assert "the one of 3 that keeps most" in report(*runs)
    changed(runs[0], "evaluation.json", attacks=attacks)
    assert "that keeps most" not in report(*runs)


def test_distortions_under_different_attacks_do_not_share_an_axis(tmp_path: Path) -> None:
    runs = [make_network(tmp_path / name, seed=k) for k, name in enumerate("ab")]
    assert "b (PGD" not in report(*runs)
    changed(runs[1], "distortion.json", eps=2 / 255, norm="linf", attack="pgd20", reduction="sum")
    assert "b (PGD-20, l∞, ε = 2/255, sum" in report(*runs)
