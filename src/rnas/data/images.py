"""Image files: found, read and decoded by Pillow, with its limits on, on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from rnas.data.arrays import MAX_SIZE, MIN_SIZE
from rnas.errors import RnasError

MAX_PIXELS = 89_478_485
"""The size, in pixels, from which Pillow suspects a decompression bomb; here such an image is refused."""
FOREIGN = {"EPS", "WMF"}
"""Formats that Pillow hands to another program or the operating system: not for files that nobody vouches for."""
ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""
CHUNK = 256
"""Images that one worker decodes at a time: 3 MiB at 64x64."""
IGNORED = {"thumbs.db", "desktop.ini"}


def image_files(root: Path, folder: str) -> list[str]:
    """The name, below `root`, of every file in `folder` at any depth, sorted; without hidden ones and those of file
    managers."""
    found: list[str] = []
    for place, folders, files in os.walk(root / folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, root)
        found += [os.path.join(below, n) for n in files if not n.startswith(".") and n.lower() not in IGNORED]
    return sorted(found)


def _unreadable(e: OSError) -> None:
    raise RnasError(f"cannot read {e.filename}: {e.strerror}") from e


def decode(path: Path, size: int | None = None) -> NDArray[np.uint8]:
    """The image in the file `path` as uint8 (3,H,W).

    Greyscale becomes three equal channels, transparency white, 16 bit 8; a camera's rotation is applied; of an
    animation the first frame is taken. With `size` the shorter side is scaled to it and the middle cut out.
    RnasError, without the file's name, if it cannot be read.
    """
    try:
        with Image.open(path, formats=_formats(path.suffix.lower())) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RnasError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG decoder skip detail that would be lost anyway
            image.load()
            upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
            rgb = _rgb(upright)
    except RnasError:
        raise
    except FileNotFoundError as e:
        raise RnasError("no such file") from e
    except Exception as e:  # decoders raise many types on damaged files
        raise RnasError(_first_line(e)) from e
    if size is not None and rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


@cache
def _formats(suffix: str) -> list[str]:
    """The formats to try, the one that a file name's `suffix` promises first: that saves a quarter of the time."""
    Image.init()  # waits until every plugin is there, also where another thread has begun to import them
    likely = Image.EXTENSION.get(suffix)
    return [name for name in sorted(Image.ID, key=lambda name: name != likely) if name not in FOREIGN]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RnasError("its pixels are 32-bit numbers of no fixed range: save it with 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _first_line(e: Exception) -> str:
    if isinstance(e, UnidentifiedImageError):
        return "no image, or of a format that is not read"
    return (str(e).splitlines() or [type(e).__name__])[0]


def decode_all(root: Path, names: Sequence[str], size: int | None) -> Iterator[NDArray[np.uint8]]:
    """The images in the files `names` below `root`, in order, as arrays uint8 (n,3,H,W) of a few hundred.

    Without `size` they must all be of one size. RnasError, listing the files, if some cannot be read: all are gone
    through first, so that one run names them all.
    """
    shape: tuple[int, ...] | None = None
    failed: list[str] = []
    for chunk, images in _chunks(root, names, size):
        ready = []
        for name, image in zip(chunk, images, strict=True):
            if isinstance(image, RnasError):
                failed.append(f"{name} ({image})")
                continue
            _check_size(image.shape, shape, name, names[0])
            shape = image.shape
            ready.append(image)
        if ready and not failed:
            yield np.stack(ready)
    if failed:
        shown = ", ".join(failed[:10]) + (f" and {len(failed) - 10} more" if len(failed) > 10 else "")
        raise RnasError(f"{len(failed)} of {len(names)} images in {root} cannot be read: {shown}; mend or remove them")


def _check_size(shape: tuple[int, ...], before: tuple[int, ...] | None, name: str, first: str) -> None:
    _, height, width = shape
    if before is not None and shape != before:
        raise RnasError(
            f"the images differ in size: {first} has {before[2]}x{before[1]} pixels, {name} {width}x{height}; "
            "choose one with --image-size"
        )
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in (height, width)):
        raise RnasError(
            f"{name} has {width}x{height} pixels: expected {MIN_SIZE} to {MAX_SIZE} a side; choose an --image-size"
        )


def _chunks(
    root: Path, names: Sequence[str], size: int | None
) -> Iterator[tuple[Sequence[str], list[NDArray[np.uint8] | RnasError]]]:
    """Chunks of `names` with what became of them, in order; only a few chunks are in memory at a time."""
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    # Threads: Pillow decodes without the interpreter's lock, and measured on two cores they beat processes.
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(chunks)
        pending: list[Any] = [(c, pool.submit(_decode_chunk, root, c, size)) for c in islice(rest, 2 * workers)]
        while pending:
            chunk, future = pending.pop(0)
            yield chunk, future.result()
            pending += [(c, pool.submit(_decode_chunk, root, c, size)) for c in islice(rest, 1)]


def _decode_chunk(root: Path, names: Sequence[str], size: int | None) -> list[NDArray[np.uint8] | RnasError]:
    out: list[NDArray[np.uint8] | RnasError] = []
    for name in names:
        try:
            out.append(decode(root / name, size))
        except RnasError as e:
            out.append(e)
    return out
