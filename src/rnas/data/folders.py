"""Anyone's own images: a folder of class folders."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from itertools import groupby
from pathlib import Path

import numpy as np

from rnas.data.cache import Decoding, Progress, cached, fingerprint, size_name
from rnas.data.dataset import Dataset
from rnas.data.decoding import Size
from rnas.data.images import decode_all, image_files, is_foreign
from rnas.errors import RnasError
from rnas.files import is_text

LAYOUT = "expected train/CLASS/* and test/CLASS/*, or CLASS/* and a --test-fraction such as 0.2"

IMAGE_SUFFIXES = frozenset(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .ppm .tga .tif .tiff .webp".split())

Labelled = list[tuple[str, int]]
"""Files, named from the root, with their labels."""


def folder(
    root: Path,
    image_size: Size | None = None,
    test_fraction: float | None = None,
    progress: Progress | None = None,
    to_test: bool = False,
) -> Dataset:
    """The images of `root`/train/CLASS and `root`/test/CLASS (or val), or of `root`/CLASS with `test_fraction` of
    those of every class, always the same ones, set apart to test. The classes are numbered in the order of their
    names. Images `to_test` a network on need no training images beside them: those of `root`/CLASS are all for the
    test then, unless there is a `test_fraction`, which a folder that is split already ignores.
    RnasError if the layout is another, a class is empty, or files cannot be read, which are listed.
    """
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise RnasError(f"the test fraction is {test_fraction}: expected more than 0 and less than 1")
    classes, train, test = (_tests if to_test else _splits)(root, test_fraction)
    files = [name for name, _ in train + test]
    train_labels, test_labels = (np.array([k for _, k in part], np.int64) for part in (train, test))

    def parse() -> Decoding:
        return Decoding(classes, train_labels, test_labels, decode_all(root, files, image_size))

    source = fingerprint(root, files, classes, image_size, test_labels.tolist())
    variant = size_name(image_size) + (f"-{test_fraction}" if test_fraction else "")
    return cached(root.resolve().name or "images", variant, root, source, parse, progress)


def check_apart(root: Path, out: Path) -> None:
    """RnasError if `out` lies where `root` has its class folders: what is written there would pass for images."""
    train, test = _parts(root)
    for place in [root / part for part in (train, test) if part] if train else [root]:
        if out.resolve().is_relative_to(place.resolve()):
            raise RnasError(f"{out} lies among the class folders in {place}: choose an --out elsewhere")


def _parts(root: Path) -> tuple[str | None, str | None]:
    """The folders in `root`, in whatever case their names are, that hold the class folders to train on and to test on.
    Without the first `root` itself holds the class folders, unless there is only the second."""
    named = {name.lower(): name for name in _folders(root)}  # of Train and train the latter
    train = named.get("train")
    return train if train and _folders(root / train) else None, named.get("test", named.get("val"))


def _splits(root: Path, test_fraction: float | None) -> tuple[tuple[str, ...], Labelled, Labelled]:
    train_part, test_part = _parts(root)
    if train_part and test_part:
        if test_fraction is not None:
            raise RnasError(f"{root} has a folder {test_part} already: leave out the test fraction")
        classes, train = _classes(root, train_part)
        test_classes, test = _classes(root, test_part)
        _same_classes(root, (train_part, test_part), classes, test_classes)
        return classes, train, test
    if test_fraction is None:
        if train_part:
            raise RnasError(
                f"{root} has a folder {train_part} but none named test: give it test/CLASS/*, or set some of the "
                "training images apart by a --test-fraction such as 0.2"
            )
        holds = "has no folder train with class folders" if _folders(root) else "holds no folders"
        raise RnasError(f"{root} {holds}: {LAYOUT}")
    if not _folders(root):
        raise RnasError(f"{root} holds no folders: {LAYOUT}")
    classes, train = _classes(root, train_part or "")
    return classes, *_set_apart(train, test_fraction, root)


def _tests(root: Path, test_fraction: float | None) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """As `_splits`, for images to test a network on: there may be none to train on."""
    train_part, test_part = _parts(root)
    if test_part and _folders(root / test_part):
        if train_part:
            return _splits(root, None)
        classes, test = _classes(root, test_part)
        return classes, [], test
    if test_fraction is not None:
        return _splits(root, test_fraction)
    if train_part:
        raise RnasError(f"{root} has a folder {train_part} but none named test: give it test/CLASS/*")
    classes, test = _classes(root, "")
    return classes, [], test


def _folders(root: Path) -> list[str]:
    try:
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not is_foreign(p.name))
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


def _same_classes(root: Path, parts: tuple[str, str], expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    train, test = parts
    for one, other, names in ((train, test, set(expected) - set(found)), (test, train, set(found) - set(expected))):
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
