"""Training and evaluation of target networks on real digits, and what their folders hold."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

import rnas
from own_networks import Cut, Digits, Heads, Tied, Whole
from rnas.compute.layout import arranged_for
from rnas.console import Console
from rnas.data import load
from rnas.deploy.export import export
from rnas.errors import RnasError
from rnas.evaluation.evaluate import evaluate_run, holds
from rnas.records.evaluations import read_all
from rnas.records.folder import read_log
from rnas.report.read import NetworkPart, read_parts
from rnas.settings import Compare, Distortion, Evaluate, Export, Perturbation, Report, Run, Search, Source, Train
from rnas.statistics import wilson
from rnas.training.train import fit, train

SMALL = Train(
    arch="RNAS-L",
    out=Path("unused"),
    source=Source(data="digits", limit_per_class=16),
    perturbation=Perturbation(attack_steps=2),
    cells=3,
    channels=4,
    epochs=2,
    batch_size=32,
)


CELL = [["skip_connect", 0], ["max_pool_3x3", 1]]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return rnas.load(folder).state_dict()


def test_a_trained_network_comes_back_as_it_was(tmp_path: Path) -> None:
    net = train(replace(SMALL, out=tmp_path)).cpu()
    loaded = rnas.load(tmp_path)
    x = torch.rand(3, 3, 16, 16)
    assert not loaded.training
    assert torch.equal(net(x), loaded(x))
    meta = json.loads((tmp_path / "model.json").read_text())
    assert meta["arch"] == "RNAS-L"
    assert meta["classes"] == [str(k) for k in range(10)]
    assert meta["parameters"] == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("change", [{"standard": True}, {"loss": "trades"}, {"arch": "ShuffleNetV2"}])
def test_other_ways_to_train(change: dict, tmp_path: Path) -> None:
    train(replace(SMALL, out=tmp_path, **change))
    events = read_log(tmp_path)
    assert [e["epoch"] for e in events] == [1, 2]
    assert all(np.isfinite(e["loss"]) for e in events)
    kind = "clean_accuracy" if change.get("standard") else "adversarial_accuracy"
    assert 0 <= events[-1]["train"][kind] <= 1


def test_any_module_can_be_fitted(tmp_path: Path) -> None:
    """`fit` takes a module of one's own; training changes its weights and leaves it in eval mode."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    before = net[1].weight.detach().clone()
    fit(net, load("digits"), replace(SMALL, out=tmp_path, standard=True, augment=False, batch_size=128, epochs=4))
    assert not torch.equal(net[1].weight.cpu(), before)
    assert not net.training
    assert read_log(tmp_path)[-1]["train"]["clean_accuracy"] > 0.7


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), r"float32 \[2, 5\]: expected float32 logits \[2, 10\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 10).double()), "the model fails on images"),
        (nn.Flatten(), "no parameters to train"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "lazy"),
        (Heads("tuple"), "tuple"),
        (Heads("tuple in train mode"), "tuple"),
        (Heads("dict"), "dict"),
        (Cut(), "gradients of images"),
    ],
)
def test_a_module_that_cannot_be_fitted_is_refused_before_anything_is_written(
    net: nn.Module, said: str, tmp_path: Path
) -> None:
    with pytest.raises(RnasError, match=said):
        fit(net, load("digits"), replace(SMALL, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_batch_that_a_module_cannot_take_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """One image before batch normalisation of single values; a larger batch may then have the same folder."""
    net, settings = Whole(), replace(SMALL, out=tmp_path / "out", standard=True, epochs=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RnasError, match="batch-size"):
        fit(net, load("digits", limit_per_class=4), replace(settings, batch_size=1))
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    fit(net, load("digits", limit_per_class=4), replace(settings, batch_size=2))


@pytest.mark.parametrize("standard", [False, True])
def test_frozen_parameters_stay_as_they_are(standard: bool, tmp_path: Path) -> None:
    net, data = Digits(), load("digits", limit_per_class=16)
    net.features.requires_grad_(False)
    frozen, trained = net.features[0].weight.clone(), net.head.weight.clone()
    settings = replace(SMALL, out=tmp_path, epochs=1, standard=standard)
    fit(net, data, settings)
    assert torch.equal(net.features[0].weight.cpu(), frozen)
    assert not torch.equal(net.head.weight.cpu(), trained)
    assert not any(p.requires_grad for p in net.features.parameters())
    with pytest.raises(RnasError, match="checkpoint"):  # to train other ones is another run
        fit(Digits(), data, replace(settings, resume=True))


OWN = [
    (Digits(), "my first try", "own_networks:Digits"),  # its class tells how to build it
    (Digits(stride=1), "own_networks:with_stride_1", "own_networks:with_stride_1"),
    (Tied(), "own_networks:Tied", "own_networks:Tied"),
    (rnas.build("ShuffleNetV2"), "ShuffleNetV2", "ShuffleNetV2"),
]


@pytest.mark.parametrize(("net", "given", "found"), OWN, ids=[given for _, given, _ in OWN])
def test_what_fit_trains_can_be_loaded_evaluated_and_exported(
    net: nn.Module, given: str, found: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")  # as a string, like every path
    fit(net, load("digits", limit_per_class=16), replace(SMALL, arch=given, out=out, standard=True, epochs=1))
    assert json.loads(Path(out, "model.json").read_text())["arch"] == found
    loaded, x = rnas.load(out), torch.rand(3, 3, 16, 16)
    assert torch.allclose(loaded(x), net.cpu()(x), atol=1e-5)
    evaluate_run(Evaluate(run=out, attacks=("fgsm",), limit=10))
    export(loaded, json.loads(Path(out, "model.json").read_text()), "torchscript", f"{out}/net.pt", 16)


@pytest.mark.parametrize("net", [Digits(stride=1), nn.Sequential(nn.Flatten(), nn.Linear(768, 10))])
def test_what_cannot_be_built_anew_gets_no_model_json(net: nn.Module, tmp_path: Path) -> None:
    """Nor does what its class would build with another stride: the same weights, other answers."""
    screen = io.StringIO()
    settings = replace(SMALL, out=tmp_path, standard=True, epochs=1)
    fit(net, load("digits", limit_per_class=16), settings, Console(screen))
    assert not (tmp_path / "model.json").exists()
    assert "package.module:function" in screen.getvalue()


@pytest.mark.parametrize("arch", [*(f"own_networks:{name}" for name in ("Digits", "Heads", "nothing")), "os:abort"])
def test_a_name_that_builds_no_such_network_is_refused_before_anything_is_written(arch: str, tmp_path: Path) -> None:
    with pytest.raises(RnasError):
        fit(Digits(stride=1), load("digits"), replace(SMALL, arch=arch, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_that_the_settings_do_not_name_are_not_taken_for_others(tmp_path: Path) -> None:
    """`fit` takes any data set; what settings.json names, by default the digits, may not be it."""
    data = replace(load("digits", limit_per_class=16), name="mine")
    fit(Digits(), data, replace(SMALL, arch="mine", out=tmp_path, standard=True, epochs=1))
    with pytest.raises(RnasError, match="--data"):
        evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",)))
    evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",), limit=10, data="digits"))


def test_settings_take_paths_as_strings_and_strings_as_paths(tmp_path: Path) -> None:
    out = str(tmp_path)
    for settings in (Search(out), Distortion(("x",), out), Run(out=out), Export(out, out), Report((out,), out)):
        assert settings.out == tmp_path
    assert Compare(runs=(out, out)).runs == (tmp_path, tmp_path)
    assert Source(data=tmp_path, data_root=out) == Source(data=out, data_root=tmp_path)
    assert Train(arch=tmp_path, out=out) == Train(arch=out, out=tmp_path)
    assert Evaluate(run=out, data=tmp_path) == Evaluate(run=tmp_path, data=out)


def test_another_module_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    settings = replace(SMALL, out=tmp_path, standard=True, batch_size=128, epochs=1)
    fit(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), load("digits"), settings)
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 20), nn.Linear(20, 10))
    with pytest.raises(RnasError, match="the checkpoint is of another network"):
        fit(other, load("digits"), replace(settings, resume=True))


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=4, device="cpu")
    train(replace(settings, out=tmp_path / "whole"))
    arguments = (
        "train RNAS-L --data digits --limit-per-class 16 --attack-steps 2 --cells 3 --channels 4 --epochs 4 "
        "--batch-size 32 --device cpu --resume"
    ).split()
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "rnas", *arguments, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    log = tmp_path / "killed" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.json").exists()
    train(replace(settings, out=tmp_path / "killed", resume=True))
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_evaluation_files_agree_with_each_other(tmp_path: Path) -> None:
    train(replace(SMALL, out=tmp_path, standard=True))
    result = evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm", "pgd3"), limit=50))
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    with np.load(tmp_path / "masks.npz") as masks:
        assert summary["clean"]["accuracy"] == masks["clean"].mean()
        assert summary["attacks"]["pgd3"]["accuracy"] == masks["pgd3"].mean() <= masks["clean"].mean()
        assert summary["union"]["accuracy"] == (masks["clean"] & masks["fgsm"] & masks["pgd3"]).mean()
    assert (summary["n"], summary["dataset"], summary["eps"]) == (50, "digits", pytest.approx(16 / 255))
    assert result.robust("fgsm") == summary["attacks"]["fgsm"]["accuracy"]
    assert not (tmp_path / "evaluation.partial").exists()
    again = evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm", "pgd3"), limit=50))
    assert all(np.array_equal(again.masks[name], mask) for name, mask in result.masks.items())


def test_evaluations_of_one_kind_add_up(tmp_path: Path) -> None:
    """Another attack joins what was found before; another ε, or other images, lie beside it. Nothing is lost."""
    train(replace(SMALL, out=tmp_path, epochs=1, standard=True))
    evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",), limit=30))
    both = evaluate_run(Evaluate(run=tmp_path, attacks=("pgd2",), limit=30))
    assert set(both.summary["attacks"]) == {"fgsm", "pgd2"}
    assert both.summary["union"]["accuracy"] == (both.masks["fgsm"] & both.masks["pgd2"]).mean()
    before = (tmp_path / "evaluation.json").read_bytes()
    others = (Evaluate(run=tmp_path, attacks=("fgsm",), limit=30, eps=1 / 255), Evaluate(tmp_path, ("fgsm",), limit=20))
    for settings in (*others, *others):  # a second time they join themselves
        assert set(evaluate_run(settings).summary["attacks"]) == {"fgsm"}
    assert (tmp_path / "evaluation.json").read_bytes() == before
    kept = read_all(tmp_path)
    assert [(e.summary.n, e.attacks) for e in kept] == [(30, ["fgsm", "pgd2"]), (30, ["fgsm"]), (20, ["fgsm"])]
    assert all(e.files.masks.exists() and e.files.examples.exists() for e in kept)
    (part,) = read_parts([tmp_path])
    assert isinstance(part, NetworkPart)
    assert (part.shown, part.evaluation) == ("evaluation.json", kept[0].summary)


def test_results_may_lie_elsewhere(tmp_path: Path) -> None:
    """Of a run that one may only read, nothing is written into its folder; a page can be made of the results alone."""
    train(replace(SMALL, out=tmp_path / "run", epochs=1, standard=True))
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    settings = Evaluate(run=tmp_path / "run", attacks=("fgsm",), limit=20, out=tmp_path / "mine")
    evaluate_run(settings)
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()) == before
    assert holds(settings)
    assert not holds(replace(settings, out=None))
    (part,) = read_parts([tmp_path / "mine"])
    assert isinstance(part, NetworkPart)
    assert part.shown == "evaluation.json"


@pytest.mark.parametrize("file", ["evaluation.json", "masks.npz"])
def test_a_damaged_evaluation_is_known_before_the_attacks(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(SMALL, out=tmp_path, epochs=1, standard=True))
    evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",), limit=20))
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("rnas.evaluation.evaluate.evaluate", lambda *args: pytest.fail("the attacks have begun"))
    with pytest.raises(RnasError, match=file.replace(".", r"\.")):
        evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",), limit=20))


def test_narrow_strided_convolutions_do_not_overrun_their_memory(tmp_path: Path) -> None:
    """oneDNN's weight gradient of a strided 1x1 convolution of fewer than 16 channels, in channels_last, writes beyond
    its memory from 48 pixels on: a process of its own, for the whole of it may die."""
    out = tmp_path / "run"
    arguments = (
        f"train RNAS-H --data digits --image-size 64 --limit-per-class 1 --cells 3 --channels 6 --epochs 1 "
        f"--attack-steps 1 --batch-size 5 --out {out}"
    )
    done = subprocess.run([sys.executable, "-m", "rnas", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "model.json").exists()
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1, stride=2))
    assert arranged_for(net, torch.zeros(2, 8, 64, 64)).is_contiguous()
    wide = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1, stride=2))
    assert not arranged_for(wide, torch.zeros(2, 16, 64, 64)).is_contiguous()


def test_a_limit_keeps_every_class(tmp_path: Path) -> None:
    train(replace(SMALL, out=tmp_path, epochs=1, standard=True))
    evaluate_run(Evaluate(run=tmp_path, attacks=("fgsm",), limit=20))
    with np.load(tmp_path / "masks.npz") as masks:
        assert sorted(set(masks["labels"])) == list(range(10))


def test_other_images_than_those_of_the_search_are_told(tmp_path: Path) -> None:
    """--data is digits unless it is given: of a search on own images that would be a trap."""
    genotype = {"normal": CELL, "normal_concat": [2], "reduce": CELL, "reduce_concat": [2]}
    (tmp_path / "genotype.json").write_text(json.dumps(genotype))
    for searched, told in (("/data/pets", True), ("digits", False)):
        (tmp_path / "settings.json").write_text(json.dumps({"source": {"data": searched}}))
        screen = io.StringIO()
        train(replace(SMALL, arch=str(tmp_path), out=tmp_path / str(told), epochs=1, standard=True), Console(screen))
        assert ("was searched on /data/pets, and is now trained on digits" in screen.getvalue()) is told


def test_a_changed_genotype_is_another_run(tmp_path: Path) -> None:
    """The path is the same, what it leads to is not: --resume refuses."""
    for names in (["skip_connect", "max_pool_3x3"], ["avg_pool_3x3", "skip_connect"]):
        cell = [[name, k] for k, name in enumerate(names)]
        value = {"normal": cell, "normal_concat": [2], "reduce": cell, "reduce_concat": [2]}
        (tmp_path / "cell.json").write_text(json.dumps(value))
        settings = replace(SMALL, arch=str(tmp_path / "cell.json"), out=tmp_path / "run", epochs=1, resume=True)
        if names[0] == "skip_connect":
            train(settings)
        else:
            with pytest.raises(RnasError, match="holds another run"):
                train(settings)


def test_divergence_in_the_last_step_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match=r"loss became .* in epoch 1"):
        train(replace(SMALL, out=tmp_path, epochs=1, lr=1e30, batch_size=160))
    assert not (tmp_path / "model.json").exists()


def test_evaluation_refuses_other_images(tmp_path: Path) -> None:
    train(replace(SMALL, out=tmp_path / "run", epochs=1, standard=True))
    x, y = np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(RnasError, match="other classes"):
        evaluate_run(Evaluate(run=tmp_path / "run", data=str(tmp_path / "two.npz")))


@given(st.integers(1, 5000), st.data())
def test_wilson_is_scipys(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
