"""What a folder's evaluations say: figures agree with their masks, and the best founded one is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from report_runs import make_network, write_json
from rnas.errors import RnasError
from rnas.records.evaluations import Files, read, read_all
from rnas.records.schema import Figure
from rnas.report.compare import compare, to_text
from rnas.report.read import NetworkPart, read_parts
from rnas.statistics import wilson


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_network(tmp_path_factory.mktemp("run") / "train", n=200, extras=False)


def beside(folder: Path, name: str, n: int, attacks: list[str], **changes: Any) -> None:
    """An evaluation called `name` (or evaluation.json) in `folder`, on the first n of a test's images."""
    draw = np.random.default_rng(n)
    masks = {key: draw.random(n) < 0.5 for key in ("clean", *attacks)}
    files = Files(folder, name)
    folder.mkdir(exist_ok=True)
    np.savez(files.masks, **{key: mask & masks["clean"] for key, mask in masks.items()})
    entries = {key: {"accuracy": float((mask & masks["clean"]).mean())} for key, mask in masks.items()}
    about = {"eps": 8 / 255, "norm": "linf", "n": n, "images_sha256": str(n), "data": None, "seed": 0}
    write_json(files.summary, {**about, "clean": entries.pop("clean"), "attacks": entries, **changes})


FIGURES = ("clean", "fgsm", "pgd20", "cw", "union")


@given(
    st.sampled_from(FIGURES),
    st.sampled_from(("accuracy", "interval")),
    st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_figure_is_the_masks_again_or_the_file_is_named(
    network: Path, name: str, key: str, value: object
) -> None:
    path = network / "evaluation.json"
    original = path.read_bytes()
    right = read(Files(network)).summary
    wrong = json.loads(original)
    (wrong if name in ("clean", "union") else wrong["attacks"])[name][key] = value
    write_json(path, wrong)
    try:
        if (key == "accuracy") == isinstance(value, list):  # a list for a number, or a number for a list
            with pytest.raises(RnasError, match=r"evaluation\.json"):
                read(Files(network))
            return
        found = read(Files(network)).summary
    finally:
        path.write_bytes(original)
    for figure in FIGURES:
        a, b = found.figure(figure), right.figure(figure)
        assert a is not None
        assert b is not None
        assert (a.accuracy, a.interval) == (b.accuracy, b.interval)


def test_a_changed_accuracy_is_told(network: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "run"))
    summary = json.loads((folder / "evaluation.json").read_text())
    summary["attacks"]["pgd20"]["accuracy"] = 0.999
    write_json(folder / "evaluation.json", summary)
    (warning,) = read(Files(folder)).summary.warnings
    assert "evaluation.json says 99.90% for pgd20" in warning


def test_figures_without_masks_do_not_contradict_themselves(network: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "run"))
    (folder / "masks.npz").unlink()
    summary = json.loads((folder / "evaluation.json").read_text())
    summary["attacks"]["pgd20"]["accuracy"] = summary["attacks"]["pgd20"]["interval"][1] + 0.01
    write_json(folder / "evaluation.json", summary)
    with pytest.raises(RnasError, match=r"evaluation\.json is damaged.*pgd20"):
        read(Files(folder))


def test_another_number_of_images_than_verdicts_is_named(network: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "run"))
    write_json(folder / "evaluation.json", {**json.loads((folder / "evaluation.json").read_text()), "n": 199})
    with pytest.raises(RnasError, match=r"masks\.npz has verdicts on 200 images.*199"):
        read_parts([folder])


def test_the_union_is_of_bounded_attacks(tmp_path: Path) -> None:
    beside(tmp_path / "a", "", 50, ["fgsm", "cw-l2"])
    kept = read(Files(tmp_path / "a"))
    share = float(kept.masks["fgsm"].mean())
    assert kept.summary.union == Figure(share, wilson(share, 50))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((1000, ["aa"], {}), (8, ["aa", "fgsm"], {})),
        ((500, ["aa"], {}), (1000, ["fgsm", "pgd20", "cw"], {})),
        ((1000, ["fgsm"], {}), (20, ["aa"], {})),
        ((200, ["fgsm", "cw"], {}), (200, ["fgsm"], {"eps": 2 / 255})),
        ((100, ["fgsm"], {}), (500, ["aa"], {"data": "others.npz"})),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_best_founded_evaluation_is_shown_and_named(
    better: tuple, worse: tuple, first: bool, tmp_path: Path
) -> None:
    for (n, attacks, changes), name in ((better, "" if first else "other"), (worse, "other" if first else "")):
        beside(tmp_path / "run", name, n, attacks, **changes)
    (part,) = read_parts([tmp_path / "run"])
    assert isinstance(part, NetworkPart)
    assert part.shown == ("evaluation.json" if first else "evaluation.other.json")
    assert list(part.masks) == ["clean", *better[1]]
    assert len(read_all(tmp_path / "run")) == 2


def test_networks_are_compared_by_a_test_that_all_faced(tmp_path: Path) -> None:
    beside(tmp_path / "a", "", 1000, ["aa"])
    beside(tmp_path / "a", "small", 200, ["pgd20"])
    beside(tmp_path / "b", "", 200, ["pgd20", "fgsm"])
    rows = compare([tmp_path / "a", tmp_path / "b"])
    assert {row.n for row in rows} == {200}
    assert {(row.evaluation_a, row.evaluation_b) for row in rows} == {("evaluation.small.json", "evaluation.json")}
    assert "a: evaluation.small.json" in to_text(rows)


def test_an_evaluation_of_other_weights_is_not_the_networks(network: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "run"))
    for name, weights in (("model.json", "abc"), ("evaluation.json", "def")):
        write_json(folder / name, {**json.loads((folder / name).read_text()), "weights": weights})
    (part,) = read_parts([folder])
    assert isinstance(part, NetworkPart)
    assert part.evaluation is None
    assert "evaluation.json" in part.warnings[-1]


@pytest.mark.parametrize("kept", [0, 3])
def test_a_log_of_a_finished_run_has_all_epochs(kept: int, network: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(network, tmp_path / "run"))
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:kept]))
    with pytest.raises(RnasError, match=rf"log\.jsonl.*{kept} of the 20"):
        read_parts([folder])
