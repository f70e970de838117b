"""A trained network on the disk: it comes back bit for bit, and every kind of damage is explained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from rnas import published as paper
from rnas.errors import RnasError
from rnas.nets import zoo
from rnas.nets.saved import build_from_meta, load_model, save_model
from rnas.records.codec import decode
from rnas.records.schema import Description

NAMES = [name for name, published in paper.architectures().items() if published.source]


def meta(arch: str, **changes: Any) -> dict[str, Any]:
    """What `rnas train` writes as model.json, for a small network."""
    return {
        "arch": arch,
        "genotype": None,
        "classes": ["cat", "dog", "Ölbaum"],
        "cells": 20 if arch == "RobNet-free" else 5,
        "channels": 4,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "image_size": [32, 32],
        "dataset": "pets",
        "parameters": 1,
    } | changes


def described(arch: str, **changes: Any) -> Description:
    """The same as a record."""
    return decode(Description, meta(arch, **changes), "model.json")


def trained(description: Description) -> nn.Module:
    """A network whose BN statistics are no longer the initial ones."""
    torch.manual_seed(0)
    network = build_from_meta(description)
    network(torch.rand(4, 3, *description.image_size))
    return network


@pytest.mark.parametrize("name", NAMES)
def test_every_network_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    network = trained(described(name))
    save_model(tmp_path / "run", network, described(name))
    random_numbers = torch.get_rng_state()
    loaded, found = load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert found == replace(described(name), weights=found.weights)
    assert not any(m.training for m in loaded.modules())
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), network.eval()(x))


def test_a_network_is_float32_whatever_the_default_is(tmp_path: Path) -> None:
    network = trained(described("RNAS-L"))
    save_model(tmp_path, network, described("RNAS-L"))
    x = torch.rand(2, 3, 32, 32)
    torch.set_default_dtype(torch.float64)
    try:
        loaded, _ = load_model(tmp_path)
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(loaded(x), network.eval()(x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_who_may_read_the_description_may_read_the_weights(tmp_path: Path) -> None:
    description = described("RNAS-L")
    save_model(tmp_path, trained(description), description)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["model.json"]


def test_a_genotype_of_ones_own_comes_back(tmp_path: Path) -> None:
    for name in ("RNAS-L", "RobNet-large"):
        description = described("genotype", genotype=paper.genotype(name).to_json(), stem_stride=2, auxiliary=True)
        network = trained(description)
        save_model(tmp_path, network, description)
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(load_model(tmp_path)[0](x), network.eval()(x))


def test_saving_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    network = trained(described("ResNet18")).to(memory_format=torch.channels_last)
    save_model(tmp_path, network, described("ResNet18"))
    assert network.training
    assert network.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_model(tmp_path)[0](x), network.eval()(x))


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match=r"\$\.classes"):
        save_model(tmp_path, trained(described("ResNet18")), replace(described("ResNet18"), classes=("cat",)))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path, trained(described("RNAS-L")), described("RNAS-L"))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "RNAS-M"}, "model.json: unknown architecture 'RNAS-M': did you mean"),
        ({"arch": None}, r"expected text at \$\.arch"),
        ({"arch": "genotype"}, "model.json: genotype is missing"),
        ({"arch": "DSRNA"}, "DSRNA cannot be built"),
        ({"arch": "RNAS-H"}, "tensor '.*': .* another network|the network that model.json names expects"),
        ({"classes": ["cat", "cat"]}, r"expected two or more different class names at \$\.classes"),
        ({"classes": 10}, r"expected a list at \$\.classes"),
        ({"classes": ["a", "b"]}, r"tensor 'classifier.weight' is float32 \[3, 64\]: .* expects float32 \[2, 64\]"),
        ({"cells": 6}, "(lacks|has a foreign) tensor"),
        ({"cells": "5"}, r"expected an integer at \$\.cells"),
        ({"cells": 0}, "cells is 0: expected 1 or more"),
        ({"cells": 10**6}, r"expected an integer up to 1000 at \$\.cells"),
        ({"channels": 10**30}, r"expected an integer up to 10000 at \$\.channels"),
        ({"image_size": [10**30, 32]}, r"at \$\.image_size\[0\]"),
        ({"channels": 8}, "the network that model.json names expects"),
        ({"channels": 4.5}, r"expected an integer at \$\.channels"),
        ({"mean": [0.5]}, r"expected three numbers at \$\.mean"),
        ({"std": [0.2, 0, 0.2]}, r"expected a number above 0 at \$\.std\[1\]"),
        ({"image_size": 32}, r"expected a list at \$\.image_size"),
        ({"image_size": [30, 32]}, "image size 30 does not fit"),
    ],
)
def test_a_changed_description_is_explained(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "model.json").write_text(json.dumps(meta("RNAS-L") | changes))
    with pytest.raises(RnasError, match=message):
        load_model(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(RnasError, match=r"model.safetensors"):
        load_model(folder)
    (folder / "model.json").unlink()
    with pytest.raises(RnasError, match=r"holds no trained network: model.json is missing"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_explained(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(RnasError, match=r"model.safetensors is damaged or no safetensors file"):
        load_model(folder)


def test_text_and_half_a_description_are_explained(folder: Path) -> None:
    (folder / "model.safetensors").write_text("hello, I am no tensor")
    with pytest.raises(RnasError, match="is damaged or no safetensors file"):
        load_model(folder)
    (folder / "model.json").write_bytes((folder / "model.json").read_bytes()[:50])
    with pytest.raises(RnasError, match=r"model.json is not JSON"):
        load_model(folder)
    (folder / "model.json").write_text("[]")
    with pytest.raises(RnasError, match="expected an object"):
        load_model(folder)


def test_a_flipped_bit_of_a_weight_is_noticed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RnasError, match=r"model.safetensors is damaged, or of another training than model.json"):
        load_model(folder)


def test_a_description_of_an_earlier_version_says_nothing_of_the_bytes(folder: Path) -> None:
    description = json.loads((folder / "model.json").read_text())
    weights = description.pop("weights")
    (folder / "model.json").write_text(json.dumps(description))
    assert load_model(folder)[1].weights == weights


def test_weights_of_another_kind_or_network_are_explained(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, weights)
    with pytest.raises(RnasError, match=r"is float16 .* expects float32"):
        load_model(folder)
    safetensors.torch.save_file(state | {"surprise": torch.zeros(1)}, weights)
    with pytest.raises(RnasError, match="has a foreign tensor 'surprise'"):
        load_model(folder)
    safetensors.torch.save_file(zoo.build("SqueezeNet").state_dict(), weights)
    with pytest.raises(RnasError, match=r"another network than model.json names"):
        load_model(folder)
