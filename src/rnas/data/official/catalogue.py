"""The published data sets, read from their official archives and layouts, without pickle.

CIFAR-10 and CIFAR-100: Krizhevsky 2009; SVHN: Netzer et al. 2011; Tiny-ImageNet-200: Stanford CS231n.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rnas.data.archives import remove_unpacked, unpack
from rnas.data.cache import Decoding, Progress, cached, fingerprint, size_name
from rnas.data.dataset import Dataset
from rnas.data.decoding import Size
from rnas.data.download import Remote, fetch
from rnas.data.official import tiny_imagenet
from rnas.data.official.cifar import Cifar
from rnas.data.official.svhn import Svhn
from rnas.errors import RnasError
from rnas.files import locked

Reader = Callable[[Path, Size | None], Decoding]


@dataclass(frozen=True)
class Official:
    """A published data set: where its files come from, how they lie on disk, and who reads them."""

    name: str
    remotes: tuple[Remote, ...]
    folder: str
    """The folder that the archive unpacks to, or that the files lie in, below the data root."""
    files: tuple[str, ...]
    """What must be in that folder."""
    read: Reader
    list_files: Callable[[Path], Iterable[str]]
    """Every file that the data set consists of, named from its folder."""
    counts: tuple[int, int]
    """Training and test images of the official set."""
    class_count: int
    image_size: int
    limit: int = 0
    """How many bytes the archive may unpack to; 0 for files that are no archives."""
    pickles: str | None = None
    """The folder that the Python form of the set unpacks to."""


def locate(official: Official, root: Path) -> Path | None:
    """The folder that holds the data set in its official layout: below `root`, or `root` itself; None if neither."""
    for folder in (root / official.folder, root):
        if all((folder / name).exists() for name in official.files):
            return folder
    return None


def obtain(
    official: Official, root: Path, mirror: str | None = None, progress: Progress | None = None
) -> tuple[Path, bool]:
    """The folder of the data set, and whether anything was done: what is missing below `root` is unpacked from an
    archive that lies there or is downloaded. `mirror`, or else $RNAS_MIRROR, replaces the official addresses. Two
    processes take turns. RnasError as `fetch` and `unpack`.
    """
    if (folder := locate(official, root)) is not None:
        return folder, False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{official.folder}.lock"):
            remove_unpacked(root, official.folder)
            if (folder := locate(official, root)) is None:
                _obtain(official, root, mirror or os.environ.get("RNAS_MIRROR") or None, progress)
                folder = locate(official, root)
    except OSError as e:
        raise RnasError(f"cannot write to {root}: {e.strerror or e}; choose another place with --data-root") from e
    if folder is None:
        raise RnasError(f"{root / official.folder} lacks {_missing(official, root)}: remove it and start again")
    return folder, True


def _missing(official: Official, root: Path) -> str:
    return ", ".join(name for name in official.files if not (root / official.folder / name).exists())


def _obtain(official: Official, root: Path, mirror: str | None, progress: Progress | None) -> None:
    home = root / official.folder
    if not home.exists() and any((root / name).exists() for name in official.files):
        home = root  # the folder itself was given as the root
    for remote in official.remotes:
        if not official.limit:
            if not (home / remote.file).exists():
                fetch(remote, home, mirror, progress)
            continue
        if os.path.lexists(root / official.folder):
            raise RnasError(
                f"{root / official.folder} lacks {_missing(official, root)}: put it there, or remove the folder, "
                "and the archive is unpacked anew"
            )
        ours = not (root / remote.file).exists()
        archive = fetch(remote, root, mirror, progress)
        unpack(archive, root, official.folder, official.limit, progress)
        if ours:
            archive.unlink()


def named(
    official: Official,
    root: Path,
    image_size: Size | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
    refuse_pickles: bool = True,
) -> tuple[Dataset, Path, bool]:
    """The data set below `root`, its folder, and whether it had to be downloaded or unpacked first.

    RnasError if only the Python form, pickles, is there and `refuse_pickles`; and as `obtain`.
    """
    if refuse_pickles and locate(official, root) is None and (pickles := _pickles(official, root)):
        raise _unpicklable(official, pickles, root)
    folder, new = obtain(official, root, mirror, progress)
    source = fingerprint(folder, official.list_files(folder), official.name, image_size)

    def parse() -> Decoding:
        return official.read(folder, image_size)

    return cached(official.name, size_name(image_size), folder, source, parse, progress), folder, new


def refuse_pickles_at(path: Path) -> None:
    """RnasError if `path`, given as a folder of images, is the Python form of a data set."""
    for official in SETS.values():
        if official.pickles is not None and path.name == official.pickles:
            raise _unpicklable(official, path, path.parent)


def _unpicklable(official: Official, pickles: Path, root: Path) -> RnasError:
    return RnasError(
        f"{pickles} holds {official.name} as Python pickles, which can run any code when they are read and so "
        f"never are here; get the binary form: rnas data {official.name} --data-root {root}, or put "
        f"{official.remotes[0].file} from {official.remotes[0].url} into {root}"
    )


def _pickles(official: Official, root: Path) -> Path | None:
    places = (root / official.pickles, root) if official.pickles else ()
    return next((p for p in places if p.name == official.pickles and p.is_dir()), None)


_CIFAR10 = Cifar(
    tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", "batches.meta.txt", label_bytes=1, classes=10
)
_CIFAR100 = Cifar(("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2, classes=100)
_SVHN, _SVHN_EXTRA = Svhn(("train_32x32.mat",)), Svhn(("train_32x32.mat", "extra_32x32.mat"))
_KRIZ, _HOUSES = "https://www.cs.toronto.edu/~kriz", "http://ufldl.stanford.edu/housenumbers"
_SVHN_TRAIN = Remote(f"{_HOUSES}/train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373")
_SVHN_MORE = Remote(f"{_HOUSES}/extra_32x32.mat", 1329278602, "a93ce644f1a588dc4d68dda5feec44a7")
_SVHN_TEST = Remote(f"{_HOUSES}/test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3")

SETS: dict[str, Official] = {
    official.name: official
    for official in (
        Official(
            name="cifar10",
            remotes=(Remote(f"{_KRIZ}/cifar-10-binary.tar.gz", 170052171, "c32a1d4ab5d03f1284b67883e8d87530"),),
            folder="cifar-10-batches-bin",
            files=_CIFAR10.files,
            read=_CIFAR10,
            list_files=_CIFAR10.list_files,
            counts=(50_000, 10_000),
            class_count=10,
            image_size=32,
            limit=256 << 20,
            pickles="cifar-10-batches-py",
        ),
        Official(
            name="cifar100",
            remotes=(Remote(f"{_KRIZ}/cifar-100-binary.tar.gz", 168513733, "03b5dce01913d631647c71ecec9e9cb8"),),
            folder="cifar-100-binary",
            files=_CIFAR100.files,
            read=_CIFAR100,
            list_files=_CIFAR100.list_files,
            counts=(50_000, 10_000),
            class_count=100,
            image_size=32,
            limit=256 << 20,
            pickles="cifar-100-python",
        ),
        Official(
            name="svhn",
            remotes=(_SVHN_TRAIN, _SVHN_TEST),
            folder="svhn",
            files=_SVHN.files,
            read=_SVHN,
            list_files=_SVHN.list_files,
            counts=(73_257, 26_032),
            class_count=10,
            image_size=32,
        ),
        Official(
            name="svhn-extra",
            remotes=(_SVHN_TRAIN, _SVHN_MORE, _SVHN_TEST),
            folder="svhn",
            files=_SVHN_EXTRA.files,
            read=_SVHN_EXTRA,
            list_files=_SVHN_EXTRA.list_files,
            counts=(73_257 + 531_131, 26_032),
            class_count=10,
            image_size=32,
        ),
        Official(
            name="tiny-imagenet",
            remotes=(
                Remote(
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de"
                ),
            ),
            folder="tiny-imagenet-200",
            files=("wnids.txt", "train", "val/val_annotations.txt", "val/images"),
            read=tiny_imagenet.read,
            list_files=tiny_imagenet.list_files,
            counts=(100_000, 10_000),
            class_count=200,
            image_size=64,
            limit=1 << 30,
        ),
    )
}
