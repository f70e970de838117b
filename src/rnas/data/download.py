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
from rnas.files import size_text

TRIES = 4
"""Attempts in a row that may bring not one new byte."""
PAUSE = 1.0
"""Seconds before the second attempt; each later one waits twice as long."""
TIMEOUT = 30.0
BLOCK = 1 << 18
WRONG = ".wrong"
"""What is added to the name of a file that arrived and is another than it should be."""


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

    restarted = False
    """Whether the server had been asked to continue, and began at the first byte instead."""


def fetch(remote: Remote, folder: Path, mirror: str | None = None, progress: Progress | None = None) -> Path:
    """The file `remote` in `folder`, downloaded if it is not there; its path.

    A transfer that breaks off is continued, at once and by the next call. `mirror` is the address of a folder that
    holds the file. RnasError if the server cannot be reached or has another file, or if the disk is full.
    """
    target, part, wrong = (folder / f"{remote.file}{end}" for end in ("", ".part", WRONG))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            verify(remote, target, progress)
        else:
            url = f"{_checked(mirror)}/{remote.file}" if mirror else remote.url
            earlier = part.exists()
            _complete(remote, url, part, progress)
            fault = _fault(remote, part, progress)
            if fault and earlier:  # it may have begun with something else, such as a page that asks for a password
                part.unlink()
                _complete(remote, url, part, progress)
                fault = _fault(remote, part, progress)
            _accept(remote, part, target, url, fault)
        for leftover in (part, wrong):  # of earlier attempts
            leftover.unlink(missing_ok=True)
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
        free = f"; {size_text(size)} are needed and {size_text(shutil.disk_usage(path.parent).free)} are free"
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


def _advice(remote: Remote, url: str) -> str:
    return "give a --mirror" if url == remote.url else "use another mirror"


def _accept(remote: Remote, part: Path, target: Path, url: str, fault: str | None) -> None:
    if fault is not None:
        wrong = target.with_name(target.name + WRONG)
        os.replace(part, wrong)
        raise RnasError(
            f"what came from {url} is not {remote.file}: {fault}; it is kept as {wrong.name}, "
            f"the next call starts afresh; try again or {_advice(remote, url)}"
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
    failures, restarts, fault, most = 0, False, "", have
    while have < remote.size:
        try:
            _transfer(remote, url, part, have, progress)
        except (_Broken, http.client.HTTPException) as e:
            fault = str(e) or type(e).__name__
            restarts = restarts or getattr(e, "restarted", False)
        have = part.stat().st_size if part.exists() else 0
        if have >= remote.size:
            return
        failures = 0 if have > most else failures + 1
        most = max(most, have)
        if failures == TRIES:
            raise RnasError(
                f"cannot download {url}: {fault}; {_outlook(have, remote.size, restarts)}; without internet, put "
                f"{remote.file} into {part.parent}, or {_advice(remote, url)}"
            )
        time.sleep(PAUSE * 2 ** (failures - 1) if failures else 0)


def _outlook(have: int, size: int, restarts: bool) -> str:
    if restarts:
        return "this server cannot continue a download, so the next call starts again at the first byte"
    return f"{have:,} of {size:,} bytes are here and the next call continues" if have else "nothing has arrived"


def _transfer(remote: Remote, url: str, part: Path, have: int, progress: Progress | None) -> None:
    with _request(remote, url, part, have) as response:
        start = _start(response, remote, url, have)
        try:
            with open(part, "r+b" if start else "wb") as out:
                out.seek(start)
                out.truncate()
                whole = _copy(response, out, remote, start, progress)
        except _Broken as e:
            e.restarted = start < have
            raise
    if not whole:
        part.unlink()  # the next call would take it for the beginning of the file
        raise RnasError(f"{url} sends more than the {remote.size:,} bytes of {remote.file}; {_advice(remote, url)}")


def _request(remote: Remote, url: str, part: Path, have: int) -> Any:
    """The server's response, which goes on from byte `have` if the server can. _Broken if it may be asked again."""
    headers = {"User-Agent": "rnas", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        answer = f"the server answers {e.code} {_reason(e)}"
        if e.code == 416 and have:  # the server's file ends before ours
            part.unlink()
            raise _Broken("the server has fewer bytes than are here already") from e
        if e.code in (408, 425, 429) or e.code >= 500:
            raise _Broken(answer) from e
        raise RnasError(f"cannot download {url}: {answer}; {_advice(remote, url)}") from e
    except (ValueError, http.client.InvalidURL) as e:
        raise RnasError(f"{url} is no address: {e}; write what is no ASCII letter percent-encoded") from e
    except OSError as e:
        raise _Broken(str(getattr(e, "reason", e))) from e


def _reason(e: urllib.error.HTTPError) -> str:
    if "infinite loop" in str(e.reason):  # urllib tells it in three lines
        return "and redirects in circles"
    return " ".join(str(e.reason).split())


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
        raise RnasError(
            f"{url} has {total} bytes, {remote.file} {remote.size}: it is another file; {_advice(remote, url)}"
        )
    return start


def _copy(response: Any, out: Any, remote: Remote, done: int, progress: Progress | None) -> bool:
    """Write the response to `out`, where `done` bytes are already; False if there are too many. _Broken if too few."""
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as e:
            raise _Broken(str(e) or "the connection broke off") from e
        done += len(block)
        if done > remote.size:
            return False
        if not block and done < remote.size:
            raise _Broken("the connection broke off")
        if not block:
            return True
        out.write(block)
        if progress:
            progress(f"downloading {remote.file}", done, remote.size)
