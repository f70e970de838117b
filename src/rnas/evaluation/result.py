"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnas.errors import unknown
from rnas.records.evaluations import (
    Mask,
)


@dataclass(frozen=True)
class Result:
    """What an evaluation found: `summary` is evaluation.json, `masks` says per image whether it is still right."""

    summary: dict[str, Any]
    masks: dict[str, Mask]

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return float(self.summary["clean"]["accuracy"])

    def robust(self, attack: str) -> float:
        """Accuracy under `attack`. RnasError if that was not run."""
        if attack not in self.summary["attacks"]:
            raise unknown("attack of this evaluation", attack, self.summary["attacks"])
        return float(self.summary["attacks"][attack]["accuracy"])
