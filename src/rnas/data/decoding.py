"""One image file to one array, by Pillow with its limits on; run as a program, many of them.

This file imports nothing of rnas, because worker processes that run it should start without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Transpose

MAX_PIXELS = 89_478_485
"""The size, in pixels, from which Pillow suspects a decompression bomb; here such an image is refused."""
FOREIGN = {"EPS", "WMF"}
"""Formats that Pillow hands to another program or the operating system: not for files that nobody vouches for."""
ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What sets an image upright whose orientation is not 1."""
HEADER = struct.Struct("<?III")
"""What a worker writes before each answer: whether it is an image, its height and width, how many bytes follow."""


Size = int | tuple[int, int]
"""Pixels to a side, or height and width."""


class UnreadableError(Exception):
    """The file holds no image that can be read; the message says why."""


def decode(path: Path, size: Size | None = None) -> NDArray[np.uint8]:
    """The image in the file `path` as uint8 (H,W,3).

    Greyscale becomes three equal channels, transparency white, 16 bit 8; a camera's rotation is applied; of an
    animation the first frame is taken. With `size` the image is scaled until it covers it, and the middle cut out.
    UnreadableError if there is no such image.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what Pillow finds odd and reads nevertheless
            return _decoded(path, size)
    except UnreadableError:
        raise
    except UnidentifiedImageError as e:
        raise UnreadableError("no image, or of a format that is not read") from e
    except FileNotFoundError as e:
        raise UnreadableError("no such file") from e
    except Exception as e:  # decoders raise many types on damaged files
        raise UnreadableError((str(e).splitlines() or [type(e).__name__])[0]) from e


def _decoded(path: Path, size: Size | None) -> NDArray[np.uint8]:
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for someone to write into it
        raise UnreadableError("no regular file")
    with Image.open(path, formats=_formats(path.suffix.lower())) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
        if size is not None:
            enough = 2 * max(sides(size))  # whichever side will be up
            image.draft("RGB", (enough, enough))  # lets a JPEG decoder skip detail that would be lost anyway
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        rgb = _rgb(image.transpose(turn) if turn is not None else image)
        if size is not None and rgb.size != sides(size)[::-1]:
            rgb = ImageOps.fit(rgb, sides(size)[::-1], Image.Resampling.BILINEAR)
        return np.asarray(rgb)


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, which is upright, where none can be read. It is a note beside the pixels: a malformed one,
    as some cameras and editors write, costs the note only."""
    with contextlib.suppress(Exception):  # Pillow's parser raises many types on it
        orientation = image.getexif().get(ORIENTATION)
        return orientation if isinstance(orientation, int) else 1
    return 1


@cache
def _formats(suffix: str) -> list[str]:
    """The formats to try, the one that a file name's `suffix` promises first: that saves a quarter of the time."""
    Image.init()
    likely = Image.EXTENSION.get(suffix)
    return [name for name in sorted(Image.ID, key=lambda name: name != likely) if name not in FOREIGN]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "I" and image.format == "PPM":  # which scales what it holds to 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableError("its pixels are 32-bit numbers of no fixed range: save it with 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def main() -> None:
    """Read {"root", "size", "names"} as JSON from standard input; answer for each name on standard output."""
    task = json.load(sys.stdin)
    out = sys.stdout.buffer
    for name in task["names"]:
        try:
            image = decode(Path(task["root"], name), task["size"])
            out.write(HEADER.pack(True, *image.shape[:2], image.size) + image.tobytes())
        except UnreadableError as e:
            message = str(e).encode(errors="replace")
            out.write(HEADER.pack(False, 0, 0, len(message)) + message)
    out.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more; to close standard output would fail again
