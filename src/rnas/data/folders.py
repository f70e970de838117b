"""Anyone's own images: a folder of class folders."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from itertools import groupby
from pathlib import Path

import numpy as np

from rnas.data.cache import Decoding, Progress, cached, fingerprint
from rnas.data.dataset import Dataset
from rnas.data.images import decode_all, image_files
from rnas.errors import RnasError
from rnas.files import is_text

LAYOUT = "expected train/CLASS/* and test/CLASS/*, or CLASS/* and a --test-fraction such as 0.2"

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Labelled = list[tuple[str, int]]
"""Files, named from the root, with their labels."""


def folder(
    root: Path,
    image_size: int | None = None,
    test_fraction: float | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The images of `root`/train/CLASS and `root`/test/CLASS (or val), or of `root`/CLASS with `test_fraction` of
    those of every class, always the same ones, set apart to test. The classes are numbered in the order of their
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
            raise RnasError(
                f"{root} has a folder train but none named test: give it test/CLASS/*, or set some of the training "
                "images apart by a --test-fraction such as 0.2"
            )
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
    named = sorted((unicodedata.normalize("NFC", name), name) for name in _folders(root / part))
    classes = tuple(name for name, _ in named)
    if len(set(classes)) < len(classes):
        raise RnasError(f"{root / part} holds two class folders whose names differ only in how accents are encoded")
    if len(classes) < 2:
        raise RnasError(
            f"{root / part} holds {len(classes)} class folder{'s' * (len(classes) != 1)}: expected two or more"
        )
    _check_stray(root / part)
    labelled = []
    for label, (_, name) in enumerate(named):
        if not is_text(name):
            raise RnasError(f"the class folder {name!a} in {root / part} has a name that is not UTF-8: rename it")
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
    """Of every class about `fraction` to test, at least one, and not all. An image's side follows from its name alone:
    were it to change as images are added, a network would be tested on images that it was trained on."""
    train: Labelled = []
    test: Labelled = []
    for _, group in groupby(images, key=lambda image: image[1]):
        ordered = sorted(group, key=lambda image: _draw(image[0]))
        if len(ordered) < 2:
            raise RnasError(
                f"{root / ordered[0][0]} is the only image of its class: a test fraction needs two or more of each"
            )
        wanted = sum(_draw(name) < fraction for name, _ in ordered)
        count = min(max(wanted, 1), len(ordered) - 1)
        test += sorted(ordered[:count])
        train += sorted(ordered[count:])
    return train, test


def _draw(name: str) -> float:
    """A number from [0,1) that follows from the name of a file."""
    digest = hashlib.blake2b(Path(name).as_posix().encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _check_stray(folder: Path) -> None:
    """RnasError if images lie beside the class folders: they would be left out without a word."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    stray = sorted(p.name for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
    if stray:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        raise RnasError(
            f"{folder} holds {stray[0]}{more} beside its class folders: move every image into the folder of its class"
        )
