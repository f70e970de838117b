"""Entry points for torch.hub, one for each architecture that can be built, and `load` for a trained network:

    torch.hub.load("path/of/a/clone", "rnas_l", source="local", classes=10)

They take the arguments of `rnas.nets.zoo.build`. Networks come untrained: no weights are published.
"""

import functools as _functools
import sys as _sys
from pathlib import Path as _Path

_sys.path.insert(0, str(_Path(__file__).parent / "src"))  # a clone need not be installed

from rnas import published as _paper
from rnas.nets import saved
from rnas.nets import zoo as _zoo

dependencies = ["torch", "numpy", "safetensors", "tyro"]


def load(folder):
    """The trained network in `folder` (what `rnas train` writes), in eval mode; images (B,3,H,W) in [0,1]."""
    return saved.load_model(_Path(folder))[0]


for _name, _published in _paper.architectures().items():
    if _published.source is not None:
        _entry = _functools.partial(_zoo.build, _name)
        _entry.__doc__ = f"{_name} ({_published.year}), untrained. {_zoo.build.__doc__}"
        globals()[_name.lower().replace("-", "_")] = _entry
