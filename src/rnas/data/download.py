"""Files from the internet: resumed where they broke off, and believed only when size and MD5 are right."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnas.data.cache import Progress
from rnas.errors import RnasError

TRIES = 4
"""Attempts in a row that may bring not one new byte."""
PAUSE = 1.0
"""Seconds before the second attempt; each later one waits twice as long."""
TIMEOUT = 30.0
BLOCK = 1 << 18


@dataclass(frozen=True)
class Remote:
    """A file on the internet: where it is and how to know that it arrived (size in bytes, MD5)."""

    url: str
    size: int
    md5: str

    @property
    def file(self) -> str:
        """Its name."""
        return self.url.rsplit("/", 1)[1]


class _Broken(Exception):
    """The transfer ended early and may be continued."""


def fetch(remote: Remote, folder: Path, mirror: str | None = None, progress: Progress | None = None) -> Path:
    """The file `remote` in `folder`, downloaded if it is not there; its path.

    A transfer that breaks off is continued, at once and by the next call. `mirror` is the address of a folder that
    holds the file. RnasError if the server cannot be reached or has another file, or if the disk is full.
    """
    target, part = folder / remote.file, folder / f"{remote.file}.part"
    url = f"{_checked(mirror)}/{remote.file}" if mirror else remote.url
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            verify(remote, target, progress)
            return target
        _complete(remote, url, part, progress)
        _accept(remote, part, target, url, progress)
    except OSError as e:
        raise RnasError(disk_error(e, target, remote.size)) from e
    return target


def _checked(mirror: str) -> str:
    if not re.match(r"https?://[^/]", mirror):
        raise RnasError(f"the mirror is '{mirror}': expected the http or https address of a folder")
    return mirror.rstrip("/")


def disk_error(e: OSError, path: Path, size: int) -> str:
    """What to tell about an error of the file system that struck while `size` bytes were written to `path`."""
    try:
        free = f"; {size >> 20} MiB are needed and {shutil.disk_usage(path.parent).free >> 20} are free"
    except OSError:
        free = ""
    return f"cannot write {path}: {e.strerror or e}{free}; make room, or choose another place with --data-root"


def verify(remote: Remote, path: Path, progress: Progress | None = None) -> None:
    """RnasError unless `path` has the size and the MD5 of `remote`."""
    if (fault := _fault(remote, path, progress)) is not None:
        raise RnasError(f"{path} is not the official file: {fault}; remove it, or put the official file there")


def _fault(remote: Remote, path: Path, progress: Progress | None) -> str | None:
    size = path.stat().st_size
    if size != remote.size:
        return f"it has {size:,} bytes, expected {remote.size:,}"
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with open(path, "rb") as f:
        while block := f.read(16 * BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(f"verifying {remote.file}", done, remote.size)
    return None if digest.hexdigest() == remote.md5 else f"its MD5 is {digest.hexdigest()}, expected {remote.md5}"


def _accept(remote: Remote, part: Path, target: Path, url: str, progress: Progress | None) -> None:
    if (fault := _fault(remote, part, progress)) is not None:
        wrong = target.with_name(f"{target.name}.wrong")
        os.replace(part, wrong)
        raise RnasError(
            f"what came from {url} is not {remote.file}: {fault}; it is kept as {wrong.name}, "
            "the next call starts afresh; try again or use another mirror"
        )
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, target)


def _complete(remote: Remote, url: str, part: Path, progress: Progress | None) -> None:
    """Append to `part` until it has all its bytes."""
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:
        part.unlink()
        have = 0
    failures = 0
    while have < remote.size:
        before = have
        try:
            _transfer(remote, url, part, have, progress)
            fault = "the connection broke off"
        except (_Broken, http.client.HTTPException) as e:
            fault = str(e) or type(e).__name__
        have = part.stat().st_size if part.exists() else 0
        if have >= remote.size:
            return
        failures = 0 if have > before else failures + 1
        if failures == TRIES:
            raise RnasError(
                f"cannot download {url}: {fault}; {have:,} of {remote.size:,} bytes are here and the next call "
                f"continues; without internet, put {remote.file} into {part.parent} or give a --mirror"
            )
        time.sleep(PAUSE * 2**failures if failures else 0)


def _transfer(remote: Remote, url: str, part: Path, have: int, progress: Progress | None) -> None:
    headers = {"User-Agent": "rnas", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:  # the server's file ends before ours
            part.unlink()
            raise _Broken("the server has fewer bytes than are here already") from e
        if e.code in (408, 425, 429) or e.code >= 500:
            raise _Broken(f"the server answers {e.code} {e.reason}") from e
        raise RnasError(f"cannot download {url}: the server answers {e.code} {e.reason}; try a --mirror") from e
    except (ValueError, http.client.InvalidURL) as e:
        raise RnasError(f"{url} is no address: {e}") from e
    except OSError as e:
        raise _Broken(str(getattr(e, "reason", e))) from e
    with response:
        start = _start(response, remote, url, have)
        with open(part, "r+b" if start else "wb") as out:
            out.seek(start)
            out.truncate()
            _copy(response, out, remote, url, start, progress)


def _start(response: Any, remote: Remote, url: str, have: int) -> int:
    """From which byte on the response goes; RnasError if it is a part of another file."""
    if response.status == 206:
        m = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = (int(m[1]), m[2]) if m else (-1, "*")
        if start != have:
            raise _Broken("the server sends another part than it was asked for")
    else:
        start, total = 0, response.headers.get("Content-Length", "*")
    if total != "*" and total != str(remote.size):
        raise RnasError(f"{url} has {total} bytes, {remote.file} {remote.size}: it is another file; check the mirror")
    return start


def _copy(response: Any, out: Any, remote: Remote, url: str, done: int, progress: Progress | None) -> None:
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as e:
            raise _Broken(str(e) or "the connection broke off") from e
        if not block:
            return
        done += len(block)
        if done > remote.size:
            raise RnasError(f"{url} sends more than the {remote.size:,} bytes of {remote.file}: check the mirror")
        out.write(block)
        if progress:
            progress(f"downloading {remote.file}", done, remote.size)
