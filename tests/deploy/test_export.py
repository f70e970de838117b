"""The deployed file computes what the network computes, or there is no file."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnas import published as paper
from rnas.deploy import export as export_module
from rnas.deploy.export import export
from rnas.errors import RnasError
from rnas.nets import zoo

NAMES = [name for name, published in paper.architectures().items() if published.source]
META: dict[str, Any] = {"arch": "RNAS-L", "classes": ["cat", "dog", "Ölbaum"], "image_size": [32, 32]}


def trained(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = zoo.build(name, 3, **options)
    network(torch.rand(8, 3, 32, 32))
    return network


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_torchscript(path: Path, images: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.load's own
        return torch.jit.load(path)(images)


RUN = {"onnx": run_onnx, "torchscript": run_torchscript}


@pytest.mark.parametrize("fmt", RUN)
@pytest.mark.parametrize("name", ["RNAS-L", "ShuffleNetV2"])
def test_the_file_computes_the_same_for_every_batch_size(name: str, fmt: str, tmp_path: Path) -> None:
    network = trained(name, cells=5, channels=4)
    difference = export(network, META, fmt, tmp_path / "net", (32, 32))
    assert difference <= 1e-4
    assert network.training  # left as it was
    for batch in (1, 7):
        x = torch.rand(batch, 3, 32, 32)
        torch.testing.assert_close(RUN[fmt](tmp_path / "net", x), network.eval()(x), atol=1e-4, rtol=0)
        network.train()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", RUN)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_at_full_size(name: str, fmt: str, tmp_path: Path) -> None:
    network = trained(name)
    export(network, META, fmt, tmp_path / "net", 32)
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(RUN[fmt](tmp_path / "net", x), network.eval()(x), atol=1e-4, rtol=0)


def test_onnx_carries_the_class_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    export(trained("SqueezeNet"), META, "onnx", tmp_path / "net.onnx", 32)
    file = onnx.load(tmp_path / "net.onnx")
    carried = {p.key: json.loads(p.value) for p in file.metadata_props}
    assert carried == {"classes": META["classes"], "model": META}
    assert [i.name for i in file.graph.input] == ["images"]
    assert [d.dim_param or d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 32, 32]


def test_torchscript_carries_the_class_names(tmp_path: Path) -> None:
    export(trained("SqueezeNet"), META, "torchscript", tmp_path / "net.pt", 32)
    carried = {"classes.json": "", "model.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.load(tmp_path / "net.pt", _extra_files=carried)
    assert json.loads(carried["classes.json"]) == META["classes"]
    assert json.loads(carried["model.json"]) == META


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
@pytest.mark.parametrize("fmt", RUN)
def test_a_file_that_computes_something_else_is_not_kept(
    fmt: str, wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, load = export_module.FORMATS[fmt]
    monkeypatch.setitem(export_module.FORMATS, fmt, (write, lambda path: lambda x: load(path)(x) + wrong))
    out = tmp_path / "net"
    out.write_text("what was there before")
    with pytest.raises(RnasError, match="differ from the network's by"):
        export(trained("SqueezeNet"), META, fmt, out, 32)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was there before"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RnasError, match=rf"needs the package {package}: pip install 'rnas\[export\]'"):
        export(trained("SqueezeNet"), META, "onnx", tmp_path / "net", 32)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RnasError, match="unknown format 'onx': did you mean onnx"):
        export(trained("SqueezeNet"), META, "onx", tmp_path / "net", 32)
    with pytest.raises(RnasError, match="is a folder"):
        export(trained("SqueezeNet"), META, "onnx", tmp_path, 32)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(RnasError, match=r"model\.json would be overwritten"):
        export(trained("SqueezeNet"), META, "onnx", tmp_path / "model.json", 32)
    assert (tmp_path / "model.json").read_text() == "{}"
