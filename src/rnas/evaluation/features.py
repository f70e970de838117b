"""What an attack does to the features of a trained network: its layers, and F with how far it scatters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.freezing import unfolded
from rnas.compute.precision import full_precision
from rnas.console import Advance
from rnas.data import Split
from rnas.data.dataset import white
from rnas.nets.derived import DerivedNetwork
from rnas.records.schema import NetworkVulnerability
from rnas.statistics import bootstrap
from rnas.vulnerability import image_vulnerabilities, recorded

MOST = 1000
"""Images that F of a trained network is measured on, at most: its interval says what that leaves open."""
STEPS = 20
"""Of PGD, for F of a trained network."""
_VGG16_STAGES = (2, 2, 3, 3, 3)
"""Convolutions between the poolings: what Conv4_3 counts by."""


def layers_of(net: nn.Module, arch: str) -> dict[str, str]:
    """The layers of `net` that are looked at by default, in their order: name -> module as in named_modules().

    VGG16's convolutions after their ReLU, called as the paper does (conv4_3); ResNet18's stem and blocks; the cells of
    a cell network; of any other network its stages.
    """
    if isinstance(net, DerivedNetwork):
        return {f"cells.{i}": f"cells.{i}" for i in range(len(net.cells))}
    if arch == "VGG16":
        names = [f"conv{s}_{k}" for s, convolutions in enumerate(_VGG16_STAGES, 1) for k in range(1, convolutions + 1)]
        return {name: f"conv{i}.2" for i, name in enumerate(names, 1)}  # .3 would be the pooling
    stages = [name for name, _ in net.named_children() if name not in ("normalize", "classifier")]
    if arch == "ResNet18":
        stages = ["stem", *(f"stage{s}.{b}" for s in range(1, 5) for b in range(2))]
    return {name: name for name in stages}


def attacked(net: nn.Module, images: Split, attack: PGD, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B,3,H,W) in [0,1] and their adversarial versions, batch by batch, on the network's device."""
    device = next(net.parameters()).device
    for start in range(0, len(images), batch_size):
        part = images[torch.arange(start, min(start + batch_size, len(images)))]
        x, y = part.images.to(device) / white(device), part.labels.to(device)
        yield x, attack(net, x, y)


@full_precision()
def trained_vulnerability(
    net: nn.Module, arch: str, images: Split, attack: PGD, batch_size: int, advance: Advance
) -> NetworkVulnerability | None:
    """F of a trained network (Eq. 6), in eval mode, over the layers of `layers_of` that give feature maps, under
    `attack`. None for a network without such layers, and where features are not finite."""
    found: list[Tensor] = []
    layers: list[str] = []
    with unfolded(net):
        for x, x_adv in attacked(net, images, attack, batch_size):
            layers = layers or _with_maps(net, list(layers_of(net, arch).values()), x[:1])
            if not layers:
                return None
            found.append(image_vulnerabilities(net, x, x_adv, layers).mean(1).cpu())
            advance(len(x))
    of_images = torch.cat(found).tolist()
    f = sum(of_images) / len(of_images)
    if not 0 <= f < 1e15:
        return None
    return NetworkVulnerability(f, bootstrap(of_images), len(of_images), f"pgd{attack.steps}", len(layers))


@torch.no_grad()
def _with_maps(net: nn.Module, layers: list[str], x: Tensor) -> list[str]:
    """Those of the layers whose output is (B,C,H,W)."""
    with recorded(net, layers) as outputs:
        net(x)
    return [name for name in layers if isinstance(z := outputs.get(name), Tensor) and z.dim() == 4]
