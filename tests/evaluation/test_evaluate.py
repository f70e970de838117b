"""`rnas evaluate` as people use it: names on the command line, another norm, a kill at any moment, progress."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.evaluation.test_battery import Killed, quick

from rnas.attacks import PGD
from rnas.cli import main
from rnas.compute.freezing import unfolded
from rnas.console import Console
from rnas.data import load
from rnas.data.dataset import stratified, white
from rnas.errors import RnasError
from rnas.evaluation.evaluate import evaluate_run
from rnas.nets.saved import load_model, save_model
from rnas.settings import Evaluate
from rnas.vulnerability import network_vulnerability

__all__ = ["quick"]  # a fixture: AutoAttack with few steps

TRAINING = "train RNAS-L --limit-per-class 16 --cells 3 --channels 4 --batch-size 32 --epochs 1 --standard".split()
WHOLE = ["aa", "apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    main([*TRAINING, "--out", str(out)])
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def found(run: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(run / "masks.npz") as masks:
        return json.loads((run / "evaluation.json").read_text()), {name: masks[name] for name in masks}


@pytest.mark.parametrize("threat", [[], ["--norm", "l2", "--eps", "0.5"]])
def test_autoattack_and_its_members_by_name(threat: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--limit", "20", "--batch-size", "10", *threat, "--attacks", *WHOLE])
    summary, masks = found(run)
    assert set(summary["attacks"]) == set(WHOLE)
    assert (summary["norm"], summary["eps"]) == (("l2", 0.5) if threat else ("linf", pytest.approx(16 / 255)))
    assert masks["clean"].sum() > 0
    for name in WHOLE[1:]:
        assert not (masks["aa"] & ~masks[name]).any(), name
    assert np.array_equal(masks["aa"], np.logical_and.reduce([masks[name] for name in WHOLE]))
    seconds = {name: row["seconds"] for name, row in summary["attacks"].items()}
    assert min(seconds.values()) > 0
    assert seconds["aa"] > seconds["apgd-ce"], "what AutoAttack shares with its members counts for both"
    said = capsys.readouterr().out
    for name in ["aa/apgd-ce on", "aa: ", "fab-t: "]:
        assert name in said


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process dies at its `after`-th change of the disk: a file that is not yet renamed, a folder not removed."""
    calls = 0

    def deadly(genuine):  # type: ignore[no-untyped-def]
        def act(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == after:
                raise Killed
            return genuine(*arguments, **options)

        return act

    monkeypatch.setattr("rnas.files.os.replace", deadly(os.replace))
    monkeypatch.setattr("rnas.evaluation.evaluate.shutil.rmtree", deadly(shutil.rmtree))


# The writer's name, folder cleared, settings, state, a batch for each attack, masks, examples, evaluation, folder gone.
MOMENTS = 10


@pytest.mark.parametrize(
    "after", [m if m in (5, 8) else pytest.param(m, marks=pytest.mark.slow) for m in range(1, MOMENTS + 1)]
)
def test_resume_goes_on_after_a_kill_at_any_moment(after: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are all that is left of a killed process: so it is killed at a change of one."""
    settings = Evaluate(run=run, attacks=("fgsm", "pgd2"), limit=16)
    with monkeypatch.context() as patch:
        dying(patch, after)
        with pytest.raises(Killed):
            evaluate_run(settings)
    evaluate_run(replace(settings, resume=True))
    resumed = found(run)
    assert not (run / "evaluation.partial").exists()
    for name in ("evaluation.json", "masks.npz"):
        (run / name).unlink()
    whole = evaluate_run(settings)
    assert all(np.array_equal(resumed[1][name], mask) for name, mask in whole.masks.items())
    for key in ("clean", "union", "warnings"):
        assert resumed[0][key] == whole.summary[key]


def test_an_unfinished_evaluation_is_not_dropped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Evaluate(run=run, attacks=("fgsm", "pgd2"), limit=16)
    with monkeypatch.context() as patch:
        dying(patch, 6)
        with pytest.raises(Killed):
            evaluate_run(settings)
    kept = (run / "evaluation.partial" / "attacks.json").read_bytes()
    with pytest.raises(RnasError, match="holds an unfinished evaluation: --resume goes on with it"):
        evaluate_run(settings)
    assert (run / "evaluation.partial" / "attacks.json").read_bytes() == kept


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_shows_survivors_and_the_time_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    evaluate_run(Evaluate(run=run, attacks=("aa",), limit=10, batch_size=4), Console(screen))
    shown = screen.getvalue()
    assert "aa/apgd-ce on run: " in shown
    assert "of 10 survive" in shown
    assert "0:00:0" in shown


def test_figures_of_an_earlier_evaluation_are_those_of_its_masks(run: Path) -> None:
    main(["evaluate", str(run), "--limit", "30", "--attacks", "fgsm"])
    summary, _ = found(run)
    summary["attacks"]["fgsm"]["accuracy"] = 1.0
    (run / "evaluation.json").write_text(json.dumps(summary))
    main(["evaluate", str(run), "--limit", "30", "--attacks", "pgd2"])
    summary, masks = found(run)
    assert {name: v["accuracy"] for name, v in summary["attacks"].items()} == {
        name: masks[name].mean() for name in ("fgsm", "pgd2")
    }


def test_a_network_that_deceives_its_evaluation_is_warned_of_everywhere(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits so large that the softmax saturates and cross-entropy has no gradient: the least of maskings."""
    net, meta = load_model(run)
    evaluate_run(Evaluate(run=run, attacks=("fgsm",), limit=30))
    with torch.no_grad(), np.load(run / "examples.npz") as examples:
        weight, bias = list(net.parameters())[-2:]  # the classifier
        bias -= net(torch.from_numpy(examples["clean"]).permute(0, 3, 1, 2) / 255).mean(0)  # so that answers vary
        weight.mul_(1e6)
        bias.mul_(1e6)
    save_model(run, net, meta)
    main(["evaluate", str(run), "--limit", "30", "--attacks", "fgsm"])
    summary, _ = found(run)
    (warning,) = [w for w in summary["warnings"] if "gradients vanish" in w]
    assert f"warning: {warning}" in capsys.readouterr().out
    main(["report", str(run), "--out", str(run / "report.html")])
    assert "gradients vanish" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--eps 0", "eps is 0"),
        ("--eps -8/255", "eps"),
        ("--eps 8", "(0, 1]"),
        ("--norm l3", "l3"),
        ("--batch-size 0", "batch-size is 0"),
        ("--limit 0", "limit is 0"),
        ("--attacks apgd", "did you mean apgd-"),
        ("--attacks aa autoattack", "unknown attack 'autoattack'"),
        ("--resume --batch-size 7", "batch_size"),
        ("--resume --attacks pgd3", "attacks"),
    ],
)
def test_evaluations_that_cannot_be(
    arguments: str, said: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--resume" in arguments:
        with monkeypatch.context() as patch:
            dying(patch, 6)
            with pytest.raises(Killed):
                main(["evaluate", str(run), "--limit", "10", "--attacks", "fgsm"])
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run), "--limit", "10", "--attacks", "fgsm", *arguments.split()])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("settings.json", '{"source": "digits", "seed": 0, "standard": false}', "does not say which images"),
        ("settings.json", '{"seed": 0}', "does not say which images"),
        ("settings.json", "[]", "does not say which images"),
        ("settings.json", '{"source": {"data": 3}, "seed": 0, "standard": true}', "data is 3"),
        ("evaluation.json", "without attacks", "$.attacks"),
        ("masks.npz", "PK", "damaged"),
        ("masks.npz", "flipped", "damaged"),
    ],
)
def test_a_damaged_folder_is_named(
    file: str, content: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), "--limit", "10", "--attacks"]
    main([*command, "fgsm"])
    capsys.readouterr()
    if file == "evaluation.json":
        content = json.dumps({**json.loads((run / file).read_text()), "attacks": None})
    if content == "flipped":
        good = (run / file).read_bytes()
        (run / file).write_bytes(good[:60] + bytes(b ^ 0x5A for b in good[60:100]) + good[100:])
    else:
        (run / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([*command, "pgd2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert file in error
    assert said in error


@pytest.mark.parametrize(("kind", "size"), [("oblong photos", []), ("arrays", ["--image-size", "16"])])
def test_data_is_scaled_as_the_training_images_were(kind: str, size: list[str], tmp_path: Path) -> None:
    """The network's own images, named by --data, give the figures that they give without it."""
    rng, data = np.random.default_rng(0), tmp_path / "images"
    if kind == "arrays":
        data = tmp_path / "images.npz"
        x, y = rng.integers(0, 256, (12, 20, 28), np.uint8), np.arange(12) % 2
        np.savez(data, x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    for part, name, k in [(p, c, k) for p in ("train", "test") for c in "ab" for k in range(4) if kind != "arrays"]:
        (data / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(data / part / name / f"{k}.png")
    run = tmp_path / "run"
    training = ["train", "ShuffleNetV2", "--epochs", "1", "--batch-size", "4", "--standard", "--device", "cpu"]
    main([*training, "--data", str(data), *size, "--out", str(run)])
    figures = []
    for named in ([], ["--data", str(data)], ["--data", str(data), *size]):
        main(["evaluate", str(run), *named, "--attacks", "fgsm", "--eps", "8/255"])
        figures.append({key: found(run)[0][key] for key in ("clean", "union", "images_sha256")})
    assert figures[1] == figures[0]
    assert figures[2] == figures[0]
    main(["distortion", str(run), "--data", str(data), "--limit", "4", "--out", str(tmp_path / "distortion")])
    for wrong in (["--data", str(data), "--image-size", "12"], ["--image-size", "16"]):
        with pytest.raises(SystemExit) as e:
            main(["evaluate", str(run), *wrong, "--attacks", "fgsm"])
        assert e.value.code == 2


def test_f_of_the_trained_network_is_that_of_its_cells(run: Path) -> None:
    main(["evaluate", str(run), "--limit", "30", "--batch-size", "20", "--attacks", "fgsm"])
    f = found(run)[0]["vulnerability"]
    net, meta = load_model(run)
    test = load("digits").test
    x, y = (t[stratified(test.labels, 30, seed=0).nonzero()[:, 0]] for t in (test.images / white("cpu"), test.labels))
    eps = 16 / 255
    x_adv = PGD(eps=eps, step=eps / 4, steps=20, seed=0)(net, x, y)
    with torch.no_grad(), unfolded(net):
        clean, adversarial = (net.forward_cells(images)[1] for images in (x, x_adv))
    assert f["value"] == pytest.approx(float(network_vulnerability(clean, adversarial)), rel=0.05), (
        "another random start"
    )
    assert f["interval"][0] < f["value"] < f["interval"][1]
    assert (f["n"], f["attack"], f["layers"]) == (30, "pgd20", meta.cells)
