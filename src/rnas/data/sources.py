"""The images that a run's settings name, and what tells them from others under the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rnas.console import Console
from rnas.data import Dataset, check_apart, load
from rnas.data.decoding import Size
from rnas.errors import RnasError
from rnas.records.folder import training_of
from rnas.records.layout import SETTINGS
from rnas.records.schema import Description
from rnas.settings import Source


def load_data(source: Source, seed: int, console: Console | None = None, out: Path | None = None) -> Dataset:
    """The images that the settings name; a download and the decoding show on `console` how far they are.

    RnasError if they cannot be read, or if `out`, where the run is to be written, lies among them.
    """
    if out is not None:
        check_apart(source.data, out)
    with (console or Console(quiet=True)).stages() as progress:
        return load(
            source.data,
            root=source.data_root,
            image_size=source.image_size,
            test_fraction=source.test_fraction,
            limit_per_class=source.limit_per_class,
            seed=seed,
            progress=progress,
        )


def load_own_data(folder: Path, meta: Description) -> Dataset:
    """The data set that the network in `folder` was trained on. RnasError if its settings.json names another one: `fit`
    trains on images that were made elsewhere, too."""
    source, seed, _ = training_of(folder)
    data = load_data(source, seed)
    if meta.dataset not in (None, data.name):
        raise RnasError(
            f"the network in {folder} was trained on {meta.dataset}, and its {SETTINGS} names {source.data}: "
            "name the images with --data"
        )
    return data


def load_test_data(
    spec: str, folder: Path, meta: Description, root: Path | None = None, image_size: int | None = None
) -> Dataset:
    """The data set `spec` to test the network in `folder` on, in the network's size (or `image_size`); divided, where
    it has no split of its own, as the images that the network was trained on were, for these may be among them."""
    source = training_of(folder).source if (folder / SETTINGS).exists() else Source()
    return load(
        spec,
        root=root or source.data_root,
        image_size=image_size or _size(*meta.image_size),
        test_fraction=source.test_fraction,
        to_test=True,
    )


def _size(height: int, width: int) -> Size:
    return height if height == width else (height, width)


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells these training images from others under the same name, for the identity of a run."""
    labels = hashlib.sha256(data.train.labels.cpu().numpy().tobytes()).hexdigest()[:16]
    return {"images": {"train": len(data.train), "labels": labels, "statistics": [list(s) for s in data.statistics()]}}
