"""Data sets: `load` finds one by name or path, `halves` and `batches` cut it up, `prepare` downloads it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rnas.data.cache import Progress, cache_root
from rnas.data.dataset import Dataset, Split, batches, halves, limited
from rnas.data.decoding import Size, sides
from rnas.errors import RnasError, unknown

__all__ = ["NAMES", "Dataset", "Progress", "Split", "batches", "check_apart", "halves", "load", "prepare"]

NAMES = ("digits", "cifar10", "cifar100", "svhn", "svhn-extra", "tiny-imagenet")
"""The data sets that are known by name; every other one is a path."""


def load(
    spec: str | Path,
    *,
    root: Path | str | None = None,
    image_size: Size | None = None,
    test_fraction: float | None = None,
    limit_per_class: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    to_test: bool = False,
) -> Dataset:
    """The data set `spec`: one of `NAMES`, the path of an `.npz` file, or of a folder of class folders.

    `root` is where named sets lie or are downloaded to, by default $RNAS_DATA or ~/.cache/rnas; `image_size` scales
    images to that many pixels a side, or to height and width (of a folder's images what goes beyond is cut off);
    `test_fraction` of a folder without test images is set apart; `limit_per_class` keeps as many training
    images of each class, drawn with `seed`; the test split stays whole, so that figures remain comparable.
    `to_test` asks for images to test a network on: a folder need not have training images then, and `test_fraction` is
    of use only where there is no split.
    RnasError if the data are missing, unreadable or not what they should be.
    """
    if image_size is not None and not all(4 <= side <= 1024 for side in sides(image_size)):
        raise RnasError(f"the image size is {image_size}: expected 4 to 1024 pixels")
    if limit_per_class is not None and limit_per_class < 1:
        raise RnasError(f"the limit per class is {limit_per_class}: expected 1 or more")
    dataset = _find(spec, Path(root) if root else None, image_size, test_fraction, progress, to_test)
    if limit_per_class is None:
        return dataset
    return replace(dataset, train=limited(dataset.train, limit_per_class, seed))


def _find(
    spec: str | Path,
    root: Path | None,
    image_size: Size | None,
    test_fraction: float | None,
    progress: Progress | None,
    to_test: bool,
) -> Dataset:
    from rnas.data import arrays, folders
    from rnas.data.official import catalogue

    if spec == "":
        raise RnasError(f"the name of the data is empty: expected an .npz file, a folder, or {', '.join(NAMES)}")
    path = Path(os.path.expanduser(spec))  # unlike Path.expanduser, leaves what it does not know
    own_folder = spec not in NAMES and path.is_dir()
    if test_fraction is not None and not to_test and (spec in NAMES or (path.suffix == ".npz" and path.exists())):
        raise RnasError(f"{spec} has a test split of its own: a test fraction is for folders without one")
    if spec == "digits":
        return arrays.digits(image_size)
    if spec in catalogue.SETS:
        return catalogue.named(catalogue.SETS[str(spec)], root or cache_root(), image_size, progress=progress)[0]
    if own_folder:
        catalogue.refuse_pickles_at(path)
        return folders.folder(path, image_size, test_fraction, progress, to_test)
    if path.suffix == ".npz" or path.is_file():
        return arrays.npz(path, image_size)
    if path.parent != Path() or isinstance(spec, Path):
        raise RnasError(f"there is no {path}: expected an .npz file, a folder of class folders, or {', '.join(NAMES)}")
    raise unknown("data set", str(spec), (*NAMES, "the path of an .npz file", "a folder of class folders"))


def check_apart(spec: str, out: Path) -> None:
    """RnasError if `out`, a folder to write to, lies among the images of the folder `spec`."""
    from rnas.data import folders

    path = Path(os.path.expanduser(spec))
    if spec not in NAMES and path.is_dir():
        folders.check_apart(path, out)


def prepare(
    name: str,
    root: Path | str | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Download the data set `name` if it is not below `root` yet, verify, unpack and decode it; what is there now.

    The result can be written as JSON: `name`, `folder` (None for the digits), `train`, `test` (numbers of images),
    `classes` (their names), `image_size` [H, W], `downloaded` (whether there was anything to do) and `complete`
    (whether the numbers are those of the official set). `mirror`, or $RNAS_MIRROR, is the address of a folder that
    holds the official files. RnasError if any of it fails; what was downloaded stays, and the next call continues.
    """
    from rnas.data.official import catalogue

    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    folder, new = None, False
    if name == "digits":
        dataset, complete = load(name), True
    else:
        published = catalogue.SETS[name]
        place = Path(root) if root else cache_root()
        dataset, folder, new = catalogue.named(published, place, None, mirror, progress, refuse_pickles=False)
        complete = (len(dataset.train), len(dataset.test)) == published.counts
    return {
        "name": name,
        "folder": None if folder is None else str(folder),
        "train": len(dataset.train),
        "test": len(dataset.test),
        "classes": list(dataset.classes),
        "image_size": list(dataset.image_size),
        "downloaded": new,
        "complete": complete,
    }
