"""Anyone's own images: a folder of class folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from rnas.data.arrays import FIXED_SPLIT
from rnas.data.cache import Decoding, Progress, cached, fingerprint
from rnas.data.dataset import Dataset, stratified
from rnas.data.images import decode_all, image_files
from rnas.errors import RnasError

LAYOUT = "expected train/CLASS/* and test/CLASS/*, or CLASS/* and a --test-fraction such as 0.2"

Labelled = list[tuple[str, int]]
"""Files, named from the root, with their labels."""


def folder(
    root: Path,
    image_size: int | None = None,
    test_fraction: float | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The images of `root`/train/CLASS and `root`/test/CLASS (or val), or of `root`/CLASS with `test_fraction` of
    them, stratified and always the same ones, set apart to test. The classes are numbered in the order of their
    names. RnasError if the layout is another, a class is empty, or files cannot be read, which are listed.
    """
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise RnasError(f"the test fraction is {test_fraction}: expected more than 0 and less than 1")
    classes, train, test = _splits(root, test_fraction)
    files = [name for name, _ in train + test]
    train_labels, test_labels = (np.array([k for _, k in part], np.int64) for part in (train, test))

    def parse() -> Decoding:
        return Decoding(classes, train_labels, test_labels, decode_all(root, files, image_size))

    source = fingerprint(root, files, classes, image_size, test_labels.tolist())
    variant = f"{image_size or 'native'}" + (f"-{test_fraction}" if test_fraction else "")
    return cached(root.resolve().name or "images", variant, root, source, parse, progress)


def _splits(root: Path, test_fraction: float | None) -> tuple[tuple[str, ...], Labelled, Labelled]:
    top = _folders(root)
    if "train" in top and _folders(root / "train"):
        tests = [name for name in ("test", "val") if name in top]
        if tests and test_fraction is not None:
            raise RnasError(f"{root} has a folder {tests[0]} already: leave out the test fraction")
        classes, train = _classes(root, "train")
        if tests:
            test_classes, test = _classes(root, tests[0])
            _same_classes(root, tests[0], classes, test_classes)
            return classes, train, test
        if test_fraction is None:
            raise RnasError(f"{root} has a folder train but none named test: {LAYOUT}")
    else:
        if not top:
            raise RnasError(f"{root} holds no folders: {LAYOUT}")
        if test_fraction is None:
            raise RnasError(f"{root} has no folder train with class folders: {LAYOUT}")
        classes, train = _classes(root, "")
    return classes, *_set_apart(train, test_fraction, root)


def _folders(root: Path) -> list[str]:
    try:
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as e:
        raise RnasError(f"cannot read {root}: {e.strerror}") from e


def _classes(root: Path, part: str) -> tuple[tuple[str, ...], Labelled]:
    classes = tuple(_folders(root / part))
    if len(classes) < 2:
        raise RnasError(
            f"{root / part} holds {len(classes)} class folder{'s' * (len(classes) != 1)}: expected two or more"
        )
    labelled = []
    for label, name in enumerate(classes):
        files = image_files(root, os.path.join(part, name))
        if not files:
            raise RnasError(f"the class folder {root / part / name} is empty: give it images or remove it")
        labelled += [(file, label) for file in files]
    return classes, labelled


def _same_classes(root: Path, test: str, expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    for one, other, names in (("train", test, set(expected) - set(found)), (test, "train", set(found) - set(expected))):
        if names:
            raise RnasError(f"{root}: {one} has the class {', '.join(sorted(names))}, which {other} lacks")


def _set_apart(images: Labelled, fraction: float, root: Path) -> tuple[Labelled, Labelled]:
    labels = torch.tensor([k for _, k in images])
    mask = stratified(labels, round(fraction * len(images)), FIXED_SPLIT).tolist()
    train, test = ([image for image, m in zip(images, mask, strict=True) if m == part] for part in (False, True))
    if not test or len({k for _, k in train}) < len({k for _, k in images}):
        raise RnasError(
            f"{root} has {len(images)} images: a test fraction of {fraction} leaves no test image or a class without "
            "training images; choose another or give more images"
        )
    return train, test
