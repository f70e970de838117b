"""Damaged run folders: a page, or an RnasError and no page; never another exception."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_runs import make_run
from rnas.errors import RnasError
from rnas.report import write_report

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, "x", [], {}, [1, None], {"a": {"b": []}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo", epochs=3, n=40)


def survives(run: Path) -> bool:
    """Whether a page came out. Any exception but RnasError goes through."""
    out = run.parent / "report.html"
    out.unlink(missing_ok=True)
    try:
        write_report([run], out)
    except RnasError:
        assert not out.exists()
        return False
    return out.exists()


def replaced(value: Any) -> Iterator[Any]:
    """`value` with one of its parts, at any depth, replaced by something wrong or taken out."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: wrong} for wrong in WRONG)
            yield from ({**value, key: inner} for inner in replaced(value[key]))
    elif isinstance(value, list) and value:
        yield from ([*value[:-1], wrong] for wrong in WRONG)
        yield from ([*value[:-1], inner] for inner in replaced(value[-1]))


def attempt(path: Path, contents: list[bytes], run: Path) -> None:
    original = path.read_bytes()
    try:
        for content in contents:
            path.write_bytes(content)
            survives(run)
    finally:
        path.write_bytes(original)


JSON_FILES = [
    *(f"search/{name}" for name in ("settings.json", "environment.json", "genotype.json")),
    *(f"train/{name}" for name in ("settings.json", "environment.json", "model.json", "evaluation.json")),
    "train/distortion.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
def test_wrong_json(run: Path, name: str) -> None:
    path = run / name
    variants = [json.dumps(v).encode() for v in (*WRONG, *replaced(json.loads(path.read_text())))]
    attempt(path, random.Random(0).sample(variants, 12), run)


@pytest.mark.parametrize("name", ["search/log.jsonl", "train/log.jsonl"])
def test_wrong_log(run: Path, name: str) -> None:
    path = run / name
    lines = path.read_text().splitlines()
    variants = [
        "\n".join([*lines[:-1], json.dumps(v), ""]).encode() for v in (*WRONG, *replaced(json.loads(lines[-1])))
    ]
    attempt(path, random.Random(0).sample(variants, 20), run)


@pytest.mark.parametrize("name", ["search/alphas.npz", "train/masks.npz", "train/examples.npz"])
def test_wrong_arrays(run: Path, name: str) -> None:
    path = run / name
    draw = random.Random(0)
    good = path.read_bytes()
    cut = [good[: draw.randrange(len(good))] for _ in range(8)]
    flipped = []
    for _ in range(16):
        content = bytearray(good)
        content[draw.randrange(len(content))] ^= 255
        flipped.append(bytes(content))
    attempt(path, [*cut, *flipped], run)
    with np.load(path) as found:
        arrays = {key: found[key] for key in found.files}
    spoil: tuple[Callable[[Any], Any], ...] = (
        lambda a: a[:0],
        lambda a: a[:1],
        lambda a: a.astype(str),
        lambda a: a.reshape(-1),
        lambda a: a[None],
        lambda a: np.full(a.shape, np.nan),
        lambda a: np.float64(1),
    )
    spoilt = [{**arrays, key: change(a)} for key, a in arrays.items() if a.ndim for change in spoil]
    spoilt += [{k: v for k, v in arrays.items() if k != key} for key in arrays]
    for wrong in spoilt:
        content = io.BytesIO()
        np.savez(content, **wrong)
        attempt(path, [content.getvalue()], run)
    assert survives(run)
