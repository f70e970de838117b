"""Every file of a run folder: what is damaged or half-written is named in one sentence, and files of the first version
are read as they were meant."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnas.errors import RnasError
from rnas.files import read_json, write_json
from rnas.genotype import architecture_from_json
from rnas.nas.methods import load as load_method
from rnas.records import codec, evaluations, layout
from rnas.records.folder import read_events, settings_of, training_of
from rnas.records.schema import FORMATS, Candidate, SearchEpoch, Speed, TrainEpoch, Verdicts, Warned, Work, Writer
from rnas.report.read import NetworkPart, SearchPart, read_distortion, read_parts
from rnas.settings import Train

GOLDEN = Path(__file__).parents[1] / "golden" / "run-0.1.0"
"""A search and a training with its evaluation and distortion, by the version of commit 23b13a1."""


STEERING: dict[str, Any] = {
    layout.WRITER: Writer(7, "host", "2026-11-26 13:32:30"),
    layout.VERDICTS: Verdicts({"eps": 0.1}, {"fgsm": "01?"}, {"fgsm": "0.1 0.2 0"}),
    layout.THROUGHPUT: {"RNAS-L, cpu": Speed(0.1, 0.2)},
    layout.FITTED: Work(**{f.name: 3 for f in fields(Work)}),
}
"""Files that are gone when a run ends, or that are not of a single run."""


def kind_of_search(found: dict[str, Any]) -> type[Any]:
    return load_method(found["method"]).settings


class File(NamedTuple):
    """A kind of file, and what reads it."""

    part: str
    name: str
    read: Callable[[Path], Any]


FILES = (
    *(File("train", name, lambda path: codec.read(FORMATS[path.name], path)) for name in FORMATS),
    File("train", layout.EVALUATION, lambda path: evaluations.read(evaluations.Files(path.parent))),
    File("train", layout.DISTORTION, read_distortion),
    File("search", layout.GENOTYPE, lambda path: architecture_from_json(read_json(path), str(path))),
    File("search", layout.SETTINGS, lambda path: settings_of(path.parent, "search", kind_of_search)),
    File("train", layout.SETTINGS, lambda path: settings_of(path.parent, "train", lambda _: Train)),
    File("train", layout.SETTINGS, lambda path: training_of(path.parent)),
    File("search", layout.LOG, lambda path: read_events(path.parent, SearchEpoch)),
    File("train", layout.LOG, lambda path: read_events(path.parent, TrainEpoch)),
)
each_file = pytest.mark.parametrize("file", FILES, ids=[f"{n}-{f.part}-{f.name}" for n, f in enumerate(FILES)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("run") / "run"))
    for name, record in STEERING.items():
        write_json(folder / "train" / name, codec.encode(record))
    return folder


def refused(file: File, run: Path, content: bytes) -> bool:
    """Whether `content` in the place of a file is refused, by an RnasError that names it; any other gets out."""
    path = run / file.part / file.name
    original = path.read_bytes()
    told = str(path)
    try:
        path.write_bytes(content)
        file.read(path)
    except RnasError as e:
        told = str(e)
    finally:
        path.write_bytes(original)
    assert str(path.parent) in told  # of settings.json of another command the folder
    return told != str(path)


@each_file
def test_a_half_written_file_is_named(file: File, run: Path) -> None:
    whole = (run / file.part / file.name).read_bytes()

    @given(st.integers(0, len(whole.rstrip()) - 1))
    @settings(max_examples=30, deadline=None)
    def check(kept: int) -> None:
        cut = refused(file, run, whole[:kept])
        assert cut or file.name == layout.LOG, "only of a log the last line may be cut off: it was never finished"

    check()


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (key,)
        yield from ((key, *rest) for rest in places(part))


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `place`; without that key, where `new` is ..."""
    if not place:
        return new
    key, *rest = place
    if isinstance(value, list):
        return [put(v, tuple(rest), new) if i == key else v for i, v in enumerate(value)]
    if new is ... and not rest:
        return {k: v for k, v in value.items() if k != key}
    return {k: put(v, tuple(rest), new) if k == key else v for k, v in value.items()}


WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([-1, 10**400, "\ud800"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=4,
)


@each_file
def test_a_wrong_value_is_read_or_the_file_is_named(file: File, run: Path) -> None:
    text = (run / file.part / file.name).read_text()
    log = file.name == layout.LOG
    lines = [json.loads(line) for line in text.splitlines()] if log else [json.loads(text)]
    ways = [(i, *place) for i, value in enumerate(lines) for place in ((), *places(value))]

    @given(st.sampled_from(ways), WRONG)
    @settings(max_examples=60, deadline=None)
    def check(place: tuple[Any, ...], wrong: Any) -> None:
        refused(file, run, "".join(json.dumps(v) + "\n" for v in put(lines, place, wrong)).encode())

    check()


@each_file
def test_a_whole_number_too_large_for_a_float_is_read_or_named(file: File, run: Path) -> None:
    text = (run / file.part / file.name).read_text()
    lines = [json.loads(line) for line in text.splitlines()][:1] if file.name == layout.LOG else [json.loads(text)]
    for i, value in enumerate(lines):
        for place in list(places(value))[:60]:
            refused(file, run, "".join(json.dumps(v) + "\n" for v in put(lines, (i, *place), 10**400)).encode())


@each_file
def test_a_file_without_one_of_its_keys_is_read_or_named(file: File, run: Path) -> None:
    if file.name == layout.LOG:
        return
    value = json.loads((run / file.part / file.name).read_text())
    for key in value:
        refused(file, run, json.dumps(put(value, (key,), ...)).encode())


@each_file
def test_bytes_that_are_no_text_are_named(file: File, run: Path) -> None:
    whole = (run / file.part / file.name).read_bytes()
    assert refused(file, run, b"\xff\xfe" + whole)


@pytest.mark.parametrize(
    ("name", "place", "wrong", "at"),
    [
        (layout.EVALUATION, ("clean", "accuracy"), "x", "a number at $.clean.accuracy"),
        (layout.EVALUATION, ("clean", "accuracy"), ..., "at $.clean.accuracy"),
        (layout.EVALUATION, ("clean", "accuracy"), math.inf, "a finite number at $.clean.accuracy"),
        (layout.EVALUATION, ("attacks", "fgsm", "interval", 1), 1.5, "at $.attacks.fgsm.interval[1]"),
        (layout.EVALUATION, ("warnings", 0), None, "text at $.warnings[0]"),
        (layout.META, ("genotype", "normal"), [], "at $.genotype"),
        (layout.META, ("image_size",), [8], "2 values at $.image_size"),
        (layout.DISTORTION, ("layers",), [], "at $.layers"),
        (layout.ENVIRONMENT, ("versions", "torch"), 2, "text at $.versions.torch"),
        (layout.WRITER, ("pid",), True, "an integer at $.pid"),
        (layout.WRITER, ("other",), 1, None),
    ],
)
def test_the_place_of_the_damage_is_told(
    name: str, place: tuple[Any, ...], wrong: Any, at: str | None, run: Path, tmp_path: Path
) -> None:
    value = json.loads((run / "train" / name).read_text())
    changed = put(value, place, wrong) if at else {**value, place[0]: wrong}
    (tmp_path / name).write_text(json.dumps(changed))
    with pytest.raises(RnasError) as e:
        codec.read(FORMATS[name], tmp_path / name)
    assert f"{tmp_path / name} is damaged: expected " in str(e.value)
    assert at is None or at in str(e.value)


@pytest.mark.parametrize("name", FORMATS)
def test_records_come_back_with_what_they_do_not_know(name: str, run: Path) -> None:
    value = json.loads((run / "train" / name).read_text())
    if isinstance(FORMATS[name], type) and issubclass(FORMATS[name], codec.Record):
        value["from a later version"] = {"a": [1]}
    record = codec.decode(FORMATS[name], value, name)
    assert codec.encode(record) == {k: v for k, v in value.items() if v is not None}
    assert codec.decode(FORMATS[name], codec.encode(record), name) == record


def test_events_of_a_log_are_records(tmp_path: Path) -> None:
    events = [
        {"event": "epoch", "epoch": 1, "seconds": 2, "of one method": 3},
        {"event": "candidate", "round": "all", "number": 0, "score": 0.5, "candidate": {}},
        {"event": "resumed"},
        {"event": "warning", "message": "μ"},
    ]
    (tmp_path / layout.LOG).write_text("".join(json.dumps(e) + "\n" for e in events))
    epochs, others = read_events(tmp_path, SearchEpoch)
    assert epochs == (SearchEpoch(epoch=1, seconds=2.0, more={"of one method": 3}),)
    assert others == (Candidate("all", 0, 0.5, {}), Warned("μ"))


def test_golden_run_of_the_first_version_is_read_as_it_was() -> None:
    search, train = read_parts([GOLDEN])
    assert isinstance(search, SearchPart)
    assert isinstance(train, NetworkPart)
    assert [e.phase for e in search.epochs] == ["warmup", "search"]
    assert (search.epochs[-1].F, search.epochs[-1].H) == (0.0016964217647910118, 0.0015882188454270363)
    assert len(search.warnings) == 1
    assert (search.finished, search.genotype) == (True, train.genotype)
    assert (train.parameters, train.shown) == (2404, layout.EVALUATION)
    assert train.evaluation is not None
    assert {name: f.accuracy for name, f in train.evaluation.attacks.items()} == {"fgsm": 0.1, "pgd5": 0.1}
    assert train.examples is not None
    assert train.distortion is not None
    assert train.distortion.layers == ("cells.0", "cells.1", "cells.2")
    assert settings_of(GOLDEN / "search", "search", kind_of_search).bound == "0.5x"
    assert settings_of(GOLDEN / "train", "train", lambda _: Train).epochs == 2


def test_golden_network_of_the_first_version_is_loaded() -> None:
    import rnas

    net = rnas.load(GOLDEN / "train")
    assert sum(p.numel() for p in net.parameters()) == 2404
