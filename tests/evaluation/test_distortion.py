"""`rnas distortion`: layers by name, Eq. 4 over batches, what is trained and what is not, figures, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rnas.attacks import PGD
from rnas.data import load
from rnas.errors import RnasError
from rnas.evaluation.distortion import distortion
from rnas.evaluation.features import layers_of
from rnas.nets import zoo
from rnas.report import write_report
from rnas.report.distortion import (
    Maps,
    deep_layer,
    depths,
    distortion_figure,
    draw_distortion,
    feature_figure,
    read_measured,
)
from rnas.report.drawing.shapes import Picture
from rnas.settings import Distortion, Source, Train
from rnas.training.train import train
from rnas.vulnerability import layer_vulnerabilities


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cells"
    source = Source("digits", limit_per_class=4)
    train(Train("RNAS-L", folder, source, standard=True, cells=3, channels=4, epochs=1, batch_size=20))
    return folder


def measure(out: Path, *networks: str, **changes: object) -> dict[str, object]:
    settings = Distortion(networks, out, data="digits", limit=12, attack_steps=2, cells=3, channels=4)
    (folder, *_) = distortion(replace(settings, **changes))  # type: ignore[arg-type]
    record: dict[str, object] = json.loads((folder / "distortion.json").read_text())
    return record


def test_layers_have_the_papers_names() -> None:
    net = zoo.build("VGG16")
    layers = layers_of(net, "VGG16")
    assert list(layers)[-4:] == ["conv4_3", "conv5_1", "conv5_2", "conv5_3"]
    assert deep_layer(list(layers)) == "conv4_3"  # Fig. 2a
    outputs = {}
    net.get_submodule(layers["conv4_3"]).register_forward_hook(lambda m, args, z: outputs.update(z=z))
    net.eval()(torch.rand(1, 3, 32, 32))
    assert outputs["z"].shape == (1, 512, 4, 4)  # three poolings before it, its own after it
    assert (outputs["z"] >= 0).all()
    assert len(layers_of(zoo.build("ResNet18"), "ResNet18")) == 1 + 8
    assert list(layers_of(zoo.build("DARTS", cells=4, channels=4), "DARTS")) == [f"cells.{i}" for i in range(4)]


@pytest.mark.parametrize("name", [n for n in zoo.HAND_MADE if n != "DenseNet121"])
def test_every_default_layer_is_a_module_with_maps(name: str) -> None:
    net = zoo.build(name).eval()
    x = torch.rand(1, 3, 16, 16)
    found = layer_vulnerabilities(net, x, x, list(layers_of(net, name).values()))
    assert set(found.values()) == {0.0}  # F(x, x) = 0


def test_the_mean_over_batches_is_the_mean_over_images(trained: Path, tmp_path: Path) -> None:
    whole = measure(tmp_path / "whole", str(trained))
    parts = measure(tmp_path / "parts", str(trained), batch_size=5)
    assert whole["vulnerability"] == pytest.approx(parts["vulnerability"], rel=1e-3)
    from rnas.evaluation.evaluate import load as load_run

    net, test = load_run(trained), load("digits").test
    x, y = test.images[:12].float() / 255, test.labels[:12]
    x_adv = PGD(eps=16 / 255, step=4 / 255, steps=2, seed=0)(net, x, y)
    layers = ["cells.0", "cells.1", "cells.2"]
    expected = layer_vulnerabilities(net, x, x_adv, layers)  # Eq. 4
    assert whole["layers"] == layers
    assert whole["vulnerability"] == pytest.approx(list(expected.values()), rel=1e-5)
    assert (whole["eps"], whole["n"], whole["attack"]) == (16 / 255, 12, "pgd2")


def test_a_larger_ball_distorts_more_and_nats_are_positions_times_the_mean(trained: Path, tmp_path: Path) -> None:
    small = measure(tmp_path / "a", str(trained), eps=1 / 255)
    large = measure(tmp_path / "b", str(trained), eps=32 / 255)
    assert np.all(np.array(large["vulnerability"]) > np.array(small["vulnerability"]))
    nats = measure(tmp_path / "c", str(trained), eps=1 / 255, reduction="sum")
    positions = np.array([16 * 16, 8 * 8, 4 * 4])  # both of three cells' last two reduce
    assert np.array(nats["vulnerability"]) == pytest.approx(positions * np.array(small["vulnerability"]), rel=1e-4)


def test_a_trained_run_keeps_its_distortion_for_the_report(trained: Path, tmp_path: Path) -> None:
    record = measure(tmp_path / "out", str(trained), data=None)
    assert record["trained"] is True
    assert record["standard"] is True
    assert json.loads((trained / "distortion.json").read_text()) == record
    write_report([trained], tmp_path / "report.html")
    assert "Distortion by layer" in (tmp_path / "report.html").read_text()


def test_random_weights_are_called_untrained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rnas.console import Console

    settings = Distortion(("ResNet18",), tmp_path, data="digits", limit=4, attack_steps=1, layers=("stem", "stage1.0"))
    distortion(settings, Console())
    assert "untrained: its weights are random" in capsys.readouterr().out
    measured = read_measured(tmp_path)
    assert measured.record.trained is False
    assert "untrained" in measured.name
    assert measured.layers == ["stem", "stage1.0"]


def test_several_networks_share_panels_and_figures(trained: Path, tmp_path: Path) -> None:
    settings = Distortion((str(trained), "RNAS-H"), tmp_path, data="digits", limit=8, attack_steps=1, cells=3)
    settings = replace(settings, channels=4)
    folders = distortion(settings)
    assert folders == [tmp_path / "cells", tmp_path / "RNAS-H"]
    files = draw_distortion(folders, tmp_path)
    assert {f.name for f in files} >= {"distortion.svg", "distortion.png", "features-cells.2.svg", "features.png"}
    for file in files:
        if file.suffix == ".png":
            Image.open(file).verify()
    svg = (tmp_path / "distortion.svg").read_text()
    assert svg.count("<circle") == 2 * 3 + 2  # a dot for each layer of both networks, one in the legend for each
    names = [m.name for m in map(read_measured, folders)]
    assert names == ["RNAS-L (ST)", "RNAS-H (untrained)"]


def test_maps_of_one_channel_share_their_colours() -> None:
    clean = np.array([[[0.0, 1.0]]], dtype=np.float32)
    drawing = feature_figure([Maps("layer", clean, clean / 2)], "maps")
    before, after = (s.pixels for s in drawing.shapes if isinstance(s, Picture))
    assert (before[0, 0] == after[0, 0]).all()  # 0 is the lowest value of both
    assert (before[0, 1] != after[0, 1]).any()  # 1 and 0.5 are not one colour
    assert "0.71" in drawing.description  # rms difference √(1/8) over the deviation 1/2


def test_maps_are_those_of_the_most_varied_channels(trained: Path, tmp_path: Path) -> None:
    (folder,) = distortion(Distortion((str(trained),), tmp_path, limit=4, attack_steps=1, channels_shown=3))
    measured = read_measured(folder)
    for maps in depths(measured):
        spread = maps.clean.reshape(3, -1).std(1)
        assert list(spread) == sorted(spread, reverse=True)
    difference = measured.features["image_adversarial"] - measured.features["image"]
    assert 0 < np.abs(difference).max() <= 16 / 255 + 1e-6
    assert distortion_figure([measured]).height > 50


def test_an_untrained_network_takes_images_of_a_size(tmp_path: Path) -> None:
    record = measure(tmp_path, "RNAS-L", image_size=8)
    assert record["n"] == 12


def test_bad_input_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RnasError, match=r"unknown layer of .* 'cells.7': did you mean cells"):
        distortion(Distortion((str(trained),), out, layers=("cells.7",)))
    with pytest.raises(RnasError, match=r"layer 'classifier' of .* gives a \(1, 10\): expected feature maps"):
        distortion(Distortion((str(trained),), out, layers=("cells.0", "classifier")))
    with pytest.raises(RnasError, match="layers is empty"):
        Distortion((str(trained),), out, layers=())
    with pytest.raises(RnasError, match="seed is 99999999999999999999"):
        Distortion((str(trained),), out, seed=99999999999999999999)
    with pytest.raises(RnasError, match="no images of its own: name some with --data"):
        distortion(Distortion(("RNAS-L",), out))
    with pytest.raises(RnasError, match="unknown architecture 'RNAS-X': did you mean RNAS"):
        distortion(Distortion(("RNAS-X",), out, data="digits"))
    with pytest.raises(RnasError, match="needs the folder"):
        distortion(Distortion((), out))
    assert not out.exists()
