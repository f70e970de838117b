"""Paired comparisons against cases whose answer is known."""

from __future__ import annotations

import json
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_runs import make_network, make_run, write_json
from rnas.errors import RnasError
from rnas.report.compare import compare, p_value, shown_best, to_json, to_text
from rnas.statistics import mcnemar, paired_interval


def evaluated(folder: Path, masks: dict[str, list[int]], **changes: object) -> Path:
    """A network whose images are right (1) or wrong (0) as `masks` says."""
    arrays = {name: np.array(mask, bool) for name, mask in masks.items()}
    n = len(arrays["clean"])
    folder.mkdir(parents=True)
    np.savez(folder / "masks.npz", **arrays)
    attacks = {name: {"accuracy": float(mask.mean())} for name, mask in arrays.items() if name != "clean"}
    clean = {"accuracy": float(arrays["clean"].mean())}
    about = {"dataset": "digits", "n": n, "eps": 8 / 255, "norm": "linf", "images_sha256": "f" * 64}
    write_json(folder / "evaluation.json", {**about, "clean": clean, "attacks": attacks, **changes})
    return folder


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (1, 9), (8, 3), (4, 4)])
def test_mcnemar_is_a_fair_coin(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail))


def test_paired_interval_by_hand() -> None:
    # (10+1)/(100+2) - (4+1)/(100+2) = 6/102, its variance (16/102 - (6/102)²) / 102
    half = 1.959963984540054 * sqrt((16 / 102 - (6 / 102) ** 2) / 102)
    assert paired_interval(10, 4, 100) == pytest.approx((6 / 102 - half, 6 / 102 + half))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(100, 1000))
def test_paired_interval_is_antisymmetric_and_holds_its_middle(only_a: int, only_b: int, n: int) -> None:
    low, high = paired_interval(only_a, only_b, n)
    assert -1 <= low < high <= 1
    assert low <= (only_a - only_b) / (n + 2) <= high
    assert paired_interval(only_b, only_a, n) == pytest.approx((-high, -low))


def test_paired_interval_covers() -> None:
    """In 95 of 100 draws or so, the interval holds the true difference."""
    draw = np.random.default_rng(0)
    table = draw.multinomial(200, [0.5, 0.15, 0.08, 0.27], size=4000)
    held = [low <= 0.07 <= high for _, b, c, _ in table for low, high in [paired_interval(int(b), int(c), 200)]]
    assert 0.935 < np.mean(held) < 0.975


def test_comparison_counts(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {"clean": [1, 1, 1, 1], "fgsm": [1, 1, 0, 0], "pgd20": [0, 1, 0, 0]})
    b = evaluated(tmp_path / "b", {"clean": [1, 1, 1, 0], "fgsm": [0, 1, 1, 0], "pgd20": [0, 0, 0, 0]})
    rows = {row.attack: row for row in compare([a, b])}
    assert list(rows) == ["clean", "fgsm", "pgd20", "union"]
    assert (rows["clean"].only_a, rows["clean"].only_b, rows["clean"].difference) == (1, 0, 0.25)
    assert (rows["fgsm"].only_a, rows["fgsm"].only_b, rows["fgsm"].p) == (1, 1, 1.0)
    assert (rows["union"].accuracy_a, rows["union"].accuracy_b) == (0.25, 0.0)
    assert json.loads(to_json(list(rows.values())))[1]["attack"] == "fgsm"
    assert "McNemar's exact test" in to_text(list(rows.values()))


def test_the_union_compared_is_of_the_attacks_in_the_ball(tmp_path: Path) -> None:
    masks = {"clean": [1, 1, 1, 1], "fgsm": [1, 1, 0, 0], "pgd20": [1, 1, 1, 0], "cw-l2": [0, 0, 0, 0]}
    rows = {row.attack: row for row in compare([evaluated(tmp_path / name, masks) for name in "ab"])}
    assert rows["union"].accuracy_a == 0.5
    del masks["pgd20"]
    rows = {row.attack: row for row in compare([evaluated(tmp_path / name, masks) for name in "cd"])}
    assert list(rows) == ["clean", "fgsm", "cw-l2"]  # one bounded attack is its own union


def test_holm_correction(tmp_path: Path) -> None:
    # ten, then eight of ten disagreements: p = 2/1024 and 112/1024; Holm: twice the first, then the larger one
    ten, zero, eight = [1] * 10, [0] * 10, [1] * 8 + [0] * 2
    a = evaluated(tmp_path / "a", {"clean": ten, "fgsm": eight})
    b = evaluated(tmp_path / "b", {"clean": zero, "fgsm": [1 - v for v in eight]})
    clean, fgsm = compare([a, b])
    assert (clean.p, fgsm.p) == pytest.approx((2 / 1024, 112 / 1024))
    assert (clean.p_holm, fgsm.p_holm) == pytest.approx((4 / 1024, 112 / 1024))


def test_run_folder_stands_for_its_networks(tmp_path: Path) -> None:
    rows = compare([make_run(tmp_path / "demo")])
    assert {(row.a, row.b) for row in rows} == {("train", "train-standard")}
    pgd = next(row for row in rows if row.attack == "pgd20")
    assert pgd.difference > 0.2
    assert pgd.p_holm < 1e-6
    assert pgd.interval[0] < pgd.difference < pgd.interval[1]


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "svhn", "images_sha256": None},
        {"eps": 4 / 255},
        {"norm": "l2"},
        {"images_sha256": "0" * 64},
        {"n": 3},
    ],
)
def test_other_images_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    masks = {"clean": [1, 1, 0, 1], "fgsm": [1, 0, 0, 0]}
    a, b = evaluated(tmp_path / "a", masks), evaluated(tmp_path / "b", masks, **change)
    with pytest.raises(RnasError, match=next(iter(change))):
        compare([a, b])


def test_the_same_images_may_have_another_name(tmp_path: Path) -> None:
    masks = {"clean": [1, 1, 0, 1], "fgsm": [1, 0, 0, 0]}
    assert compare([evaluated(tmp_path / "a", masks), evaluated(tmp_path / "b", masks, dataset="moved")])


def test_every_pair_is_compared_under_what_both_faced(tmp_path: Path) -> None:
    masks = {"clean": [1, 1, 0, 1], "fgsm": [1, 0, 0, 0], "aa": [0, 0, 0, 0]}
    runs = [evaluated(tmp_path / name, masks) for name in "ab"]
    runs.append(evaluated(tmp_path / "c", {k: v for k, v in masks.items() if k != "aa"}))
    rows = compare(runs)
    assert [(r.a, r.b) for r in rows if r.attack == "aa"] == [("a", "b")]
    assert len([r for r in rows if r.attack == "fgsm"]) == 3


def test_too_few_are_refused(tmp_path: Path) -> None:
    network = make_network(tmp_path / "train")
    with pytest.raises(RnasError, match="two or more"):
        compare([network])
    (network / "masks.npz").unlink()
    other = make_network(tmp_path / "other")
    with pytest.raises(RnasError, match=r"no masks\.npz"):
        compare([network, other])


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"clean": [1, 0], "fgsm": [1, 0]})
    with pytest.raises(RnasError, match="twice"):
        compare([run, tmp_path / "." / "a"])


def test_the_best_is_shown_only_where_the_test_shows_it(tmp_path: Path) -> None:
    """Clean: a is far ahead of both. FGSM: a is ahead by an image, which shows nothing."""
    ahead, behind = [1] * 40, [1] * 10 + [0] * 30
    a = evaluated(tmp_path / "a", {"clean": ahead, "fgsm": [1] * 11 + [0] * 29})
    b = evaluated(tmp_path / "b", {"clean": behind, "fgsm": behind})
    c = evaluated(tmp_path / "c", {"clean": behind, "fgsm": behind})
    assert shown_best(compare([a, b, c])) == {"clean": "a"}
    assert shown_best(compare([b, c])) == {}


def test_the_text_fits_80_columns_and_shows_what_the_page_shows(tmp_path: Path) -> None:
    rows = compare([make_run(tmp_path / "demo")])
    text = to_text(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert all(p_value(row.p_holm) in text for row in rows)
