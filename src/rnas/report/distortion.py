"""Fig. 2 and Fig. 3 from the files of `rnas distortion`: feature maps, and distortion by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rnas.errors import RnasError
from rnas.records.arrays import read_arrays
from rnas.records.layout import DISTORTION, FEATURES
from rnas.records.schema import LayerDistortion
from rnas.report.drawing import theme
from rnas.report.drawing.shapes import Dot, Drawing, Picture, Text, arranged, text_width
from rnas.report.figures import Distorted, distortion_drawings
from rnas.report.read import read_distortion

DEPTHS = 5
"""Layers of a figure of several depths."""
TILE = 44.0


@dataclass(frozen=True)
class Measured:
    """What `rnas distortion` found of one network."""

    name: str
    record: LayerDistortion
    features: dict[str, NDArray[np.float32]]

    @property
    def layers(self) -> list[str]:
        """The layers that were measured, in their order."""
        return list(self.record.layers)


@dataclass(frozen=True)
class Maps:
    """Feature maps of one layer, clean and adversarial (K,h,w), under a name."""

    name: str
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]


def read_measured(folder: Path | str, name: str | None = None) -> Measured:
    """The distortion.json and features.npz of `folder`. RnasError if they are missing or damaged."""
    folder = Path(folder)
    record = read_distortion(folder / DISTORTION)
    if record is None:
        raise RnasError(f"{folder} holds no distortion.json: rnas distortion writes it")
    return Measured(name or described(record), record, read_arrays(folder / FEATURES))


def described(record: LayerDistortion) -> str:
    """What a network is called in a figure: VGG16 (AT), RNAS-L (untrained)."""
    how = "untrained" if not record.trained else "ST" if record.standard else "AT"
    arch = record.model or "network"
    return f"{'the cell found' if arch == 'genotype' else arch} ({how})"


def draw_distortion(folders: Sequence[Path | str], out: Path | str) -> list[Path]:
    """Draw what `rnas distortion` left in `folders`: `out`/distortion (Fig. 3), `out`/features-LAYER (Fig. 2a, networks
    that have the layer together) and in every folder features (Fig. 2b), each as .svg and .png. Returns the files."""
    out = Path(out)
    networks = _told_apart([read_measured(folder) for folder in folders])
    written = save(distortion_figure(networks), out / "distortion")
    for folder, network in zip(folders, networks, strict=True):
        written += save(feature_figure(depths(network), f"Feature maps of {network.name}"), Path(folder) / "features")
    by_layer: dict[str, list[Maps]] = {}
    for network in networks:
        layer = deep_layer(network.layers)
        by_layer.setdefault(layer, []).append(maps_of(network, layer, network.name))
    for layer, maps in by_layer.items():
        written += save(feature_figure(maps, f"Feature maps of {layer}"), out / f"features-{layer}")
    return written


def _told_apart(networks: Sequence[Measured]) -> list[Measured]:
    """The networks, with the names of their runs where two are otherwise called the same."""
    names = [network.name for network in networks]
    return [
        replace(network, name=f"{network.name}, {Path(network.record.run).name}")
        if names.count(network.name) > 1 and network.record.run is not None
        else network
        for network in networks
    ]


def save(drawing: Drawing, stem: Path) -> list[Path]:
    """Write `drawing` as `stem`.svg and `stem`.png; returns both paths."""
    paths = [stem.parent / f"{stem.name}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        drawing.save(path)
    return paths


def deep_layer(layers: Sequence[str]) -> str:
    """The layer at three quarters of the depth: VGG16's conv4_3, which the paper's Fig. 2a shows."""
    return layers[3 * len(layers) // 4]


def depths(network: Measured) -> list[Maps]:
    """Feature maps at several depths, from the first layer to the last (Fig. 2b)."""
    last = len(network.layers) - 1
    shown = sorted({round(i * last / (DEPTHS - 1)) for i in range(DEPTHS)})
    return [maps_of(network, network.layers[i]) for i in shown]


def maps_of(network: Measured, layer: str, name: str | None = None) -> Maps:
    """The feature maps of one layer. RnasError if features.npz has none of it."""
    try:
        return Maps(name or layer, network.features[f"{layer}:clean"], network.features[f"{layer}:adversarial"])
    except KeyError:
        raise RnasError(f"features.npz has no maps of layer {layer}: run rnas distortion again") from None


def feature_figure(groups: Sequence[Maps], title: str) -> Drawing:
    """For every group a row of clean and a row of adversarial maps, one channel a column (Fig. 2). A channel's two maps
    share their colours, so that what differs is the attack's doing."""
    left = 14 + max(text_width(name, 12) for g in groups for name in (g.name, "adversarial"))
    columns = max(len(g.clean) for g in groups)
    out = Drawing(left + columns * (TILE + 4) + 8, 8.0, title, _in_words(groups))
    for group in groups:
        out.shapes.append(Text(8, out.height + 14, group.name, 12, bold=True))
        for row, (kind, maps) in enumerate((("clean", group.clean), ("adversarial", group.adversarial))):
            y = out.height + row * (TILE + 4)
            out.shapes.append(Text(left - 8, y + TILE - 6, kind, 11, "soft", "end"))
            for k, pixels in enumerate(maps):
                colored = _colored(pixels, (group.clean[k], group.adversarial[k]))
                out.shapes.append(Picture(left + k * (TILE + 4), y, TILE, TILE, colored))
        out.height += 2 * (TILE + 4) + 12
    return out


def _in_words(groups: Sequence[Maps]) -> str:
    """How far each group's maps are moved, relative to their own spread."""
    parts = []
    for g in groups:
        spread = float(g.clean.std())
        moved = float(np.sqrt(np.mean((g.adversarial - g.clean) ** 2)))
        parts.append(f"{g.name}: {moved / spread:.2f}" if spread > 0 else f"{g.name}: constant")
    return (
        "Each pair of rows shows the same channels of one image, clean and adversarial. Root mean square difference "
        f"over the clean maps' standard deviation: {'; '.join(parts)}."
    )


def _colored(pixels: NDArray[np.float32], both: Sequence[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """A map (h,w) in colours (h,w,3) that span the values of `both`."""
    low, high = min(float(m.min()) for m in both), max(float(m.max()) for m in both)
    share = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    stops = np.array([list(bytes.fromhex(color)) for color in theme.VIRIDIS])
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.rint(np.interp(share, places, stops[:, c])) for c in range(3)], -1).astype(np.uint8)


def distortion_figure(networks: Sequence[Measured]) -> Drawing:
    """Distortion by layer, logarithmic; networks that have the same layers in one panel (Fig. 3)."""
    panels = distortion_panels(networks)
    if not panels:
        return Drawing(360, 40, "Distortion by layer", "No layer is distorted at all.", [Text(8, 24, "no distortion")])
    return arranged(panels, 1, "Distortion by layer")


def distortion_panels(networks: Sequence[Measured]) -> list[Drawing]:
    """The panels of `distortion_figure`, each with its legend; none where there is no distortion at all."""
    named: list[Distorted] = [(n.name, theme.series(i), n.record) for i, n in enumerate(networks)]
    panels = []
    for drawing, members in distortion_drawings(named):
        _add_legend(drawing, members)
        panels.append(drawing)
    return panels


def _add_legend(drawing: Drawing, members: Sequence[Distorted]) -> None:
    drawing.title = "Distortion by layer"
    for name, role, _ in members:
        drawing.shapes.append(Dot(16, drawing.height + 6, 4.2, role))
        drawing.shapes.append(Text(26, drawing.height + 10, name, 12, role))
        drawing.height += 18
