"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnas.errors import unknown
from rnas.records.codec import encode
from rnas.records.evaluations import Mask
from rnas.records.schema import Evaluation


@dataclass(frozen=True)
class Result:
    """What an evaluation found; `masks` says per image whether it is still right."""

    evaluation: Evaluation
    masks: dict[str, Mask]

    @property
    def summary(self) -> dict[str, Any]:
        """The evaluation as evaluation.json has it."""
        found: dict[str, Any] = encode(self.evaluation)
        return found

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return self.evaluation.clean.accuracy

    def robust(self, attack: str) -> float:
        """Accuracy under `attack`. RnasError if that was not run."""
        if attack not in self.evaluation.attacks:
            raise unknown("attack of this evaluation", attack, self.evaluation.attacks)
        return self.evaluation.attacks[attack].accuracy
