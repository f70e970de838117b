"""Dataclasses as plain JSON and back: what a file says has the type that its field declares, or the error says where.

A field with a default may be missing; so may a `None` one, which is not written. Keys that a class does not declare are
refused, unless it is a `Record`: that keeps them in `more` and writes them again, so that what a later version or
someone's own search method says is not lost when a file is read and rewritten.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rnas.errors import RnasError
from rnas.files import is_text, read_json
from rnas.genotype import CellCodes, Genotype, architecture_from_json

T = TypeVar("T")

PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record that keeps what it does not know."""

    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys that no field declares, as JSON values."""


@dataclass(frozen=True)
class Check:
    """In `Annotated`: which values of the type fit, and what to call them."""

    fits: Callable[[Any], bool]
    what: str


def read(kind: type[T], path: Path) -> T:
    """The record of the class `kind` in the JSON file `path`. RnasError if it is missing or damaged."""
    return decode(kind, read_json(path), path)


def decode(kind: type[T], value: Any, where: object) -> T:
    """The record of the class `kind` that the JSON `value` says. RnasError, naming `where` and the place in it, for
    anything else."""
    try:
        found: T = _decode(kind, value, "$")
    except _MismatchError as e:
        raise RnasError(f"{where} is damaged: {e}") from e
    return found


def encode(record: Any) -> Any:
    """The JSON value that `decode` reads as `record`."""
    if isinstance(record, Genotype | CellCodes):
        return record.to_json()
    if is_dataclass(record):
        own = {f.name: encode(getattr(record, f.name)) for f in fields(record) if f.name != "more"}
        return {k: v for k, v in own.items() if v is not None} | dict(getattr(record, "more", {}))
    if isinstance(record, Mapping):
        return {k: encode(v) for k, v in record.items()}
    return [encode(v) for v in record] if isinstance(record, tuple | list) else record


class _MismatchError(Exception):
    """What was expected, where, and what is there."""

    def __init__(self, what: str, at: str, *found: Any):
        text = json.dumps(found[0]) if found else "nothing"
        super().__init__(f"expected {what} at {at}, found {text if len(text) <= 60 else f'{text[:57]}...'}")


def _decode(kind: Any, value: Any, at: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found = _decode(arguments[0], value, at)
        for check in arguments[1:]:
            if not check.fits(found):
                raise _MismatchError(check.what, at, value)
        return found
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, at)
    if origin is tuple:
        return _row(arguments, value, at)
    if origin is dict or is_dataclass(kind):
        if not isinstance(value, dict):
            raise _MismatchError("an object", at, value)
        if not all(map(is_text, value)):
            raise _MismatchError("keys of Unicode text", at, *value)
        if origin is dict:
            return {k: _decode(arguments[1], v, f"{at}.{k}") for k, v in value.items()}
        return _record(kind, value, at)
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if type(value) is not kind:
        raise _MismatchError(PLAIN[kind], at, value)
    if kind is float and not math.isfinite(value):
        raise _MismatchError("a finite number", at, value)
    if kind is str and not is_text(value):
        raise _MismatchError("Unicode text", at, value)
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if Genotype in kinds:
        try:
            return architecture_from_json(value, at)
        except RnasError as e:
            raise _MismatchError(f"an architecture ({e})", at, value) from e
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return _decode(kind, value, at)


def _row(kinds: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
    """A list of any length, where `kinds` end in an ellipsis, or of as many values as `kinds`."""
    if not isinstance(value, list):
        raise _MismatchError("a list", at, value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise _MismatchError(f"{len(kinds)} values", at, value)
    return tuple(_decode(kind, v, f"{at}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))


def _record(kind: Any, value: dict[str, Any], at: str) -> Any:
    known = _fields(kind)
    unknown = {k: v for k, v in value.items() if k not in known}
    if unknown and not issubclass(kind, Record):
        raise _MismatchError(f"no key but {', '.join(known)}", at, *unknown)
    given: dict[str, Any] = {"more": unknown} if unknown else {}
    for name, (annotation, optional) in known.items():
        if name in value:
            given[name] = _decode(annotation, value[name], f"{at}.{name}")
        elif not optional:
            raise _MismatchError(_named(annotation), f"{at}.{name}")
    return kind(**given)


def _named(annotation: Any) -> str:
    """What a field of the type `annotation` holds, for people."""
    if get_origin(annotation) is Annotated:
        return next((str(check.what) for check in get_args(annotation)[1:]), _named(get_args(annotation)[0]))
    return PLAIN.get(annotation, "a list" if get_origin(annotation) is tuple else "an object")


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """For every field of the class `kind` its type, and whether it may be missing."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        f.name: (hints[f.name], f.default is not MISSING or f.default_factory is not MISSING)
        for f in fields(kind)
        if f.name != "more"
    }
