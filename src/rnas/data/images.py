"""Image files: found, read and decoded by Pillow, with its limits on, on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
CHUNK = 256
"""Images that one worker decodes at a time: 3 MiB at 64x64."""
IGNORED = {"thumbs.db", "desktop.ini"}


def image_files(folder: Path) -> list[Path]:
    """Every file under `folder` at any depth, sorted; hidden ones and those of file managers left out."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, n) for n in files if not n.startswith(".") and n.lower() not in IGNORED]
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
        with Image.open(path, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RnasError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG decoder skip detail that would be lost anyway
            image.load()
            upright = ImageOps.exif_transpose(image)
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


def _formats() -> list[str]:
    if not Image.ID:
        Image.init()
    return [name for name in Image.ID if name not in FOREIGN]


def _rgb(image: Image.Image) -> Image.Image:
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


def decode_all(paths: Sequence[Path], size: int | None, where: Path) -> Iterator[NDArray[np.uint8]]:
    """The images in `paths`, in order, as arrays uint8 (n,3,H,W) of a few hundred.

    Without `size` they must all be of one size. RnasError, listing the files by their name below `where`, if some
    cannot be read: the whole list is gone through first, so that one run names them all.
    """
    shape: tuple[int, ...] | None = None
    failed: list[str] = []
    for chunk, images in _chunks(paths, size):
        ready = []
        for path, image in zip(chunk, images, strict=True):
            name = path.relative_to(where)
            if isinstance(image, RnasError):
                failed.append(f"{name} ({image})")
                continue
            _check_size(image.shape, shape, name, paths[0].relative_to(where))
            shape = image.shape
            ready.append(image)
        if ready and not failed:
            yield np.stack(ready)
    if failed:
        shown = ", ".join(failed[:10]) + (f" and {len(failed) - 10} more" if len(failed) > 10 else "")
        raise RnasError(f"{len(failed)} of {len(paths)} images in {where} cannot be read: {shown}; mend or remove them")


def _check_size(shape: tuple[int, ...], before: tuple[int, ...] | None, name: Path, first: Path) -> None:
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
    paths: Sequence[Path], size: int | None
) -> Iterator[tuple[Sequence[Path], list[NDArray[np.uint8] | RnasError]]]:
    """Chunks of `paths` with what became of them, in order; only a few chunks are in memory at a time."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    # Threads: Pillow decodes without the interpreter's lock, and measured on two cores they beat processes.
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(chunks)
        pending: list[Any] = [(c, pool.submit(_decode_chunk, c, size)) for c in islice(rest, 2 * workers)]
        while pending:
            chunk, future = pending.pop(0)
            yield chunk, future.result()
            pending += [(c, pool.submit(_decode_chunk, c, size)) for c in islice(rest, 1)]


def _decode_chunk(paths: Sequence[Path], size: int | None) -> list[NDArray[np.uint8] | RnasError]:
    out: list[NDArray[np.uint8] | RnasError] = []
    for path in paths:
        try:
            out.append(decode(path, size))
        except RnasError as e:
            out.append(e)
    return out
