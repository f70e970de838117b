"""What stands in the JSON files of a run folder, checked when it is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnas.errors import RnasError

if TYPE_CHECKING:
    pass


Record = dict[str, Any]


def number(record: Record, *keys: str, where: str) -> float | None:
    """The number under `keys`; None if it is missing, null or not finite. RnasError if it is something else."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RnasError(f"{where}: {'.'.join(keys)} is {value!r}: expected a number")
    return float(value) if math.isfinite(value) else None


def check_evaluation(evaluation: Record, path: Path) -> None:
    """RnasError unless `evaluation` has what the page and comparisons show of it, in the right form."""
    attacks = evaluation.get("attacks")
    if not isinstance(attacks, dict) or not all(isinstance(v, dict) for v in attacks.values()):
        raise RnasError(f"{path} is damaged: expected an object 'attacks' with one object for each attack")
    if not isinstance(evaluation.get("clean"), dict):
        raise RnasError(f"{path} is damaged: expected an object 'clean'")
    for name, entry in (("clean", evaluation["clean"]), *attacks.items(), ("union", evaluation.get("union", {}))):
        where = f"{path}, {name}"
        if not isinstance(entry, dict):
            raise RnasError(f"{where} is {entry!r}: expected an object with an accuracy")
        if number(entry, "seconds", where=where) is None and entry.get("seconds") is not None:
            raise RnasError(f"{where}: seconds is {entry['seconds']}: expected a finite number")
        interval = entry.get("interval", [])
        if not isinstance(interval, list) or len(interval) not in (0, 2):
            raise RnasError(f"{where}: interval is {interval!r}: expected two numbers")
        accuracy = number(entry, "accuracy", where=where)
        for share in (*interval, *([] if accuracy is None else [accuracy])):
            if type(share) not in (int, float) or not -1e-9 <= share <= 1 + 1e-9:
                raise RnasError(f"{where}: {share!r} is no accuracy: expected a number from 0 to 1")
    chance = number(evaluation, "chance", where=str(path))
    if evaluation.get("chance") is not None and (chance is None or not 0 < chance <= 1):
        raise RnasError(f"{path}: chance is {evaluation['chance']}: expected a share, above 0 and at most 1")
    for key in ("n", "eps"):
        value = number(evaluation, key, where=str(path))
        if evaluation.get(key) is not None and (value is None or not 0 <= value < 1e15):
            raise RnasError(f"{path}: {key} is {evaluation[key]}: expected a number that is possible")
    if not isinstance(evaluation.get("warnings", []), list):
        raise RnasError(f"{path} is damaged: expected a list of warnings")
