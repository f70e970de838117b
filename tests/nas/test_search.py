"""The search loop (Algorithm 1) at small size on real digits: what the bound does; a killed run loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rnas.errors import RnasError
from rnas.genotype import Genotype
from rnas.nas.methods.rnas import Settings as Search
from rnas.nas.search import search
from rnas.records.folder import read_log
from rnas.settings import Bound, Perturbation, SearchSpace, Source

SMALL = Search(
    out=Path("unused"),
    source=Source(data="digits", limit_per_class=14),
    space=SearchSpace(cells=2, channels=4, nodes=2),
    perturbation=Perturbation(attack_steps=2),
    epochs=3,
    warmup=1,
    batch_size=32,
    lr=0.05,
    alpha_lr=0.01,
    monitor=32,
)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    search(replace(SMALL, out=folder, epochs=2, bound="none"))
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Search:
    """The settings of a search that is through, in a folder of its own."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return replace(SMALL, out=tmp_path, epochs=2, bound="none")


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    """Same genotype, α, weights, optimizers and log, bit for bit; only the clocks differ."""
    assert Genotype.load(a / "genotype.json") == Genotype.load(b / "genotype.json")
    ours, theirs = checkpoint_of(a), checkpoint_of(b)
    for name, value in ours["net"].items():  # tensors, and what else a method remembers
        other = theirs["net"][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    for key in ("optimizer", "alpha_optimizer"):
        for p, state in ours[key]["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[key]["state"][p][k]))
                for k, v in state.items()
                if v is not None
            )
    clocks = {"seconds", "images_per_second"}
    logs = [
        [{k: v for k, v in e.items() if k not in clocks} for e in read_log(f) if e["event"] == "epoch"] for f in (a, b)
    ]
    assert logs[0] == logs[1]


def test_a_huge_bound_is_no_bound(tmp_path: Path) -> None:
    for bound in ("1e9", "none"):
        search(replace(SMALL, out=tmp_path / bound, bound=bound, epochs=2))
    huge, off = (checkpoint_of(tmp_path / bound)["net"] for bound in ("1e9", "none"))
    assert all(torch.equal(huge[name], off[name]) for name in off if isinstance(off[name], torch.Tensor))
    assert all(e["distance"] in (0, None) for e in read_log(tmp_path / "1e9"))


def test_a_tight_relative_bound_holds_at_the_end(tmp_path: Path) -> None:
    settings = replace(SMALL, out=tmp_path, bound="0.1x", epochs=2, projection_steps=60, projection_lr=0.5)
    search(settings)
    warm, last = (e for e in read_log(tmp_path) if e["event"] == "epoch")
    assert last["H"] == pytest.approx(0.1 * warm["F"], rel=1e-12)
    assert last["F_before"] > last["H"] >= last["F"]
    assert last["multiplier"] > 0
    assert last["distance"] > 0
    assert 0.1 <= last["chance"] < 0.2
    assert last["at_chance"] == (last["val"]["clean_accuracy"] < 0.2)
    with np.load(tmp_path / "alphas.npz") as alphas:
        assert alphas["normal"].shape == (3, 5, 8)
        assert np.array_equal(alphas["normal"][0], alphas["normal"][1]), "the warm-up leaves α alone"


@pytest.mark.parametrize(
    ("arch_loss", "reduction", "features"), [("clean+adv", "mean", "raw"), ("adv", "sum", "standardized")]
)
def test_every_reading_of_the_method_runs(tmp_path: Path, arch_loss: str, reduction: str, features: str) -> None:
    settings = replace(SMALL, out=tmp_path, arch_loss=arch_loss, reduction=reduction, features=features, epochs=2)
    search(replace(settings, bound="0.9x", projection_steps=5))
    event = [e for e in read_log(tmp_path) if e["event"] == "epoch"][-1]
    assert event["phase"] == "search"
    assert np.isfinite([event["theta_loss"], event["alpha_loss"], event["F"], event["H"]]).all()


def test_a_bound_that_was_not_reached_is_said(tmp_path: Path) -> None:
    search(replace(SMALL, out=tmp_path, bound="0.01x", epochs=2, projection_steps=1))
    warning = read_log(tmp_path)[-1]
    assert warning["event"] == "warning"
    assert warning["F"] > warning["H"]
    assert "over its bound" in warning["message"]


def test_bounds() -> None:
    assert Bound.parse("1e-4") == Bound(1e-4, False)
    assert Bound.parse("0.5x") == Bound(0.5, True)
    assert Bound.parse("none") is None
    for wrong in ("-1", "x", "nan", "-0.5x", "tight"):
        with pytest.raises(RnasError, match="bound is"):
            Bound.parse(wrong)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match=r"(NaN|nan|inf) in epoch 1, step \d+; there is no checkpoint"):
        search(replace(SMALL, out=tmp_path, lr=1e30, clip=1e30))
    assert not (tmp_path / "genotype.json").exists()


def test_a_data_set_smaller_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match="smaller --batch-size"):
        search(replace(SMALL, out=tmp_path / "run", batch_size=512))
    assert not (tmp_path / "run").exists()


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL while an epoch is under way; the rest of the run is the same bit for bit."""
    settings = replace(SMALL, bound="0.5x", projection_steps=5, device="cpu")
    search(replace(settings, out=tmp_path / "whole"))
    arguments = (
        "--data digits --limit-per-class 14 --cells 2 --channels 4 --nodes 2 --attack-steps 2 --epochs 3 --warmup 1 "
        "--batch-size 32 --lr 0.05 --alpha-lr 0.01 --monitor 32 --bound 0.5x --projection-steps 5 --device cpu --resume"
    ).split()
    command = [sys.executable, "-m", "rnas", "search", *arguments, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    log = tmp_path / "killed" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "genotype.json").exists()
    search(replace(settings, out=tmp_path / "killed", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resume_refuses_another_run(finished: Search, tmp_path: Path) -> None:
    settings = finished
    with pytest.raises(RnasError, match="holds this run already"):
        search(settings)
    with pytest.raises(RnasError, match=r"lr was 0\.05, now 0\.1"):
        search(replace(settings, lr=0.1, resume=True))
    before = (tmp_path / "log.jsonl").read_text()
    search(replace(settings, resume=True))
    assert (tmp_path / "log.jsonl").read_text() == before, "a finished run is left as it is"


def test_a_damaged_checkpoint_is_named(finished: Search, tmp_path: Path) -> None:
    settings = finished
    good = (tmp_path / "checkpoint.pt").read_bytes()
    middle = len(good) // 3  # in the weights: torch.load would take it for good
    damaged = good[:middle] + bytes(b ^ 0x5A for b in good[middle : middle + 40]) + good[middle + 40 :]
    for content in (b"no checkpoint", damaged):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(RnasError, match=r"checkpoint\.pt is damaged"):
            search(replace(settings, resume=True))
    (tmp_path / "checkpoint.pt").unlink()
    search(replace(settings, resume=True))
    assert (tmp_path / "checkpoint.pt").read_bytes() == good, "the advice works, and the result is the same"


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished: Search, tmp_path: Path) -> None:
    """Or its owner would delete it."""
    settings = finished
    (tmp_path / "checkpoint.pt").rename(tmp_path / "moved")
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(RnasError, match=r"cannot read .*checkpoint\.pt"):
        search(replace(settings, resume=True))


@pytest.mark.parametrize("content", ["", '{"F": 1}\n'])
def test_a_search_that_is_through_needs_its_log(content: str, finished: Search, tmp_path: Path) -> None:
    settings = finished
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(RnasError, match=r"log\.jsonl tells of no epoch"):
        search(replace(settings, resume=True))


@pytest.mark.parametrize("epoch", ["", ', "epoch": "x"', ', "epoch": true'])
def test_an_epoch_without_a_number_is_named(epoch: str, finished: Search, tmp_path: Path) -> None:
    settings = finished
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"event": "epoch"{epoch}}}\n' + log.read_text())
    with pytest.raises(RnasError, match=r"log\.jsonl, line 1, is an epoch without a number"):
        search(replace(settings, resume=True))


def test_the_log_forgets_what_no_checkpoint_holds(finished: Search, tmp_path: Path) -> None:
    """A kill between log and checkpoint: the epoch is logged again, not twice; half a line is no line."""
    settings = finished
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps({"event": "epoch", "epoch": 3}) + '\n{"event": "ep')
    search(replace(settings, resume=True))
    assert [e["epoch"] for e in read_log(tmp_path)] == [1, 2]


def test_a_checkpoint_of_before_goes_on(tmp_path: Path) -> None:
    """When α were the network's own, the bound lay beside it, and strengths were nowhere."""
    settings = replace(SMALL, epochs=2, bound="0.9x", projection_steps=5)
    search(replace(settings, out=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    saved = checkpoint_of(tmp_path / "whole")
    bound = saved["net"].pop("architecture._extra_state")["bound"]
    net = {name.replace("architecture.alpha.", "alpha_"): t for name, t in saved["net"].items()}
    assert {"alpha_normal", "alpha_reduce"} < set(net)
    old = {**saved, "net": net, "bound": bound}
    del old["strengths"], old["shape"]
    torch.save(old, tmp_path / "old" / "checkpoint.pt")
    (tmp_path / "old" / "genotype.json").unlink()
    file = tmp_path / "old" / "settings.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "lr_min"}))
    search(replace(settings, out=tmp_path / "old", resume=True))
    for name in ("alphas.npz", "strengths.npz"):
        with np.load(tmp_path / "old" / name) as ours, np.load(tmp_path / "whole" / name) as theirs:
            assert all(np.array_equal(ours[k], theirs[k]) for k in theirs.files), name
    assert Genotype.load(tmp_path / "old" / "genotype.json") == Genotype.load(tmp_path / "whole" / "genotype.json")
