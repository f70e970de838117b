"""Search methods, one file each, found by name; or anyone's own file. `base` says what a method is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rnas.errors import RnasError, unknown
from rnas.settings import Search, flag_names

if TYPE_CHECKING:
    from rnas.nas.methods.base import Method

T = TypeVar("T")


class Found(NamedTuple):
    """A search method and the type of its settings."""

    method: type[Method]
    settings: type[Search]
    digest: str | None
    """Of a file of someone's own."""


def names() -> list[str]:
    """All methods that rnas has."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))


def load(name: str) -> Found:
    """The method called `name`, or in the file of that path. RnasError if there is none, or not exactly one."""
    from rnas.nas.methods.base import Method

    if is_path(name):
        path = Path(name).expanduser()
        module, digest = _imported(path), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    elif name in names():
        module, digest = importlib.import_module(f"{__name__}.{name}"), None
    else:
        raise unknown("method", name, names())
    methods: list[type[Method]] = _defined(module, Method)  # type: ignore[type-abstract]
    settings = _defined(module, Search)
    if len(methods) != 1 or len(settings) > 1:
        found = f"{len(methods)} subclasses of Method and {len(settings)} of Search"
        raise RnasError(f"{name} has {found}: expected one of Method, and one of Search or none")
    return Found(methods[0], settings[0] if settings else Search, digest)


def is_path(name: str) -> bool:
    """Whether `name` is that of a file."""
    return name.endswith(".py") or "/" in name


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise RnasError(f"{path} is not a file: --method takes {', '.join(names())}, or a Python file")
    name = f"rnas_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018 (it ends in .py, or Python says so below)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # whatever a file of someone's own may raise
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}," if lines else ""
        raise RnasError(f"{path}{where} cannot be imported: {type(e).__name__}: {e}") from e
    return module


def _defined(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The subclasses of `base` that a module itself defines and that can be made."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]


def check_has(settings: type[Search], flag: str) -> None:
    """RnasError for a setting that these `settings` lack and those of other methods have."""
    having = [] if flag in flag_names(settings) else which_have(flag)
    if having:
        name = flag.replace("_", "-")
        raise RnasError(f"{name} is not a setting of method {settings.method}, but of {', '.join(having)}")


def which_have(flag: str) -> list[str]:
    """The methods of rnas that have a setting called `flag`."""
    return [name for name in names() if flag in flag_names(load(name).settings)]
