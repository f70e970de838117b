"""rnas searches, trains, attacks and explains robust convolutional networks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnas.evaluation.evaluate import evaluate, load
    from rnas.genotype import Genotype
    from rnas.nets.zoo import build
    from rnas.vulnerability import network_vulnerability

__version__ = "0.1.0"
__all__ = ["Genotype", "build", "evaluate", "load", "network_vulnerability"]

_HOMES = {
    "Genotype": "rnas.genotype",
    "build": "rnas.nets.zoo",
    "evaluate": "rnas.evaluation.evaluate",
    "load": "rnas.evaluation.evaluate",
    "network_vulnerability": "rnas.vulnerability",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import rnas` alone does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rnas' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
