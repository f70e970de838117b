"""Data sets: `load` finds one by name or path, `halves` and `batches` cut it up, `prepare` downloads it."""

from __future__ import annotations

from pathlib import Path

from rnas.data.cache import Progress
from rnas.data.dataset import Dataset, Split, batches, halves, limited
from rnas.errors import RnasError, unknown

__all__ = ["NAMES", "Dataset", "Progress", "Split", "batches", "halves", "load"]

NAMES = ("digits",)
"""The data sets that are known by name; every other one is a path."""


def load(
    spec: str | Path,
    *,
    root: Path | str | None = None,
    image_size: int | None = None,
    test_fraction: float | None = None,
    limit_per_class: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """The data set `spec`: one of `NAMES`, the path of an `.npz` file, or of a folder of class folders.

    `root` is where named sets lie or are downloaded to; `image_size` scales images to that many pixels a side (own
    images: what the scaled image has beyond a square is cut off); `test_fraction` of a folder without test images
    is set apart; `limit_per_class` keeps as many images of each class and split, drawn with `seed`.
    RnasError if the data are missing, unreadable or not what they should be.
    """
    if image_size is not None and not 4 <= image_size <= 1024:
        raise RnasError(f"the image size is {image_size}: expected 4 to 1024 pixels")
    if limit_per_class is not None and limit_per_class < 1:
        raise RnasError(f"the limit per class is {limit_per_class}: expected 1 or more")
    dataset = _find(spec, Path(root) if root else None, image_size, test_fraction, progress)
    if limit_per_class is None:
        return dataset
    train, test = (limited(split, limit_per_class, seed) for split in (dataset.train, dataset.test))
    return Dataset(dataset.name, train, test, dataset.classes)


def _find(
    spec: str | Path,
    root: Path | None,
    image_size: int | None,
    test_fraction: float | None,
    progress: Progress | None,
) -> Dataset:
    from rnas.data import arrays, folders  # Pillow is not needed to ask for help

    path = Path(spec).expanduser()
    own_folder = spec not in NAMES and path.is_dir()
    if test_fraction is not None and not own_folder:
        raise RnasError(f"{spec} has a test split of its own: a test fraction is for folders without one")
    if spec == "digits":
        return arrays.digits(image_size)
    if own_folder:
        return folders.folder(path, image_size, test_fraction, progress)
    if path.suffix == ".npz" or path.is_file():
        return arrays.npz(path, image_size)
    if path.parent != Path() or isinstance(spec, Path):
        raise RnasError(f"there is no {path}: expected an .npz file, a folder of class folders, or {', '.join(NAMES)}")
    raise unknown("data set", str(spec), (*NAMES, "the path of an .npz file", "a folder of class folders"))
