"""Run folders: settings, log and environment of a run, and who may write there."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rnas.errors import RnasError
from rnas.files import (
    TEMPORARY,
    acquire,
    check_writable,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from rnas.settings import Search, Source, from_json, identity

if TYPE_CHECKING:
    from filelock import BaseFileLock
from rnas.records import codec
from rnas.records.layout import CHECKPOINT, ENVIRONMENT, LOCK, LOG, SETTINGS, WRITER
from rnas.records.schema import EVENTS, Candidate, Environment, Epoch, Warned, Writer

Record = dict[str, Any]
"""A JSON object."""
CHECK = "crc32"
"""The key of a log line's checksum: of the line as it is without it."""


E = TypeVar("E", bound=Epoch)


class Trained(NamedTuple):
    """How a network was trained: on which images, divided with which seed; and whether on clean ones (ST)."""

    source: Source
    seed: int
    standard: bool


class Run:
    """One run folder, open for writing."""

    def __init__(self, folder: Path, identity: Record):
        self.folder = folder
        self.identity = identity
        """What tells this run from others, as JSON values."""

    @staticmethod
    @contextmanager
    def open(
        folder: Path, settings: Any, *, resume: bool, device: str, facts: dict[str, Any] | None = None
    ) -> Iterator[Run]:
        """Start a run in `folder`, or with `resume` go on with the same run there, as its only writer until the end.

        `facts` are what else makes the run what it is: the images, the genotype that a path led to.

        RnasError, and nothing written, if the folder holds another run, or this one and `resume` is not set, if
        another process writes to it, or if it cannot be written to.
        """
        wanted = {"command": command_of(settings), **identity(settings), **(facts or {})}
        check_free(folder, wanted, resume)  # before a folder is made
        with alone(folder):
            check_free(folder, wanted, resume)  # whoever held it before may have begun another run
            if not (folder / SETTINGS).exists():
                write_json(folder / ENVIRONMENT, codec.encode(environment(device, getattr(settings, "seed", None))))
                write_json(folder / SETTINGS, {**wanted, "rnas": metadata.version("rnas")})
            yield Run(folder, wanted)

    def log(self, **event: Any) -> None:
        """Append one event to log.jsonl."""
        with open(self.folder / LOG, "a", encoding="utf-8") as f:
            f.write(_line(event))
            f.flush()
            os.fsync(f.fileno())

    def rewind(self, epoch: int) -> None:
        """Forget the epochs after `epoch`: they were logged, but the checkpoint of them was not written.

        RnasError if one up to it is missing.
        """
        kept = [e for e in read_log(self.folder) if e.get("event") != "epoch" or e["epoch"] <= epoch]
        logged = sum(e.get("event") == "epoch" for e in kept)
        if logged < epoch:
            raise RnasError(
                f"{self.folder / LOG} tells of {logged or 'no'} epochs, but the checkpoint is of epoch {epoch}: "
                "the log is damaged; choose another --out"
            )
        write_text(self.folder / LOG, "".join(map(_line, kept)))


@contextmanager
def alone(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `folder` as its only writer, as long as the process lives; what killed writers left half-written is removed.

    If another process holds it: RnasError that says which; or `wait` is told, and the other's end is waited for.
    RnasError if the folder cannot be written to.
    """
    lock = _hold(folder, wait)
    try:
        holder = Writer(os.getpid(), platform.node(), f"{datetime.now():%Y-%m-%d %H:%M:%S}")
        write_json(folder / WRITER, codec.encode(holder))
        remove_leftovers(folder, TEMPORARY)
        yield
    finally:
        (folder / WRITER).unlink(missing_ok=True)
        lock.release()


def _hold(folder: Path, wait: Callable[[str], None] | None) -> BaseFileLock:
    check_writable(folder)
    try:
        lock = acquire(folder / LOCK, wait=False)
        if lock is None:
            held = f"{folder} is being written to by {_writer(folder)}"
            if wait is None:
                raise RnasError(f"{held}: wait for its end, or choose another --out")
            wait(f"{held}: waiting for its end")
            lock = acquire(folder / LOCK)
            assert lock is not None
        return lock
    except OSError as e:
        raise RnasError(f"cannot write to {folder}: {e.strerror or e}") from e


def _writer(folder: Path) -> str:
    """The process that holds `folder`, for people: it writes its name a moment after it has the lock."""
    try:
        found = codec.read(Writer, folder / WRITER)
    except RnasError:
        return "another process"
    return f"process {found.pid} on {found.host} since {found.since}"


def command_of(settings: Any) -> str:
    """The command whose settings these are; a search method's are those of a search."""
    return "search" if isinstance(settings, Search) else type(settings).__name__.lower()


def check_free(folder: Path, wanted: dict[str, Any], resume: bool) -> None:
    """RnasError unless a run with the settings `wanted` may start, or with `resume` go on, in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RnasError(f"{folder} is a file: --out names a folder")
    if not (folder / SETTINGS).exists():
        check_writable(folder)
        left = [name for name in (LOG, CHECKPOINT) if (folder / name).exists()]
        if left:
            raise RnasError(f"{folder} holds {left[0]} but no {SETTINGS}: choose another --out")
        return
    found = read_json(folder / SETTINGS)
    if not isinstance(found, dict):
        raise RnasError(f"{folder / SETTINGS} is damaged: expected a JSON object")
    changes = differences(found, wanted)
    if "images" in changes and len(changes) == 1:
        raise RnasError(
            f"{folder} holds a run on other images than {wanted['source']['data']} has now: choose another --out"
        )
    if changes:
        raise RnasError(
            f"{folder} holds another run ({'; '.join(changes.values())}): "
            "choose another --out, or the settings it began with"
        )
    if not resume:
        again = shlex.join(["rnas", wanted["command"], "--resume", str(folder)])
        raise RnasError(f"{folder} holds this run already: {again} goes on with it, another --out starts anew")


def differences(found: Record, wanted: Record) -> dict[str, str]:
    """What tells the run `found` from the run `wanted`: each setting, and how it differs, for people."""
    found = {"precision": "fp32", "lr_min": 0.0, **found}  # what there was before they could be chosen
    return {k: _change(k, found.get(k), v) for k, v in wanted.items() if found.get(k) != v}


def _change(name: str, was: Any, now: Any) -> str:
    """What tells two settings called `name` apart."""
    if isinstance(was, dict) and isinstance(now, dict):
        return "; ".join(_change(f"{name}.{k}", was.get(k), now[k]) for k in now if was.get(k) != now[k])
    return f"{name} was {json.dumps(was)}, now {json.dumps(now)}"


def _line(event: Record) -> str:
    """One event as a line of the log, with its checksum."""
    text = json.dumps(event, ensure_ascii=False, allow_nan=False)
    return json.dumps({**event, CHECK: zlib.crc32(text.encode())}, ensure_ascii=False, allow_nan=False) + "\n"


def settings_of(folder: Path, name: str, kind: Callable[[Record], type[Any]]) -> Any:
    """The settings of the run in `folder`, which is one of the command `name`, so that `--resume` goes on with it;
    `kind` gives their class from what settings.json holds.

    RnasError if there is none, if it is another command's, or if settings.json is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise RnasError(f"{folder} holds no run to go on with: {SETTINGS} is missing")
    found = read_json(path)
    if not isinstance(found, dict):
        raise RnasError(f"{path} is damaged: expected a JSON object")
    if found.get("command") != name:
        raise RnasError(f"{folder} holds a run of rnas {found.get('command')}, not of rnas {name}")
    try:
        if found.get("arch") == "genotype":  # which settings.json holds
            found["arch"] = str(folder)
        return from_json(kind(found), {**found, "out": str(folder), "resume": True})
    except (AttributeError, KeyError, TypeError, ValueError, RnasError) as e:
        raise RnasError(f"{path} is damaged, or of another version of rnas: {e}") from e


def read_log(folder: Path) -> list[Record]:
    """The events of a run, in order. A line cut off by a kill at the end of the file is left out.

    RnasError, naming file and line, unless every line is an object as it was written (lines of earlier versions have
    no checksum), its numbers are finite, the epochs are 1, 2, 3 and so on, and a candidate has its number and score.
    """
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events: list[Record] = []
    epochs = 0
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never finished
        where = f"{path}, line {number},"
        event = _event(line, where)
        if event.get("event") == "epoch":
            epochs += 1
            if type(event.get("epoch")) is not int:
                raise RnasError(f"{where} is an epoch without a number: the log is damaged")
            if event["epoch"] != epochs:
                raise RnasError(f"{where} is epoch {event['epoch']} where epoch {epochs} belongs: the log is damaged")
        if event.get("event") == "candidate" and not _is_scored(event):
            raise RnasError(f"{where} is a candidate without its round, number or score: the log is damaged")
        events.append(event)
    return events


def read_events(folder: Path, kind: type[E]) -> tuple[tuple[E, ...], tuple[Warned | Candidate, ...]]:
    """The log of a run as records: its epochs, of the class `kind`, and its warnings and candidates. Events that this
    version does not know are left out.

    RnasError, naming the line, as of `read_log`, and for what is not of the right form.
    """
    epochs: list[E] = []
    others: list[Warned | Candidate] = []
    for number, event in enumerate(read_log(folder), 1):
        name, where = event.pop("event", None), f"{folder / LOG}, line {number},"
        if name == "epoch":
            epochs.append(codec.decode(kind, event, where))
        elif isinstance(name, str) and name in EVENTS:
            others.append(codec.decode(EVENTS[name], event, where))
    return tuple(epochs), tuple(others)


def _is_scored(event: Record) -> bool:
    """Whether the line of a candidate says which it is, and how good."""
    kinds: dict[str, tuple[type, ...]] = {"round": (str,), "number": (int,), "score": (int, float)}
    return all(type(event.get(key)) in types for key, types in kinds.items())


def _event(line: str, where: str) -> Record:
    """The event that one line of the log holds."""
    try:
        event = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise RnasError(f"{where} is not JSON: the log is damaged ({e})") from e
    if not isinstance(event, dict):
        raise RnasError(f"{where} is not a JSON object: the log is damaged")
    if CHECK in event and _line({k: v for k, v in event.items() if k != CHECK}) != f"{line}\n":
        raise RnasError(f"{where} is not as it was written, by its checksum: the log is damaged")
    event.pop(CHECK, None)
    return event


def _finite(text: str) -> float:
    """The number that JSON text says. ValueError for NaN, infinity and what is too large: no figure of a run is one."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def training_of(folder: Path) -> Trained:
    """How the network of `folder` was trained; all images, where it was trained on some of each class. RnasError if
    its settings.json does not say."""
    path = folder / SETTINGS
    try:
        settings = read_json(path)
        source = {**settings["source"], "limit_per_class": None}
        root = source.get("data_root")
        source["data_root"] = Path(root) if root else None
        for key, kinds in (("data", str), ("image_size", int | None), ("test_fraction", float | None)):
            if not isinstance(source.get(key), kinds):
                raise TypeError(f"{key} is {source.get(key)!r}")
        return Trained(Source(**source), int(settings["seed"]), bool(settings["standard"]))
    except (KeyError, OverflowError, TypeError, ValueError, RnasError) as e:
        raise RnasError(f"{path} does not say which images the network was trained on, and how ({e})") from e


def environment(device: str, seed: int | None) -> Environment:
    """What a run depends on besides its settings, of this process."""
    packages = ("rnas", "torch", "numpy", "scipy", "scikit-learn", "pillow")
    return Environment(
        command=shlex.join(["rnas", *sys.argv[1:]]),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages},
        platform=platform.platform(),
        cpus=os.cpu_count(),
        device=device,
        commit=_commit(),
        seed=seed,
    )


def _commit() -> str | None:
    """The git commit of the source tree; None for an installed package, or without git."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # a source tree where git is not installed
        return None
    return done.stdout.strip() or None
