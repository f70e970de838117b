"""Every setting of every command on one page; the defaults are the paper's (§5.1). No torch here.

Each command is a frozen dataclass: its fields are the flags of the command line and the keys of `settings.json`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from rnas.errors import RnasError, unknown
from rnas.genotype import OPERATIONS
from rnas.wording import apart

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
Reduction = Literal["mean", "sum"]
Features = Literal["raw", "standardized"]


def parse_fraction(text: str) -> float:
    """A number such as `8/255` or `0.03`. ValueError if `text` is neither."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{text}' is not a number: write 8/255 or 0.031") from None


def _value(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """How one value of an option is read, and what the help calls it."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: read(args[0]),
        is_instance=lambda value: True,  # the defaults are ours
        str_from_instance=lambda value: [f"{value:g}" if isinstance(value, float) else str(value)],
    )


# What an option without a number of its own does is said in its description: no "(default: None)" behind it.
_NO_DEFAULT = arg(help_behavior_hint="")
Flag = Annotated[bool, _NO_DEFAULT]
Count = Annotated[int | None, _value(int, "N"), _NO_DEFAULT]
Number = Annotated[float | None, _value(float, "NUMBER"), _NO_DEFAULT]
Text = Annotated[str | None, _value(str, "TEXT"), _NO_DEFAULT]
Folder = Annotated[Path | None, _value(Path, "PATH"), _NO_DEFAULT]
Names = Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]"), _NO_DEFAULT]
# Perturbation sizes are written as people say them: 8/255.
Size = Annotated[float | None, _value(parse_fraction, "N/255"), _NO_DEFAULT]
Runs = Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]"), _NO_DEFAULT]


def at_least(settings: Any, low: float, *names: str) -> None:
    """RnasError unless each of the `names` of `settings` is None, or finite and `low` or more."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value < math.inf:
            finite = "" if math.isfinite(value) else "a finite number, "
            raise RnasError(f"{name.replace('_', '-')} is {value}: expected {finite}{low:g} or more")


def _take_paths(settings: Any, *names: str) -> None:
    """Let the paths `names` of `settings` be given as strings, too."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            object.__setattr__(settings, name, Path(value))
        elif isinstance(value, list | tuple):
            object.__setattr__(settings, name, tuple(map(Path, value)))


def _take_names(settings: Any, *names: str) -> None:
    """Let what `settings` call by a string, a name or a path, be given as a path, too."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Path):
            object.__setattr__(settings, name, str(value))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise RnasError(f"seed is {seed}: expected 0 to {2**31 - 1}")


def _check_clip(clip: float) -> None:
    if not (math.isfinite(clip) and clip > 0):
        raise RnasError(f"clip is {clip}: expected a number above 0")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise RnasError(f"{name} is {value}: expected a number in [0, 1)")


@dataclass(frozen=True)
class SearchSpace:
    """The architectures that a search chooses from."""

    cells: int = 8
    """Cells of the network; those at a third and two thirds of the depth reduce."""
    channels: int = 16
    """Channels C of the first cell; each reduction doubles them."""
    nodes: int = 4
    """Intermediate nodes of a cell."""
    operations: tuple[str, ...] = OPERATIONS
    """Candidate operations of an edge, in the order of α's columns."""

    def __post_init__(self) -> None:
        at_least(self, 1, "cells", "channels", "nodes")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise unknown("operation", operation, OPERATIONS)
        if not set(self.operations) - {"none"} or len(set(self.operations)) < len(self.operations):
            raise RnasError("operations must name at least one operation besides 'none', each once")

    @property
    def edges(self) -> int:
        """Edges of a cell: each intermediate node has one from every node before it."""
        return self.nodes * (self.nodes + 3) // 2


@dataclass(frozen=True)
class Source:
    """Which images."""

    data: str = "digits"
    """digits, cifar10, cifar100, svhn, svhn-extra, tiny-imagenet, an .npz file, or a folder of class folders."""
    data_root: Folder = None
    """Where the named data sets lie or are downloaded to."""
    image_size: Count = None
    """Resize images to this many pixels square (needed for folders of mixed sizes)."""
    test_fraction: Number = None
    """Share of images kept for the test, for folders that have no train/ and test/."""
    limit_per_class: Count = None
    """Use only this many training images of each class: for quick runs."""

    def __post_init__(self) -> None:
        _take_paths(self, "data_root")
        _take_names(self, "data")
        at_least(self, 1, "limit_per_class")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise RnasError(f"test-fraction is {self.test_fraction}: expected a number between 0 and 1")


@dataclass(frozen=True)
class Perturbation:
    """The attack inside search and training: l_inf PGD."""

    eps: Size = None
    """Radius ε; by default 8/255, and 16/255 for digits."""
    step: Size = None
    """Step size; by default ε/4."""
    attack_steps: int = 7
    """Steps of PGD."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        at_least(self, 1, "attack_steps")
        if self.step is not None and not 0 < self.step <= 1:
            raise RnasError(f"step is {apart(self.step, 1.0)[0]}: expected a number in (0, 1], such as 2/255")


def _check_eps(eps: float | None, norm: str = "linf") -> None:
    if eps is not None and (not math.isfinite(eps) or eps <= 0 or (norm == "linf" and eps > 1)):
        room = "in (0, 1], such as 8/255" if norm == "linf" else "above 0, such as 0.5"
        raise RnasError(f"eps is {apart(eps, 1.0)[0]}: expected a number {room}")


@dataclass(frozen=True)
class Bound:
    """The upper bound H on the network vulnerability: absolute, or relative to F at the end of the warm-up."""

    value: float
    relative: bool

    @staticmethod
    def parse(text: str) -> Bound | None:
        """`1e-4`, `0.5x`, or `none` for a search without the constraint."""
        if text == "none":
            return None
        number = text[:-1] if text.endswith("x") else text
        try:
            value = float(number)
        except ValueError:
            raise RnasError(
                f"bound is '{text}': expected a number such as 1e-4, a share such as 0.5x, or none"
            ) from None
        if not math.isfinite(value) or value <= 0:
            raise RnasError(f"bound is '{text}': expected a number above 0, for every attack distorts some feature")
        return Bound(value, text.endswith("x"))


@dataclass(frozen=True)
class Search:
    """Search an architecture; --method NAME --help shows the settings of a method.

    For example:
        rnas search --data cifar10 --bound 0.5x --out runs/s
        rnas search --method darts --data photos/ --image-size 32 --out runs/s
    """

    out: Path
    """Folder of the run."""
    source: Source = field(default_factory=Source)
    space: SearchSpace = field(default_factory=SearchSpace)
    perturbation: Perturbation = field(default_factory=Perturbation)
    method: str = "rnas"
    """Search method, or the path of a file that holds one; --method NAME --help shows its settings."""
    epochs: int = 60
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a batch."""
    lr: float = 0.01
    """Learning rate of the weights at the start; it falls along a cosine."""
    lr_min: float = 0.0
    """Learning rate at the end."""
    momentum: float = 0.9
    """Momentum of the weights' SGD."""
    weight_decay: float = 3e-4
    """Weight decay of the weights."""
    clip: float = 5.0
    """Largest norm of the weights' gradient."""
    monitor: int = 256
    """Images of each half on which accuracies and F are measured after every epoch."""
    max_params: Count = None
    """Most parameters of a network that is trained of the found cells."""
    max_macs: Count = None
    """Most multiply-accumulates of that network for one image."""
    target_cells: int = 20
    """Cells of that network, for --max-params and --max-macs."""
    target_channels: int = 36
    """Channels of its first cell."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same run."""
    seeds: Count = None
    """Make N searches with seeds from --seed on, in OUT/seed-0 and so on, and compare them in OUT/seeds.json."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""
    precision: Precision = "auto"
    """Number format of the network's passes: float32 (auto, fp32), or bfloat16 by autocast, for GPUs."""
    save_memory: Flag = False
    """Keep only the cells' outputs for the backward pass: a fraction of the memory, about a third more time."""
    resume: Flag = False
    """Continue the run in this folder (or start it, if there is none). --resume RUN alone takes the settings of RUN."""

    fewest_epochs: ClassVar[int] = 1
    """0 for a method that can do without a supernet."""

    def __post_init__(self) -> None:
        _take_paths(self, "out")
        _check_seed(self.seed)
        _check_seed(self.seed + (self.seeds or 1) - 1)
        _check_clip(self.clip)
        at_least(self, self.fewest_epochs, "epochs")
        at_least(self, 1, "batch_size", "monitor", "max_params", "max_macs", "target_cells", "target_channels", "seeds")
        _check_share("momentum", self.momentum)
        at_least(self, 0, "lr", "lr_min", "weight_decay")


@dataclass(frozen=True)
class Train:
    """Train a network: adversarially (AT), or with --standard on clean images (ST).

    For example:
        rnas train runs/s --data cifar10 --out runs/t
        rnas train ResNet18 --data cifar10 --epochs 100 --loss trades --out runs/r
    """

    arch: Positional[Annotated[str, arg(metavar="ARCH")]]
    """A zoo name (RNAS-L, ResNet18, …), a genotype.json, or the folder of a search."""
    out: Path
    """Folder of the run."""
    source: Source = field(default_factory=Source)
    perturbation: Perturbation = field(default_factory=Perturbation)
    standard: Flag = False
    """Train on clean images (ST) instead of adversarial ones (AT)."""
    loss: Literal["pgd", "trades"] = "pgd"
    """Adversarial loss: cross-entropy on PGD images (Madry et al. 2018), or TRADES (Zhang et al. 2019)."""
    trades_beta: float = 6.0
    """Weight of TRADES's KL term."""
    cells: int = 20
    """Cells of a cell network."""
    channels: int = 36
    """Channels C of a cell network's first cell."""
    stem_stride: Literal[1, 2] = 1
    """2: a cell network's first convolution halves the image, so that 64 pixels cost what 32 do."""
    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a batch."""
    lr: float = 0.1
    """Learning rate at the start; it falls to 0 along a cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 3e-4
    """Weight decay of SGD."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    drop_path: float = 0.3
    """Drop-path probability of cell networks at the end; it rises from 0."""
    augment: Flag = True
    """Train on the images as they are; by default they are cropped at random (padding 4 at 32 pixels) and, where that
    makes sense, flipped."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same run."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""
    precision: Precision = "auto"
    """Number format of the network's passes: float32 (auto, fp32), or bfloat16 by autocast, for GPUs."""
    save_memory: Flag = False
    """For cell networks: keep only the cells' outputs for the backward pass; less memory, more time."""
    resume: Flag = False
    """Continue the run in this folder (or start it, if there is none). --resume RUN alone takes the settings of RUN."""

    def __post_init__(self) -> None:
        _take_paths(self, "out")
        _take_names(self, "arch")
        _check_seed(self.seed)
        _check_clip(self.clip)
        at_least(self, 1, "cells", "channels", "epochs", "batch_size")
        at_least(self, 0, "lr", "weight_decay", "trades_beta")
        _check_share("drop-path", self.drop_path)
        _check_share("momentum", self.momentum)


PAPER_ATTACKS = ("fgsm", "pgd20", "pgd100", "cw")


@dataclass(frozen=True)
class Evaluate:
    """Attack a trained network on test images.

    Writes evaluation.json and masks.npz into its folder.

    For example:
        rnas evaluate runs/t --attacks fgsm pgd20 aa
        rnas evaluate runs/t --eps 4/255 --limit 1000
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a training run."""
    attacks: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")] = PAPER_ATTACKS
    """fgsm, pgd20, pgd100 (any pgdN, pgdN-any), cw, cw-l2, aa, apgd-ce, apgd-dlr, apgd-margin, apgd-t, fab-t,
    square."""
    eps: Size = None
    """Radius ε; by default 8/255 (l_inf; 16/255 for digits) or 0.5 (l2)."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    limit: Count = None
    """Attack only N test images, of every class its share."""
    data: Text = None
    """Other images than the network was trained on (same classes); of a folder, test/CLASS/* or CLASS/*."""
    image_size: Count = None
    """Side to which the images of --data are scaled, in pixels; by default to what the network was trained at."""
    batch_size: int = 256
    """Images in a batch; it changes no result."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same run."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""
    resume: Flag = False
    """Continue an evaluation that was cut off."""
    out: Folder = None
    """Folder for the results, by default the run's: for runs that one may only read."""

    def __post_init__(self) -> None:
        _take_paths(self, "run")
        _take_names(self, "data")
        _check_eps(self.eps, self.norm)
        _check_seed(self.seed)
        at_least(self, 1, "limit", "batch_size")
        if self.image_size is not None and self.data is None:
            raise RnasError("image-size is for the images of --data: the network's own have its size")
        if not self.attacks:
            raise RnasError(f"attacks is empty: name some, such as {' '.join(PAPER_ATTACKS)}")


@dataclass(frozen=True)
class Distortion:
    """Measure how far an attack moves the features of every layer (Fig. 3).

    Feature maps are drawn, too (Fig. 2).

    For example:
        rnas distortion runs/t --out distortion
        rnas distortion VGG16 --data cifar10 --limit 64 --out distortion
    """

    networks: Positional[Annotated[tuple[str, ...], arg(metavar="NETWORK [NETWORK ...]"), _NO_DEFAULT]]
    """Folders of training runs, or architectures (untrained): a zoo name, a genotype.json, the folder of a search."""
    out: Path
    """Folder for distortion.json, features.npz and the figures."""
    data: Text = None
    """Images, as for the other commands; by default those that the run was trained on. Test images are used."""
    data_root: Folder = None
    """Where the named data sets lie or are downloaded to."""
    image_size: Count = None
    """Side to which the images are scaled, in pixels; by default to what a run was trained at."""
    test_fraction: Number = None
    """Share of images to measure an untrained network on, for folders that have no train/ and test/."""
    layers: Names = None
    """Layers to measure; by default VGG16's convolutions, ResNet18's blocks, the cells of cell networks."""
    eps: Size = None
    """Radius ε; by default 8/255, and 16/255 for digits."""
    attack_steps: int = 20
    """Steps of PGD, of size ε/4."""
    limit: int = 256
    """Measure on the first N test images."""
    channels_shown: int = 8
    """Channels of a layer whose feature maps are drawn: those that vary most."""
    reduction: Reduction = "mean"
    """KL over the positions of a channel: mean (divided by H·W) or sum (nats)."""
    features: Features = "raw"
    """Features as they are, or brought to zero mean and unit variance per channel."""
    cells: int = 20
    """Cells of an untrained cell network."""
    channels: int = 36
    """Channels C of an untrained cell network."""
    batch_size: int = 64
    """Images in a batch."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same run."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _take_paths(self, "out", "data_root")
        _take_names(self, "data")
        _check_eps(self.eps)
        _check_seed(self.seed)
        at_least(self, 1, "attack_steps", "limit", "channels_shown", "cells", "channels", "batch_size")
        if self.layers is not None and not self.layers:
            raise RnasError("layers is empty: name some, or leave it out for the usual ones")


PAPER_RESULTS = (*(f"table{i}" for i in range(1, 6)), *(f"fig{i}" for i in range(1, 6)))


@dataclass(frozen=True)
class Reproduce:
    """Reproduce a table or a figure of the paper.

    Searches, trains and evaluates what is missing, then writes it.

    For example:
        rnas reproduce table1 --budget hour --out results --plan
        rnas reproduce fig5 --budget smoke --data digits --out results
    """

    what: Positional[Annotated[str, arg(metavar="WHAT")]]
    """table1 to table5, fig1 to fig5."""
    out: Path
    """Folder of all runs and results; tables and figures that share it share their runs."""
    budget: Literal["paper", "day", "hour", "smoke"]
    """How much work: paper is exactly §5.1; the others cut it and say what they cut."""
    data: Text = None
    """Images in place of the paper's: the path of an .npz, a folder, or a named set."""
    data_root: Folder = None
    """Where the named data sets lie or are downloaded to."""
    data_note: Text = None
    """A note on the images for the caption, such as "lossy: JPEG quality 75"."""
    seeds: int = 1
    """Train (and search) with seeds 0 to N-1."""
    only: Names = None
    """Run only these architectures; the others stay empty."""
    bounds: tuple[str, ...] = ("1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
    """The bounds H of Fig. 5: at 1e-4 and 1e-5 stand the published RNAS-H and RNAS-L, at the others new searches."""
    plan: Flag = False
    """Only print the runs and what they are estimated to cost."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _take_paths(self, "out", "data_root")
        _take_names(self, "data")
        if self.what not in PAPER_RESULTS:
            raise unknown("table or figure", self.what, PAPER_RESULTS)
        at_least(self, 1, "seeds")
        for bound in self.bounds:
            Bound.parse(bound)


@dataclass(frozen=True)
class Report:
    """Put one or more runs on one HTML page, which works offline.

    For example:
        rnas report runs/demo --out report.html
        rnas report runs/s runs/t --out report.html
    """

    runs: Positional[Runs]
    """Folders of runs."""
    out: Path = Path("report.html")
    """The page to write."""

    def __post_init__(self) -> None:
        _take_paths(self, "runs", "out")


@dataclass(frozen=True)
class Run:
    """The whole pipeline: search, train, evaluate, report.

    Without options: the digits demo, a few minutes.

    For example:
        rnas run
        rnas run --data path/to/images --minutes 60 --out runs/mine
    """

    source: Source = field(default_factory=Source)
    out: Path = Path("runs/demo")
    """Folder of the run; holds search/, train/ and report.html at the end."""
    bound: Text = None
    """H of the search, as for rnas search; by default 0.5x (half of F after the warm-up), with --budget paper 1e-4."""
    budget: Literal["auto", "demo", "small", "paper"] = "auto"
    """How much work: auto is demo for digits and otherwise what fits --minutes; paper is §5.1 (days on a GPU)."""
    minutes: Number = None
    """Choose the work so that the run takes about so long on this machine; by default 20 (not for digits)."""
    cells: Count = None
    """Cells of the trained network; by default the budget's."""
    channels: Count = None
    """Channels C of search and training; by default the budget's."""
    search_epochs: Count = None
    """Epochs of the search; by default the budget's."""
    train_epochs: Count = None
    """Epochs of the training; by default the budget's."""
    batch_size: Count = None
    """Images in a batch of search and training; by default the budget's."""
    attacks: Names = None
    """Attacks of the evaluation, named as for rnas evaluate; by default fgsm pgd20 cw."""
    limit: Count = None
    """Attack only N test images, of every class its share."""
    eps: Size = None
    """Radius ε in training and evaluation; by default 8/255, and 16/255 for digits."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same run."""
    device: Device = "auto"
    """Where to compute: auto takes a GPU if there is one."""
    precision: Precision = "auto"
    """Number format of search and training: float32 (auto, fp32), or bfloat16 by autocast, for GPUs."""
    save_memory: Flag = False
    """Search and train in less memory and more time."""
    yes: Flag = False
    """Start without asking, also where the run will take much longer than --minutes."""
    resume: Flag = False
    """Continue the run in this folder (or start it, if there is none). --resume RUN alone takes the settings of RUN."""

    def __post_init__(self) -> None:
        _take_paths(self, "out")
        _check_eps(self.eps)
        _check_seed(self.seed)
        if self.bound is not None:
            Bound.parse(self.bound)
        at_least(self, 1, "minutes", "cells", "channels", "search_epochs", "train_epochs", "batch_size", "limit")
        if self.minutes is not None and self.budget != "auto":
            raise RnasError(
                f"minutes is {self.minutes:g}, but the work of budget {self.budget} is fixed: leave out one"
            )


@dataclass(frozen=True)
class Compare:
    """Is one network more robust than another?

    A paired comparison of evaluations on the same images.

    For example:
        rnas compare runs/t runs/u
        rnas compare runs/demo
    """

    runs: Positional[Runs]
    """Folders of two or more evaluated runs."""
    json: Flag = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        _take_paths(self, "runs")


@dataclass(frozen=True)
class Data:
    """Download a data set, or verify the one that is there, and print its counts.

    For example:
        rnas data cifar10
    """

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """digits, cifar10, cifar100, svhn, svhn-extra or tiny-imagenet."""
    data_root: Folder = None
    """Folder that holds the data sets, or that they are downloaded to; by default RNAS_DATA or a cache folder."""
    mirror: Text = None
    """Address of a folder that holds the official files, instead of their home."""
    json: Flag = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        _take_paths(self, "data_root")


@dataclass(frozen=True)
class Zoo:
    """List every architecture: parameters and multiply-accumulates.

    Both are measured; beside them stand the paper's figures.

    For example:
        rnas zoo
        rnas zoo --markdown
    """

    json: Flag = False
    """Print JSON instead of a table."""
    markdown: Flag = False
    """Print a Markdown table."""

    def __post_init__(self) -> None:
        if self.json and self.markdown:
            raise RnasError("--json and --markdown are two forms of one table: choose one")


@dataclass(frozen=True)
class Export:
    """Write a trained network as a file to deploy, checked against the network.

    For example:
        rnas export runs/t --out model.onnx
        rnas export runs/t --format torchscript --out model.pt
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a training run."""
    out: Path
    """The file to write."""
    format: Literal["onnx", "torchscript"] = "onnx"
    """Format of the file; onnx needs the packages of rnas[export]."""

    def __post_init__(self) -> None:
        _take_paths(self, "run", "out")


# Where, when and in how much memory a run happens does not make it another run. What precision it computes in does, and
# is among the facts of search and training (`Run.open`), because `auto` is no precision.
NOT_IDENTITY = ("out", "resume", "device", "save_memory", "precision", "yes", "seeds")

LATER = {"bound_on": "supernet", "projection_cap": None}
"""What settings mean that a run of version 0.1.0 does not name; with these values it is the same run."""


def identity(settings: Any) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON values: two runs with equal ones are the same run."""
    plain = {k: _plain(v) for k, v in asdict(settings).items() if k not in NOT_IDENTITY}
    if plain.get("max_params") is None and plain.get("max_macs") is None:  # then nothing depends on the target's size
        plain = {
            k: v for k, v in plain.items() if k not in ("max_params", "max_macs", "target_cells", "target_channels")
        }
    plain = {k: v for k, v in plain.items() if k not in LATER or v != LATER[k]}
    source = plain.get("source")
    if source and ("/" in source["data"] or source["data"].endswith(".npz") or Path(source["data"]).is_dir()):
        source["data"] = str(Path(source["data"]).expanduser().resolve())  # the run may be read from another folder
    if source and source["data_root"]:
        source["data_root"] = str(Path(source["data_root"]).expanduser().resolve())
    return plain


def from_json(kind: type[Any], plain: dict[str, Any]) -> Any:
    """The settings of the class `kind` that `plain` says, as settings.json has them: what it lacks has its default, and
    what else it says is no setting. TypeError, ValueError or RnasError if a value does not fit."""
    given = {}
    for name, annotation in get_type_hints(kind).items():
        if name in plain:
            given[name] = _typed(annotation, plain[name], name)
    return kind(**given)


def _typed(annotation: Any, value: Any, name: str) -> Any:
    """`value`, from JSON, as what a field of the type `annotation` holds."""
    if is_dataclass(annotation) and isinstance(value, dict):
        return from_json(cast("type[Any]", annotation), value)
    kinds = _kinds(annotation)
    if value is None and type(None) in kinds:
        return None
    if get_origin(annotation) is Literal:
        fits = value in kinds
    elif Path in kinds:
        return Path(value)
    elif isinstance(value, list):
        value, fits = tuple(value), _holds_names(kinds) and all(isinstance(v, str) for v in value)
    else:
        fits = type(value) in kinds or (type(value) is int and float in kinds and abs(value) <= sys.float_info.max)
    if not fits:
        raise ValueError(f"{name} is {value!r}")
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types, or the values, that a field of the type `annotation` may have."""
    return (annotation,) if get_origin(annotation) is tuple else get_args(annotation) or (annotation,)


def _holds_names(kinds: tuple[Any, ...]) -> bool:
    return any(get_origin(kind) is tuple for kind in kinds)


def flag_names(kind: type[Any]) -> list[str]:
    """The names of all settings of the class `kind`, those within settings too."""
    hints, names = get_type_hints(kind), []
    for f in fields(kind):
        names += flag_names(hints[f.name]) if is_dataclass(hints[f.name]) else [f.name]
    return names


def from_flags(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """The settings of the class `kind` that Python's keyword arguments `given` spell out: named as the flags, with
    numbers as numbers or as on the command line ("8/255"). RnasError for a name or a value that cannot be."""
    check_known(given, flag_names(kind))
    return _of_flags(kind, given)


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """RnasError, with the nearest names, for a setting that is not among the `known`."""
    for name in given:
        if name not in known:
            raise unknown("setting", name, known)


def _of_flags(kind: type[Any], given: Mapping[str, Any]) -> Any:
    values = {}
    for name, annotation in get_type_hints(kind).items():
        if is_dataclass(annotation):
            values[name] = _of_flags(cast("type[Any]", annotation), given)
        elif name in given:
            try:
                values[name] = _typed(annotation, _as_written(annotation, given[name]), name)
            except (TypeError, ValueError) as e:
                raise RnasError(f"{name.replace('_', '-')} is {given[name]!r}: expected {_expected(annotation)}") from e
    return kind(**values)


def _as_written(annotation: Any, value: Any) -> Any:
    """`value` as JSON would have it: names may be given as paths, bounds as numbers, numbers as fractions."""
    kinds = _kinds(annotation)
    if isinstance(value, str) and float in kinds:
        return parse_fraction(value)
    if type(value) in (int, float) and str in kinds:
        return f"{value:g}"
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _expected(annotation: Any) -> str:
    """What a field of the type `annotation` takes, for people."""
    kinds = _kinds(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, kinds))
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return "a list of names" if _holds_names(kinds) else next(words[kind] for kind in words if kind in kinds)


def flags(settings: Any) -> list[str]:
    """The options that make `settings` of the defaults, as they are written on a command line."""
    words = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        option = f"--{f.name.replace('_', '-')}"
        if is_dataclass(value):
            words += flags(value)
        elif value == f.default:
            continue
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, *map(str, value)] if isinstance(value, tuple) else [option, str(value)]
    return words


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
