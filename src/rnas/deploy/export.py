"""A trained network as one file for deployment, run and compared with the network before it is kept."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rnas.errors import RnasError, unknown
from rnas.files import check_writable, write_bytes
from rnas.wording import apart

OURS = {".html", ".json", ".jsonl", ".npz", ".safetensors"}
"""What files of a run end in: none of them is what an exported network replaces."""
TOLERANCE = 1e-4
"""Largest difference allowed between a logit of the file and of the network."""


def export(
    model: nn.Module, model_json: dict[str, Any], fmt: str, out: Path | str, image_size: int | tuple[int, int]
) -> float:
    """Write `model` to `out` as "onnx" or "torchscript", and return the largest difference of a logit of the file.

    The file takes images (B,3,H,W) in [0,1], any B, of `image_size` (a side, or H and W), and returns logits
    (B,classes); normalisation is inside. It carries model.json's content and the class names: as ONNX metadata "model"
    and "classes", as TorchScript extra files "model.json" and "classes.json".
    It is written elsewhere, run on random images, and put at `out` only if it agrees with the network to 1e-4.
    RnasError if it does not, and as of `check_target`; `out` then stays as it was.
    """
    out = Path(out)
    check_target(fmt, out)
    write, load = FORMATS[fmt]
    network = copy.deepcopy(model).cpu().eval()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    # Not the batch that it was written with, so that a file with a fixed batch is found out.
    images = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    # Elsewhere, for it takes seconds: a run folder's next writer removes what it finds half-written.
    with TemporaryDirectory() as scratch:
        temporary = Path(scratch) / out.name
        write(network, images[:2], {"model": model_json, "classes": model_json["classes"]}, temporary)
        with torch.no_grad():
            difference = float((load(temporary)(images) - network(images)).abs().max())
        if not difference <= TOLERANCE:  # which NaN is not either
            found, most = apart(difference, TOLERANCE)
            raise RnasError(
                f"the {fmt} file's logits differ from the network's by {found}, more than {most}: {out} is not written"
            )
        write_bytes(out, temporary.read_bytes())
    return difference


def check_target(fmt: str, out: Path) -> None:
    """RnasError for an unknown format, for packages that it needs and that are not installed, and for an `out` that
    is a folder or a file of a run, or that may not be written."""
    if fmt not in FORMATS:
        raise unknown("format", fmt, FORMATS)
    for name in NEEDED[fmt]:
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise RnasError(f"export to ONNX needs the package {name}: pip install 'rnas[export]'") from e
    if out.is_dir():
        raise RnasError(f"{out} is a folder: expected the name of the file to write")
    if out.exists() and out.suffix in OURS:
        raise RnasError(f"{out} would be overwritten: expected the name of a new file, such as model.onnx")
    check_writable(out.parent)


def _write_onnx(network: nn.Module, example: Tensor, metadata: dict[str, Any], path: Path) -> None:
    import onnx

    with _deprecated("You are using the legacy TorchScript-based ONNX export", "The feature will be removed"):
        # The newer exporter (dynamo=True) takes minutes for a deep cell network, this one seconds; the check that
        # follows makes sure of either.
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    file = onnx.load_model(path)
    onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(file)
    onnx.save_model(file, path)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torchscript(network: nn.Module, example: Tensor, metadata: dict[str, Any], path: Path) -> None:
    extra = {f"{key}.json": json.dumps(value) for key, value in metadata.items()}
    with _deprecated(r"`torch\.jit\.\w+` is (deprecated|not supported)"):
        traced = torch.jit.trace(network, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, path, _extra_files=extra)


def _load_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    with _deprecated(r"`torch\.jit\.\w+` is (deprecated|not supported)"):
        network: Callable[[Tensor], Tensor] = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return network


@contextmanager
def _deprecated(*messages: str) -> Iterator[None]:
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield


# name -> (write(network, example images, metadata, path), load(path) -> images to logits)
FORMATS: dict[
    str,
    tuple[
        Callable[[nn.Module, Tensor, dict[str, Any], Path], None],
        Callable[[Path], Callable[[Tensor], Tensor]],
    ],
] = {
    "onnx": (_write_onnx, _load_onnx),
    "torchscript": (_write_torchscript, _load_torchscript),
}

NEEDED: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime"), "torchscript": ()}
"""The packages that each format needs besides those of a plain installation."""
