"""Every architecture by its name. The facts about them (year, source, the paper's figures) are in `rnas.published`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rnas import published as paper
from rnas.errors import RnasError
from rnas.files import read_json
from rnas.genotype import Architecture, architecture_from_json
from rnas.nets import handmade
from rnas.nets.count import macs, parameters
from rnas.nets.derived import DerivedNetwork, ImageSize, check_count, check_image_size
from rnas.nets.handmade import Statistics
from rnas.records.layout import SETTINGS

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

# name -> (builder, the smallest image side it takes). Every other name has published cells.
HAND_MADE: dict[str, tuple[Callable[[int, Statistics, Statistics], nn.Module], int]] = {
    "VGG16": (handmade.vgg16, 16),
    "ResNet18": (handmade.resnet18, 8),
    "DenseNet121": (handmade.densenet121, 8),
    "MobileNetV2": (handmade.mobilenetv2, 8),
    "ShuffleNetV2": (handmade.shufflenetv2, 8),
    "SqueezeNet": (handmade.squeezenet, 8),
}


def names() -> list[str]:
    """Every architecture of the paper's Table 1, in its order, then the extras."""
    return list(paper.architectures())


def build(
    name: str,
    classes: int = 10,
    *,
    cells: int = 20,
    channels: int = 36,
    image_size: ImageSize = 32,
    mean: Statistics = MEAN,
    std: Statistics = STD,
    stem_stride: int = 1,
    auxiliary: bool = False,
) -> nn.Module:
    """The untrained network `name` (see `names`): images (B,3,H,W) in [0,1] to logits (B,classes).

    `mean` and `std` per channel normalise inside. `image_size` (a side, or height and width) is checked: a network for
    32 pixels is the same as one for 64. `cells`, `channels`, `stem_stride` and `auxiliary` matter for cell networks
    only (see `DerivedNetwork`). RnasError, before anything is built, for unknown names and values that cannot be.
    """
    published = paper.find(name)
    if published.name in HAND_MADE:
        builder, least = HAND_MADE[published.name]
        check_image_size(image_size, least, 1, published.name)
        check_count("classes", classes, 2)
        return builder(classes, mean, std)
    if published.source is None:
        raise RnasError(
            f"{published.name} cannot be built: {published.note}, and nothing is made up here. "
            "A search with its objective (rnas search --method dsrna) is planned to find a cell for it"
        )
    return build_genotype(
        paper.genotype(published.name),
        classes,
        cells=cells,
        channels=channels,
        image_size=image_size,
        mean=mean,
        std=std,
        stem_stride=stem_stride,
        auxiliary=auxiliary,
    )


def build_genotype(
    genotype: Architecture,
    classes: int = 10,
    *,
    cells: int = 20,
    channels: int = 36,
    image_size: ImageSize = 32,
    mean: Statistics = MEAN,
    std: Statistics = STD,
    stem_stride: int = 1,
    auxiliary: bool = False,
) -> DerivedNetwork:
    """The untrained network of a genotype; otherwise as `build`."""
    return DerivedNetwork(
        genotype,
        classes,
        cells,
        channels,
        mean,
        std,
        stem_stride=stem_stride,
        auxiliary=auxiliary,
        image_size=image_size,
    )


def zoo_table(image_size: int = 32, classes: int = 10) -> list[dict[str, Any]]:
    """One row for each architecture: name, year, kind, parameters, macs (for one image), paper_params_M, source, note.

    Counts are measured by running the network (20 cells, C = 36, no auxiliary head); None for what cannot be built.
    """
    return [_row(published, image_size, classes) for published in paper.architectures().values()]


def _row(published: paper.Published, image_size: int, classes: int) -> dict[str, Any]:
    counts: dict[str, int | None] = {"parameters": None, "macs": None}
    if published.source is not None:
        with torch.random.fork_rng(devices=[]):  # counting is no reason to draw from the caller's random numbers
            network = build(published.name, classes, image_size=image_size)
            counts = {"parameters": parameters(network), "macs": macs(network, image_size)}
    return {
        "name": published.name,
        "year": published.year,
        "kind": published.kind,
        **counts,
        "paper_params_M": published.paper_params,
        "source": published.source,
        "note": published.note,
    }


def table_text(rows: list[dict[str, Any]], *, markdown: bool = False, width: int = 80) -> str:
    """The rows of `zoo_table` for people: a Markdown table, or aligned columns of `width` characters at most, where the
    sources stand below their rows."""
    header = ["Name", "Year", "Kind", "Parameters", "MACs (M)", "Paper (M)", "Source"]
    cells = [header, *map(_cells, rows)]
    if markdown:
        cells.insert(1, ["-", "-", "-", "-:", "-:", "-:", "-"])
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in cells), strict=True)]
    right = (3, 4, 5)
    text = []
    for *line, source in cells:
        aligned = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        text.append("  ".join(aligned).rstrip())
        text.append(textwrap.indent(textwrap.fill(source, width - 4, break_on_hyphens=False), "    "))
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> list[str]:
    unknown = "–"
    counted = row["macs"] is not None
    return [
        row["name"],
        str(row["year"]),
        row["kind"],
        f"{row['parameters']:,}" if counted else unknown,
        f"{row['macs'] / 1e6:.1f}" if counted else unknown,
        unknown if row["paper_params_M"] is None else str(row["paper_params_M"]),
        "; ".join(text for text in (row["source"] or "none", row["note"]) if text),
    ]


def find_architecture(arch: str) -> tuple[str, Architecture | None]:
    """What ARCH names: a member of the zoo (its name, None), or a genotype's file or search folder
    ("genotype", the genotype), or the folder of a training of one. RnasError if it is none of them."""
    path = Path(arch)
    for candidate in (path, path / "genotype.json", path / "search" / "genotype.json"):
        if candidate.is_file():
            return "genotype", architecture_from_json(read_json(candidate), str(candidate))
    if (path / SETTINGS).is_file() and (genotype := _object(path / SETTINGS).get("genotype")) is not None:
        return "genotype", architecture_from_json(genotype, str(path / SETTINGS))
    if path.is_dir():
        raise RnasError(f"{arch} holds no genotype.json: expected the folder of a finished search")
    if path.suffix == ".json":
        raise RnasError(f"cannot read {arch}: there is no such file")
    return paper.find(arch).name, None


def searched_on(folder: Path) -> str | None:
    """The images that the search in `folder` was on, if it is one and says so."""
    path = folder / SETTINGS
    source = _object(path).get("source") if path.is_file() else None
    return source.get("data") if isinstance(source, dict) else None


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where it holds something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}
