"""Tiny-ImageNet-200 (Stanford CS231n): train/WNID/images/*, val/images/* with val/val_annotations.txt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rnas.data.cache import Decoding
from rnas.data.decoding import Size
from rnas.data.images import decode_all
from rnas.data.official.reading import lines
from rnas.errors import RnasError


def _labelled(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], list[tuple[str, int]]]:
    """The classes, sorted, and the labelled files of both splits."""
    wnids = sorted(line.strip() for line in lines(folder / "wnids.txt"))
    label = {wnid: k for k, wnid in enumerate(wnids)}
    if (
        len(label) < 2
        or len(label) < len(wnids)
        or any(Path(wnid).name != wnid or not wnid.isprintable() for wnid in wnids)
    ):
        raise RnasError(f"{folder / 'wnids.txt'} is no list of two or more class folders, each named once")
    train = []
    for wnid, k in label.items():
        images = _names(folder / "train" / wnid / "images")
        if not images:
            raise RnasError(f"{folder / 'train' / wnid / 'images'} is empty: unpack the archive again")
        train += [(f"train/{wnid}/images/{name}", k) for name in images]
    return tuple(wnids), train, _annotations(folder, label)


def _annotations(folder: Path, label: Mapping[str, int]) -> list[tuple[str, int]]:
    annotations = folder / "val" / "val_annotations.txt"
    present, test = set(_names(folder / "val" / "images")), []
    for number, line in enumerate(lines(annotations), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in label or name not in present:
            raise RnasError(
                f"{annotations}, line {number}: '{name[:80]}' is no file in val/images or '{wnid[:80]}' no class in "
                "wnids.txt; expected FILE, tab, CLASS, tab, box"
            )
        test.append((f"val/images/{name}", label[wnid]))
    if not test:
        raise RnasError(f"{annotations} is empty: unpack the archive again")
    return test


def _names(folder: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    except OSError as e:
        raise RnasError(f"cannot read {folder}: {e.strerror}") from e


def list_files(folder: Path) -> list[str]:
    _, train, test = _labelled(folder)
    return ["wnids.txt", "val/val_annotations.txt", *(name for name, _ in train + test)]


def read(folder: Path, image_size: Size | None) -> Decoding:
    classes, train, test = _labelled(folder)
    names = [name for name, _ in train + test]
    y_train, y_test = (np.array([k for _, k in part], np.int64) for part in (train, test))
    return Decoding(classes, y_train, y_test, decode_all(folder, names, image_size))
