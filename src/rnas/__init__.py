"""rnas searches, trains, attacks and explains robust convolutional networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rnas import attacks
    from rnas.attacks.norms import Norm
    from rnas.compute.freezing import Model
    from rnas.console import Console
    from rnas.evaluation.evaluate import load
    from rnas.evaluation.result import Result
    from rnas.genotype import Architecture, Genotype
    from rnas.nets.zoo import build
    from rnas.vulnerability import network_vulnerability

__version__ = "0.1.0"
__all__ = [
    "Genotype",
    "attack",
    "attacks",
    "build",
    "evaluate",
    "load",
    "network_vulnerability",
    "search",
    "train",
]

_HOMES = {
    "Genotype": "rnas.genotype",
    "build": "rnas.nets.zoo",
    "load": "rnas.evaluation.evaluate",
    "network_vulnerability": "rnas.vulnerability",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import rnas` alone does not load torch."""
    if name == "attacks":
        return import_module("rnas.attacks")
    if name not in _HOMES:
        raise AttributeError(f"module 'rnas' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


# What the command line does, from Python: keyword arguments are named as the flags, with _ for -. RnasError for bad
# input, before anything is written. Without `out` nothing stays on the disk.


def search(
    data: str | Path = "digits",
    *,
    out: str | Path | None = None,
    method: str | Path = "rnas",
    verbose: bool = False,
    **flags: Any,
) -> Architecture:
    """Search an architecture on `data`: `rnas.search("digits", epochs=5, bound="0.5x", cells=5)`.

    The flags are those of `rnas search` and of the `method`. `verbose` prints what the command line would.
    """
    from rnas.nas.methods import check_has, load
    from rnas.nas.search import search
    from rnas.planning.forecast import announce_search
    from rnas.settings import from_flags

    kind = load(str(method)).settings
    for flag in flags:
        check_has(kind, flag)
    console = _console(verbose)
    with _folder(out) as folder:
        settings = from_flags(kind, {"data": data, "out": folder, "method": method, **flags})
        return search(settings, console, announce=partial(announce_search, settings, console))


def train(
    arch: str | Path | Architecture,
    *,
    data: str | Path = "digits",
    out: str | Path | None = None,
    verbose: bool = False,
    **flags: Any,
) -> nn.Module:
    """Train a network on `data`, adversarially by default: `rnas.train("RNAS-L", data="cifar10", epochs=40)`.

    `arch` is a name of the zoo, what `search` returned, a genotype.json, or the folder of a search; the flags are those
    of `rnas train`. Returns the network in eval mode.
    """
    from rnas.files import write_json
    from rnas.planning.effects import check_effect
    from rnas.planning.forecast import announce_train
    from rnas.records.layout import GENOTYPE
    from rnas.settings import Train, from_flags
    from rnas.training.train import train

    console = _console(verbose)
    with _folder(out) as folder, _folder(None) as found:
        if not isinstance(arch, str | Path):
            write_json(found / GENOTYPE, arch.to_json())
            arch = found
        settings = from_flags(Train, {"arch": arch, "data": data, "out": folder, **flags})
        check_effect(settings)
        return train(settings, console, partial(announce_train, settings, console))


def evaluate(
    model: str | Path | Model,
    x: Tensor | None = None,
    y: Tensor | None = None,
    attacks: Sequence[str] = ("fgsm", "pgd20", "pgd100", "cw"),
    eps: float | None = None,
    *,
    verbose: bool = False,
    **flags: Any,
) -> Result:
    """Attack a network, and say how far its accuracies can be trusted.

        rnas.evaluate(model, x, y, attacks=["pgd20", "aa"], eps=8/255, seed=0)
        rnas.evaluate(model, data="cifar10", limit=1000)
        rnas.evaluate("runs/t", limit=1000)

    `model` is any callable from images (N,3,H,W) in [0,1] to logits (N,classes), or the folder of a training. It is
    attacked on images `x` with labels `y` (N,), on the test images of `data`, or, of a folder, on those it was made
    for. The flags are those of `rnas evaluate`, of a folder all of them; images `x` also take `state` and `progress`
    (`rnas.evaluation.evaluate.evaluate`).
    """
    from rnas.errors import RnasError
    from rnas.evaluation import evaluate as evaluation
    from rnas.settings import Evaluate, check_known, from_flags

    console, given = _console(verbose), {**flags, "attacks": attacks, **({} if eps is None else {"eps": eps})}
    if x is not None:
        check_known(flags, ("norm", "seed", "batch_size", "state", "progress"))
        if y is None:
            raise RnasError("there are images x without their labels y")
        net = evaluation.load(model) if isinstance(model, str | Path) else model
        with evaluation.shown(console, "the model", len(y)) as progress:
            return evaluation.evaluate(net, x, y, **{"progress": progress, **given})
    if isinstance(model, str | Path):
        with _folder(given.pop("out", None)) as folder:
            return evaluation.evaluate_run(from_flags(Evaluate, {**given, "run": model, "out": folder}), console)
    check_known(flags, ("data", "image_size", "limit", "norm", "seed", "batch_size"))
    return evaluation.evaluate_data(model, from_flags(Evaluate, {**given, "run": Path()}), console)


def attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    name: str = "pgd20",
    eps: float = 8 / 255,
    norm: Norm = "linf",
    seed: int | None = None,
) -> Tensor:
    """Adversarial images (B,3,H,W) in [0,1] of images `x` with labels `y` (B,), by the attack called `name`.

    Names are those of `rnas evaluate --attacks`; `rnas.attacks` has the attacks with all their parameters. With a
    `seed` the same call has the same images.
    """
    from rnas.attacks import AutoAttack
    from rnas.evaluation.battery import attack_named

    chosen = AutoAttack(eps=eps, norm=norm, seed=seed) if name == "aa" else attack_named(name, eps, norm, seed)
    return chosen(model, x, y)


def _console(verbose: bool) -> Console:
    from rnas.console import Console

    return Console(quiet=not verbose)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """Where a run is written: `out`, or a folder that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="rnas-") as folder:
        yield Path(folder)
