"""What each budget changes in the paper's settings (§5.1), and how a caption says so. No torch."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rnas.nas.methods.rnas import Settings as Search
from rnas.settings import Distortion, Evaluate, SearchSpace, Source, Train

Changes = dict[str, dict[str, Any]]

BUDGETS: dict[str, Changes] = {
    "paper": {"distortion": {"limit": 1000}},
    "day": {  # Table 1 in about a day of one large GPU
        "search": {"epochs": 20},
        "train": {"epochs": 30, "drop_path": 0.0},
        "evaluate": {"limit": 1000},
        "distortion": {"limit": 1000},
    },
    "hour": {
        "source": {"limit_per_class": 500},
        "space": {"cells": 5},
        "search": {"epochs": 8, "batch_size": 64},
        "train": {"epochs": 8, "cells": 8, "channels": 16, "batch_size": 64, "drop_path": 0.0},
        "evaluate": {"limit": 256},
    },
    "smoke": {  # whether everything runs, on two cores: a few steps for each network, nobody learns much
        "source": {"limit_per_class": 10, "image_size": 16},
        "space": {"cells": 3, "channels": 4},
        "search": {"epochs": 2, "warmup": 1, "batch_size": 20, "monitor": 20, "projection_steps": 2},
        "train": {"epochs": 2, "cells": 3, "channels": 4, "batch_size": 10, "drop_path": 0.0},
        "evaluate": {"limit": 16},
        "distortion": {"limit": 16, "attack_steps": 5},
    },
}
_CLASSES: dict[str, type] = {
    "source": Source,
    "space": SearchSpace,
    "search": Search,
    "train": Train,
    "evaluate": Evaluate,
    "distortion": Distortion,
}
_WORDS = {
    ("source", "limit_per_class"): "training images of a class",
    ("source", "image_size"): "pixels a side",
    ("space", "cells"): "cells while searching",
    ("space", "channels"): "channels C while searching",
    ("search", "epochs"): "search epochs",
    ("search", "warmup"): "of them to warm up",
    ("search", "batch_size"): "images in a batch of the search",
    ("search", "monitor"): "images to measure F on",
    ("search", "projection_steps"): "steps of a projection at most",
    ("train", "epochs"): "training epochs",
    ("train", "cells"): "cells",
    ("train", "channels"): "channels C",
    ("train", "batch_size"): "images in a batch",
    ("train", "drop_path"): "drop-path",
    ("evaluate", "limit"): "test images",
    ("distortion", "attack_steps"): "steps of PGD",
}
_PAPER = {"limit_per_class": "all", "image_size": "the data set's own", "limit": "all"}
_PAPER |= {"warmup": "a quarter", "projection_steps": "half an epoch"}


def cuts(budget: str, parts: tuple[str, ...]) -> list[str]:
    """What `budget` changes in `parts` of the paper's settings: "8 training epochs instead of 600"."""
    return [
        f"{value} {_WORDS[part, name]} instead of {_PAPER.get(name, _default(_CLASSES[part], name))}"
        for part in parts
        for name, value in BUDGETS[budget].get(part, {}).items()
        if (part, name) in _WORDS
    ]


def _default(settings: type, name: str) -> Any:
    (default,) = (f.default for f in fields(settings) if f.name == name)
    assert default is not MISSING
    return default
