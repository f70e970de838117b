"""Run folders: one writer at a time, checkpoints and logs that are its own, going on by the folder alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rnas.cli import main, parse
from rnas.compute import checkpoint
from rnas.errors import RnasError
from rnas.nas.methods.rnas import Settings as Search
from rnas.records.folder import Run, alone, command_of, read_log, settings_of
from rnas.records.layout import LOCK
from rnas.settings import NOT_IDENTITY, Perturbation, SearchSpace, Source, Train, identity
from rnas.settings import Run as Pipeline

HOLDING = """
import sys, time
from pathlib import Path
from rnas.records.folder import alone
with alone(Path(sys.argv[1])):
    Path(sys.argv[1], ".log.jsonl.01234567.tmp").touch()
    print("held", flush=True)
    time.sleep(600)
"""
TRAINED = Train("ResNet18", Path("unused"))


def held(folder: Path) -> subprocess.Popen[str]:
    """Another process that writes to `folder`, and has begun a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_refused_with_the_name_of_the_first_which_may_be_killed(tmp_path: Path) -> None:
    process = held(tmp_path)
    try:
        with pytest.raises(RnasError, match=rf"process {process.pid} on \S+ since 20"), alone(tmp_path):
            pass
        with pytest.raises(RnasError, match=f"process {process.pid}"):
            Run.open(tmp_path, TRAINED, resume=False, device="cpu").__enter__()
        assert not (tmp_path / "settings.json").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with alone(tmp_path):
        assert not list(tmp_path.glob(".log*")), "what the killed one left half-written is gone"
    assert [p.name for p in tmp_path.iterdir()] in ([LOCK], [])


def test_a_writer_may_wait(tmp_path: Path) -> None:
    process, told = held(tmp_path), []

    def end(sentence: str) -> None:
        told.append(sentence)
        process.kill()

    with alone(tmp_path, wait=end):
        process.communicate()
    assert f"process {process.pid}" in told[0]


def test_whoever_comes_later_sees_what_the_first_began(tmp_path: Path) -> None:
    """The look at the folder before the lock may be outdated: the one that counts is under it."""
    with Run.open(tmp_path, TRAINED, resume=False, device="cpu"):
        assert not os.access(tmp_path / "checkpoint.pt", os.F_OK)
    with (
        pytest.raises(RnasError, match="seed was 0, now 1"),
        Run.open(tmp_path, replace(TRAINED, seed=1), resume=True, device="cpu"),
    ):
        pass


def test_a_checkpoint_is_its_runs(tmp_path: Path) -> None:
    for seed in (0, 5):
        with Run.open(tmp_path / str(seed), replace(TRAINED, seed=seed), resume=False, device="cpu") as run:
            checkpoint.save(run, {"epoch": 0, "net": torch.zeros(2)})
            loaded = checkpoint.load(run)
            assert loaded is not None
            assert set(loaded) == {"epoch", "net"}
    shutil.copy(tmp_path / "0" / "checkpoint.pt", tmp_path / "5")
    with (
        Run.open(tmp_path / "5", replace(TRAINED, seed=5), resume=True, device="cpu") as run,
        pytest.raises(RnasError, match=r"checkpoint\.pt is the checkpoint of another run \(seed was 0, now 5\)"),
    ):
        checkpoint.load(run)
    torch.save({"epoch": 3}, tmp_path / "5" / "checkpoint.pt")  # of an earlier version
    with Run.open(tmp_path / "5", replace(TRAINED, seed=5), resume=True, device="cpu") as run:
        assert checkpoint.load(run) == {"epoch": 3}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a log of five epochs, and a warning between."""
    run = Run(tmp_path_factory.mktemp("log"), {})
    for epoch in range(1, 6):
        run.log(event="epoch", epoch=epoch, loss=2.5 / epoch, train={"clean_accuracy": None}, lr=1e-05)
        if epoch == 2:
            run.log(event="warning", message="μ")
    assert [e.get("epoch") for e in read_log(run.folder)] == [1, 2, None, 3, 4, 5]
    return (run.folder / "log.jsonl").read_text().splitlines(keepends=True)


EPOCHS = (0, 1, 3, 4, 5)  # their lines


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, int, int, str]:
    """A kind of damage, two lines, and a character."""
    kinds = st.sampled_from(("lost", "twice", "exchanged", "changed", "NaN", "old"))
    where = st.sampled_from(EPOCHS[:-1])
    return draw(kinds), draw(where), draw(st.integers(0, 10_000)), draw(st.sampled_from("0123456789.,:}x"))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@given(damage())
@examples(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_a_damaged_log_is_named(log: list[str], tmp_path_factory: pytest.TempPathFactory, done: tuple) -> None:
    kind, at, place, character = done
    lines = list(log)
    after = EPOCHS[EPOCHS.index(at) + 1]
    if kind == "lost":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "exchanged":
        lines[at], lines[after] = lines[after], lines[at]
    elif kind == "changed":
        place %= len(lines[at]) - 1
        lines[at] = lines[at][:place] + character + lines[at][place + 1 :]
    else:  # lines of earlier versions have no checksum
        lines[at] = re.sub(r', "crc32": \d+', "", lines[at])
        lines[at] = re.sub(r'"loss": [0-9.]+', '"loss": NaN' if kind == "NaN" else '"loss": 1e999', lines[at])
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(lines))
    if lines == log:
        read_log(folder)
    elif '"crc32"' not in lines[at] and kind == "changed" and is_json(lines[at]):  # its name was hit, and nothing else
        assert [e["epoch"] for e in read_log(folder) if e["event"] == "epoch"] == [1, 2, 3, 4, 5]
    else:
        with pytest.raises(RnasError, match=r"log\.jsonl, line"):
            read_log(folder)


def test_a_log_that_lacks_what_the_checkpoint_knows_is_named(log: list[str], tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    (tmp_path / "log.jsonl").write_text("".join(log[:-1]))
    with pytest.raises(RnasError, match="4 epochs"):
        run.rewind(5)
    run.rewind(3)
    assert (tmp_path / "log.jsonl").read_text() == "".join(log[:4]), "the lines that stay are left as they were"


@pytest.mark.parametrize(
    "given",
    [
        Search(
            Path("x"),
            Source("/a.npz", Path("/root"), 8, 0.2, 3),
            SearchSpace(nodes=2, operations=("none", "skip_connect")),
            Perturbation(0.1, 0.01),
            bound="0.5x",
            warmup=0,
        ),
        Train("RNAS-L", Path("x"), stem_stride=2, loss="trades", augment=False),
        Pipeline(Source(), Path("x"), attacks=("fgsm", "aa"), eps=8 / 255, minutes=3),
    ],
)
def test_settings_come_back_from_their_folder(given: Search | Train | Pipeline, tmp_path: Path) -> None:
    with Run.open(tmp_path, given, resume=False, device="cpu", facts={"precision": "bf16", "images": {"train": 3}}):
        found = settings_of(tmp_path, command_of(given), lambda plain: type(given))
    assert found == replace(given, out=tmp_path, resume=True, precision="bf16")
    assert identity(found) == identity(given)


def test_resume_with_the_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a cell of one's own, whose file may be gone: settings.json holds it."""
    cell = [["skip_connect", 0], ["max_pool_3x3", 1]]
    genotype = {"normal": cell, "normal_concat": [2], "reduce": cell, "reduce_concat": [2]}
    (tmp_path / "cell.json").write_text(json.dumps(genotype))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = "--limit-per-class 4 --cells 3 --channels 4 --batch-size 32 --epochs 2 --standard --device cpu".split()
    main(["train", str(tmp_path / "cell.json"), "--out", str(whole), *options])
    shutil.copytree(whole, cut)
    for name in ("model.json", "model.safetensors", "checkpoint.pt"):
        (cut / name).unlink()
    (tmp_path / "cell.json").unlink()
    main(["train", "--resume", str(cut), "--device", "cpu"])
    assert (cut / "model.json").read_bytes() == (whole / "model.json").read_bytes(), "the weights' digest, too"
    capsys.readouterr()
    main(["train", "--resume", str(cut)])
    assert "is finished" in capsys.readouterr().out


def test_resume_takes_only_what_may_change(tmp_path: Path) -> None:
    genotype = {"normal": [["skip_connect", 0]] * 2, "normal_concat": [2]}
    with Run.open(
        tmp_path, replace(TRAINED, arch="genotype", seed=3), resume=False, device="cpu", facts={"genotype": genotype}
    ):
        pass
    found = parse(["train", "--resume", str(tmp_path), "--device", "cpu", "--save-memory"])
    assert (found.seed, found.arch, found.device, found.save_memory) == (3, str(tmp_path), "cpu", True)
    for arguments in (["--seed", "0"], ["--epochs=3"], ["RNAS-L"]):
        with pytest.raises(RnasError, match="takes the settings from its folder"):
            parse(["train", "--resume", str(tmp_path), *arguments])
    assert parse(["train", "--resume", "RNAS-L", "--out", str(tmp_path)]).arch == "RNAS-L", "the flag as before"
    for command, says in (("search", "rnas train"), ("run", "rnas train")):
        with pytest.raises(RnasError, match=says):
            parse([command, "--resume", str(tmp_path)])
    with pytest.raises(RnasError, match="holds no run"):
        parse(["run", "--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("key", sorted(set(identity(TRAINED)) - {"arch", *NOT_IDENTITY}))
def test_damaged_settings_are_named(key: str, tmp_path: Path) -> None:
    with Run.open(tmp_path, TRAINED, resume=False, device="cpu"):
        pass
    path = tmp_path / "settings.json"
    wrong = 3 if key in ("source", "perturbation") else {"a": "b"}
    path.write_text(json.dumps({**json.loads(path.read_text()), key: wrong}))
    with pytest.raises(RnasError, match=r"settings\.json"):
        settings_of(tmp_path, "train", lambda found: Train)
