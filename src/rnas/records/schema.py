"""The content of every JSON file of a run folder, each as a frozen dataclass that `records.codec` reads and writes.

The files are named in `records.layout`. Two have their classes where they are used: settings.json holds the settings of
a command (`rnas.settings`), genotype.json an architecture (`rnas.genotype`).

A field with a default may be missing: files of earlier versions lack it, or it does not apply. Records that are read by
people and by later versions keep unknown keys; those that only steer a run (budget.json, throughput.json, .writer.json)
refuse them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rnas.genotype import Architecture
from rnas.records import layout
from rnas.records.codec import Check, Record

Share = Annotated[float, Check(lambda v: -1e-9 <= v <= 1 + 1e-9, "a number from 0 to 1")]
Positive = Annotated[float, Check(lambda v: v > 0, "a number above 0")]
Distance = Annotated[float, Check(lambda v: 0 <= v < 1e15, "a number, 0 or more")]
Count = Annotated[int, Check(lambda v: 0 <= v < 10**15, "a count")]
Natural = Annotated[int, Check(lambda v: 1 <= v < 10**15, "an integer above 0")]
Names = Annotated[
    tuple[str, ...], Check(lambda v: len(v) >= 2 and len({*v}) == len(v), "two or more different class names")
]


def _at_most(most: int) -> Check:
    """What a damaged model.json could ask for beyond `most` would take the machine's memory first."""
    return Check(lambda v: v <= most, f"an integer up to {most}")


Side = Annotated[int, _at_most(10_000)]


# --- model.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description(Record):
    """How to build a trained network again."""

    arch: str
    """A name of the zoo, "genotype", or `package.module:function`."""
    classes: Names
    image_size: tuple[Side, Side]
    """Height, width."""
    genotype: Architecture | None = None
    """If arch is "genotype"."""
    cells: Annotated[int, _at_most(1000)] | None = None
    channels: Annotated[int, _at_most(10_000)] | None = None
    stem_stride: Annotated[int, _at_most(2)] | None = None
    auxiliary: bool | None = None
    mean: Annotated[tuple[float, ...], Check(lambda v: len(v) == 3, "three numbers")] | None = None
    """Of red, green and blue, as `std`; not of what a function builds, which normalises by itself."""
    std: Annotated[tuple[Positive, ...], Check(lambda v: len(v) == 3, "three positive numbers")] | None = None
    dataset: str | None = None
    parameters: Count | None = None
    weights: str | None = None
    """SHA-256 of model.safetensors."""


# --- evaluation.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure(Record):
    """An accuracy."""

    accuracy: Share
    interval: tuple[Share, Share] | None = None
    """Wilson's, at 95 %."""
    seconds: Distance | None = None
    """That the attack took."""


@dataclass(frozen=True)
class NetworkVulnerability(Record):
    """F of a trained network: the mean over its layers, Eq. 6."""

    value: Distance
    interval: tuple[Distance, Distance]
    """Of the mean over images: bootstrap, at 95 %."""
    n: Count
    """Images."""
    attack: str
    layers: Count
    """How many; of a cell network its cells."""


@dataclass(frozen=True)
class Evaluation(Record):
    """What attacks made of a network's answers; the verdict on every image lies in masks.npz."""

    eps: Distance
    norm: str
    n: Count
    """Images."""
    clean: Figure
    attacks: dict[str, Figure]
    seed: int | None = None
    images_sha256: str | None = None
    chance: Annotated[float, Check(lambda v: 0 < v <= 1, "a number above 0, up to 1")] | None = None
    """The accuracy of always answering the largest class."""
    warnings: tuple[str, ...] = ()
    union: Figure | None = None
    """Under all attacks that ε bounds together."""
    vulnerability: NetworkVulnerability | None = None
    """Of feature maps, for networks that have such."""
    limit: int | None = None
    data: str | None = None
    """Images that were asked for with --data, in place of the network's own."""
    dataset: str | None = None
    model: str | None = None
    weights: str | None = None
    """SHA-256 of the network's weights."""

    def figure(self, name: str) -> Figure | None:
        """That of an attack, of "clean" or of "union", if it is here."""
        if name in ("clean", "union"):
            return self.clean if name == "clean" else self.union
        return self.attacks.get(name)


# --- distortion.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDistortion(Record):
    """How far an attack moves the features of each layer."""

    layers: Annotated[tuple[str, ...], Check(bool, "the names of one layer or more")]
    vulnerability: tuple[float, ...]
    """One for each layer."""
    modules: tuple[str, ...] | None = None
    reduction: str | None = None
    features: str | None = None
    eps: Distance | None = None
    norm: str = "linf"
    n: Count | None = None
    attack: str | None = None
    seed: int | None = None
    dataset: str | None = None
    model: str | None = None
    run: str | None = None
    trained: bool = False
    standard: bool | None = None


# --- environment.json -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment(Record):
    """What a run depends on besides its settings."""

    command: str
    python: str | None = None
    versions: dict[str, str] | None = None
    platform: str | None = None
    cpus: int | None = None
    device: str | None = None
    commit: str | None = None
    seed: int | None = None


# --- log.jsonl ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Performance(Record):
    """What a network answers on some images."""

    clean_loss: float | None = None
    clean_accuracy: Share | None = None
    adversarial_loss: float | None = None
    adversarial_accuracy: Share | None = None


@dataclass(frozen=True)
class Epoch(Record):
    """An event "epoch"."""

    epoch: Natural
    train: Performance = Performance()
    """On images that train the weights."""
    lr: float | None = None
    seconds: Distance | None = None
    images_per_second: Distance | None = None


@dataclass(frozen=True)
class TrainEpoch(Epoch):
    """An epoch of a training."""

    loss: float | None = None
    drop_path: float | None = None


@dataclass(frozen=True)
class SearchEpoch(Epoch):
    """An epoch of a search; what only one method tells is kept in `more`."""

    phase: str | None = None
    theta_loss: float | None = None
    alpha_loss: float | None = None
    val: Performance = Performance()
    """On images that train the architecture."""
    chance: Share | None = None
    at_chance: bool | None = None
    F: float | None = None
    """Network vulnerability, of what the bound binds."""
    F_supernet: float | None = None
    F_without_none: float | None = None
    F_cell: float | None = None
    """By the readings of `rnas.nas.readings`."""
    F_before: float | None = None
    F_smallest: float | None = None
    """In the projection: at its beginning, the smallest."""
    H: float | None = None
    multiplier: float | None = None
    distance: float | None = None
    projection_steps: int | None = None
    projection_end: str | None = None
    none_share: Share | None = None
    genotype: Architecture | None = None


@dataclass(frozen=True)
class Warned(Record):
    """An event "warning"."""

    message: str


@dataclass(frozen=True)
class Candidate(Record):
    """An event "candidate": one of the architectures that a search by samples compares."""

    round: str
    """Of the phase: which comparison of candidates this is."""
    number: Count
    score: float
    """Higher is better."""
    candidate: Any = None


# --- what steers a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """.writer.json: the process that holds a run folder."""

    pid: int
    host: str
    since: str


@dataclass(frozen=True)
class Verdicts:
    """attacks.json: what an evaluation that is under way knows so far."""

    identity: dict[str, Any]
    """What tells it from others."""
    verdicts: dict[str, str]
    """For every attack a character for each image."""
    seconds: dict[str, str]
    """For every attack a number for each image, with blanks between."""


@dataclass(frozen=True)
class Speed:
    """In throughput.json under the name of what was timed: seconds for one image."""

    gradient: Distance
    """To differentiate a frozen network for its input."""
    weights: Distance
    """To train the network's weights on it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """budget.json: what was chosen for a run."""

    search_side: Natural | None = None
    """Pixels to which the search's images are scaled; None: as they are."""
    search_per_class: Natural | None = None
    """Training images of each class that the search sees; None: all."""
    search_cells: Natural
    search_channels: Natural
    search_epochs: Natural
    train_cells: Natural
    train_channels: Natural
    stem_stride: Natural
    train_epochs: Natural
    batch_size: Natural
    attacked: Natural
    """Test images."""
    threads: Natural
    """Of torch on a CPU."""
    seconds: Natural
    """That it should take."""


FORMATS: dict[str, Any] = {
    layout.META: Description,
    layout.EVALUATION: Evaluation,
    layout.DISTORTION: LayerDistortion,
    layout.ENVIRONMENT: Environment,
    layout.WRITER: Writer,
    layout.VERDICTS: Verdicts,
    layout.FITTED: Work,
    layout.THROUGHPUT: dict[str, Speed],
}
"""The class of every JSON file that is one record."""
EVENTS: dict[str, type[Any]] = {"warning": Warned, "candidate": Candidate}
"""The class of every event of log.jsonl besides epochs, which are a `SearchEpoch` or a `TrainEpoch`."""
