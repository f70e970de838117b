"""A trained network as a folder: `model.safetensors` (the weights) and `model.json` (how to rebuild the network)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rnas import files
from rnas.compute.precision import float32_by_default
from rnas.errors import RnasError
from rnas.genotype import architecture_from_json
from rnas.nets import zoo
from rnas.nets.own import build_own, is_own
from rnas.records.layout import META, WEIGHTS

MOST = {"cells": 1000, "channels": 10_000, "stem_stride": 2}
"""What a damaged model.json could ask for beyond would take the machine's memory first."""


def save_model(folder: Path | str, model: nn.Module, meta: dict[str, Any]) -> None:
    """Write `model` and `meta` (see `build_from_meta`) into `folder`; each file is written whole or not at all.

    model.json also gets the SHA-256 of the weights' file, as "weights".
    """
    build_from_meta(meta, "meta", device="meta")  # refuses to write what could not be read again
    folder = Path(folder)
    # Copies, for tensors that share memory, as tied weights do, are refused.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    weights = safetensors.torch.save(state)
    files.write_bytes(folder / WEIGHTS, weights)  # save_file would let only its owner read it
    files.write_json(folder / META, {**meta, "weights": hashlib.sha256(weights).hexdigest()})


def find_model(run: Path | str) -> Path | None:
    """Where the trained network of `run` lies: a training run itself, or the train/ of a whole pipeline's."""
    return next((folder for folder in (Path(run), Path(run, "train")) if (folder / META).exists()), None)


def load_model(folder: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of `folder`, in eval mode on the CPU, and its model.json. Draws no random numbers.

    RnasError if a file is missing or damaged, or if the weights are not those of the network that model.json names.
    A model.json of an earlier version says nothing about the bytes of the weights: "weights" is then theirs.
    """
    folder = Path(folder)
    if not (folder / META).is_file():
        raise RnasError(f"{folder} holds no trained network: {META} is missing (rnas train writes it)")
    meta = files.read_json(folder / META)
    model = build_from_meta(meta, str(folder / META), device="meta")
    state, digest = _read_weights(folder / WEIGHTS)
    _check_state(state, model.state_dict(), folder / WEIGHTS)
    if meta.setdefault("weights", digest) != digest:
        raise RnasError(
            f"{folder / WEIGHTS} is damaged, or of another training than {META}: its SHA-256 is {digest}, "
            f"{META} says {_short(meta['weights'])}"
        )
    model.load_state_dict(state, assign=not is_own(meta["arch"]))  # tied weights stay tied
    return model.eval(), meta


def build_from_meta(meta: Any, where: str = META, device: str = "cpu") -> nn.Module:
    """The untrained network that `meta`, the content of a model.json, describes.

    Needed keys: arch (a name of the zoo, "genotype", or `package.module:function`), classes (names), image_size
    ([H, W]); unless a function builds it, also genotype (if arch is "genotype"), mean, std (3 numbers each), and for
    cell networks cells and channels. Optional: stem_stride, auxiliary. What a function builds is on the CPU, whatever
    the `device`, for it may compute with its tensors.
    RnasError, naming `where`, for anything else.
    """
    if not isinstance(meta, dict) or not isinstance(meta.get("arch"), str):
        raise RnasError(f"{where}: expected an object with the name of an architecture as 'arch'")
    try:
        return _own(meta) if is_own(meta["arch"]) else _of_the_zoo(meta, device)
    except RnasError as e:
        raise RnasError(f"{where}: {e}") from e


def _own(meta: dict[str, Any]) -> nn.Module:
    _check_values(meta, "classes", "image_size")
    return build_own(meta["arch"])


def _of_the_zoo(meta: dict[str, Any], device: str) -> nn.Module:
    _check_values(meta, *_VALUES)
    options = {key: meta[key] for key in ("cells", "channels", "stem_stride") if meta.get(key) is not None}
    for key, value in options.items():
        if type(value) is not int or value > MOST[key]:
            raise RnasError(f"'{key}' is {_short(value)}: expected an integer, {MOST[key]} at most")
    options |= {key: tuple(meta[key]) for key in ("image_size", "mean", "std")}
    options["auxiliary"] = meta.get("auxiliary", False) is True
    with torch.device(device), float32_by_default():  # the host may have set another
        if meta["arch"] != "genotype":
            return zoo.build(meta["arch"], len(meta["classes"]), **options)
        genotype = architecture_from_json(meta.get("genotype"))
        return zoo.build_genotype(genotype, len(meta["classes"]), **options)


def _check_values(meta: dict[str, Any], *keys: str) -> None:
    for key in keys:
        fits, what = _VALUES[key]
        if not fits(meta.get(key)):
            raise RnasError(f"'{key}' is {_short(meta.get(key))}: expected {what}")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and its SHA-256."""
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        return safetensors.torch.load_file(path), digest
    except OSError as e:
        raise RnasError(f"cannot read {path}: {e.strerror or e}") from e
    except SafetensorError as e:
        raise RnasError(f"{path} is damaged or no safetensors file: {e}") from e


def _check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name in expected.keys() ^ state.keys():
        what = "lacks" if name in expected else "has a foreign"
        raise RnasError(f"{path} {what} tensor '{name}': it belongs to another network than {META} names")
    for name, value in expected.items():
        given = state[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise RnasError(
                f"{path}: tensor '{name}' is {_kind(given)}: the network that {META} names expects {_kind(value)}"
            )


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _are_names(value: Any) -> bool:
    return (
        _is_list(value) and len(value) >= 2 and all(isinstance(v, str) for v in value) and len({*value}) == len(value)
    )


def _are_three_numbers(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(type(v) in (int, float) for v in value)


def _are_three_positive_numbers(value: Any) -> bool:
    return _are_three_numbers(value) and all(v > 0 for v in value)


def _are_two_integers(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(type(v) is int and v <= 10_000 for v in value)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "classes": (_are_names, "a list of two or more class names, each once"),
    "mean": (_are_three_numbers, "three numbers"),
    "std": (_are_three_positive_numbers, "three positive numbers"),
    "image_size": (_are_two_integers, "[height, width]"),
}
