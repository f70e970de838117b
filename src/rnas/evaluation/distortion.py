"""How far an attack moves the features of each layer (Fig. 3), and feature maps to look at (Fig. 2), of any network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.device import choose_device, reseed
from rnas.compute.freezing import unfolded
from rnas.compute.precision import full_precision
from rnas.console import Advance, Console
from rnas.data import Dataset, Split, load
from rnas.data.sources import load_own_data, load_test_data
from rnas.errors import RnasError, unknown
from rnas.evaluation.features import attacked, layers_of
from rnas.files import check_writable, write_json
from rnas.nets.saved import build_from_meta, find_model, load_model
from rnas.nets.zoo import find_architecture
from rnas.records.arrays import write_arrays
from rnas.records.codec import encode
from rnas.records.folder import alone, training_of
from rnas.records.layout import DISTORTION, FEATURES
from rnas.records.schema import Description, LayerDistortion
from rnas.settings import Distortion
from rnas.vulnerability import image_vulnerabilities, recorded


@full_precision()
def distortion(settings: Distortion, console: Console | None = None) -> list[Path]:
    """Measure every network of `settings`; returns the folders that hold its distortion.json and features.npz:
    `settings.out` for one network, folders below it for several. A trained run gets a copy of its distortion.json.

    RnasError for bad input, before anything is written.
    """
    console = console or Console(quiet=True)
    if not settings.networks:
        raise RnasError("distortion needs the folder of a training run or the name of an architecture")
    device = choose_device(settings.device)
    folders = _folders(settings)
    for folder in folders:
        check_writable(folder)
    found = [_network(name, settings) for name in settings.networks]
    chosen = [_choose_layers(of, settings.layers) for of in found]
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(alone(folder))
        _distort(settings, found, chosen, folders, device, console)
    return folders


def _distort(
    settings: Distortion,
    found: list[_Network],
    chosen: list[dict[str, str]],
    folders: list[Path],
    device: torch.device,
    console: Console,
) -> None:
    for (name, run, standard, net, meta, data), layers, folder in zip(found, chosen, folders, strict=True):
        images = data.test[torch.arange(min(settings.limit, len(data.test)))]
        eps = settings.eps or data.eps_default
        attack = PGD(eps=eps, step=eps / 4, steps=settings.attack_steps, seed=settings.seed)
        console.say(f"distortion of {name}: {len(layers)} layers, {len(images)} images of {data.name} ...")
        with console.bar(f"distortion of {name}", len(images)) as advance:
            vulnerability, maps = _measure(net.to(device), layers, images, attack, settings, advance)
        record = LayerDistortion(
            layers=tuple(layers),
            vulnerability=tuple(vulnerability.values()),
            modules=tuple(layers.values()),
            reduction=settings.reduction,
            features=settings.features,
            eps=eps,
            norm="linf",
            n=len(images),
            attack=f"pgd{settings.attack_steps}",
            seed=settings.seed,
            dataset=data.name,
            model=meta.arch,
            run=name,
            trained=run is not None,
            standard=standard,
        )
        write_json(folder / DISTORTION, encode(record))
        write_arrays(folder / FEATURES, maps)
        if run is not None and os.access(run, os.W_OK):  # for its report, if it is one's own
            write_json(run / DISTORTION, encode(record))
        for line in _lines(record):
            console.say(line)


class _Network(NamedTuple):
    """A network to be looked at."""

    name: str
    run: Path | None
    """The folder where it lies; None if it is not trained."""
    standard: bool | None
    """Whether it was trained on clean images; None if not at all."""
    net: nn.Module
    meta: Description
    data: Dataset


def _choose_layers(of: _Network, wanted: Sequence[str] | None) -> dict[str, str]:
    """The layers to measure. RnasError for one that the network lacks (naming the nearest), or that gives no maps."""
    usual = layers_of(of.net, of.meta.arch)
    if wanted is None:
        return usual
    modules = {module for module, _ in of.net.named_modules() if module}
    for layer in wanted:
        if layer not in usual and layer not in modules:
            raise RnasError(f"{unknown(f'layer of {of.name}', layer, usual)}, and every module of the network")
    chosen = {layer: usual.get(layer, layer) for layer in wanted}
    with torch.no_grad(), unfolded(of.net), recorded(of.net, list(chosen.values())) as outputs:
        of.net(torch.zeros(1, 3, *of.meta.image_size))
    for layer, module in chosen.items():
        output = outputs.get(module)
        if not isinstance(output, torch.Tensor) or output.dim() != 4:
            gives = f"a {tuple(output.shape)}" if isinstance(output, torch.Tensor) else "nothing"
            raise RnasError(f"layer '{layer}' of {of.name} gives {gives}: expected feature maps (B,C,H,W)")
    return chosen


def _network(name: str, settings: Distortion) -> _Network:
    folder = find_model(Path(name))
    if folder is not None:
        net, meta = load_model(folder)
        if settings.data:
            data = load_test_data(settings.data, folder, meta, settings.data_root, settings.image_size)
        else:
            data = load_own_data(folder, meta)
        _check_images(data, meta, name)
        return _Network(name, folder, training_of(folder).standard, net, meta, data)
    arch, genotype = find_architecture(name)
    if settings.data is None:
        raise RnasError(f"{name} is not trained, and so has no images of its own: name some with --data")
    data = load(
        settings.data,
        root=settings.data_root,
        image_size=settings.image_size,
        test_fraction=settings.test_fraction,
    )
    mean, std = data.statistics()
    meta = Description(
        arch=arch,
        genotype=genotype,
        classes=tuple(data.classes),
        cells=settings.cells,
        channels=settings.channels,
        mean=mean,
        std=std,
        image_size=data.image_size,
    )
    reseed(settings.seed)
    return _Network(name, None, None, build_from_meta(meta, name).eval(), meta, data)


def _check_images(data: Dataset, meta: Description, name: str) -> None:
    if data.image_size != meta.image_size or len(data.classes) != len(meta.classes):
        raise RnasError(
            f"{data.name} has {len(data.classes)} classes and images of {list(data.image_size)}: "
            f"{name} was trained for {len(meta.classes)} classes and {list(meta.image_size)}"
        )


def _folders(settings: Distortion) -> list[Path]:
    """Where the results go: --out, or folders in it, named after the networks."""
    if len(settings.networks) == 1:
        return [settings.out]
    names: list[str] = []
    for network in settings.networks:
        name = Path(network).resolve().name if Path(network).exists() else network
        again = sum(n == name or n.startswith(f"{name}-") for n in names)
        names.append(f"{name}-{again + 1}" if again else name)
    return [settings.out / name for name in names]


def _measure(
    net: nn.Module, layers: dict[str, str], images: Split, attack: PGD, settings: Distortion, advance: Advance
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Each layer's vulnerability over all images, and feature maps of the first (see `_feature_maps`)."""
    found: list[Tensor] = []
    maps: dict[str, NDArray[Any]] = {}
    with unfolded(net):
        for x, x_adv in attacked(net, images, attack, settings.batch_size):
            by = settings.reduction, settings.features
            found.append(image_vulnerabilities(net, x, x_adv, list(layers.values()), *by).cpu())
            maps = maps or _feature_maps(net, layers, x[:1], x_adv[:1], settings.channels_shown)
            advance(len(x))
    return dict(zip(layers, torch.cat(found).mean(0).tolist(), strict=True)), maps


@torch.no_grad()
def _feature_maps(
    net: nn.Module, layers: dict[str, str], x: Tensor, x_adv: Tensor, channels: int
) -> dict[str, NDArray[Any]]:
    """For each layer the maps (K,h,w) of its K most varied channels, clean and adversarial, and the two images."""
    with recorded(net, list(layers.values())) as outputs:
        net(x)
        clean = dict(outputs)
        net(x_adv)
    maps = {"image": x[0], "image_adversarial": x_adv[0]}
    for name, module in layers.items():
        before, after = clean[module][0], outputs[module][0]
        order = before.flatten(1).std(1, correction=0).argsort(descending=True, stable=True)[:channels]
        maps |= {f"{name}:channels": order, f"{name}:clean": before[order], f"{name}:adversarial": after[order]}
    return {key: value.cpu().numpy() for key, value in maps.items()}


def _lines(record: LayerDistortion) -> list[str]:
    how = "untrained: its weights are random" if not record.trained else "trained"
    pairs = zip(record.layers, record.vulnerability, strict=True)
    return [f"{record.run} ({how})", *(f"  {layer}: {value:.3e}" for layer, value in pairs)]
