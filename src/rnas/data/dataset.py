"""A data set in memory: one uint8 tensor per split, and the batches that training draws from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.errors import RnasError

TOGETHER = 2**23
"""Bytes of images, about, that are picked and augmented at once, for as many batches as they make: each operation costs
a GPU's host the same, however few images it is for."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    `images` uint8 (N,3,H,W); `labels` int64 (N,), 0..K-1; `flip` says whether a mirrored image keeps its class.
    The images may lie in a memory-mapped file: treat both tensors as read-only.
    """

    images: Tensor
    labels: Tensor
    flip: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Split:
        """The images that `index` picks, int64 numbers (n,) or a boolean mask (N,); copied."""
        return Split(self.images[index], self.labels[index], self.flip)

    def to(self, device: torch.device | str) -> Split:
        """The split on `device`, so that `batches` there copies nothing from the host."""
        return Split(self.images.to(device), self.labels.to(device), self.flip)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with the names of their classes: label k is `classes[k]`."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    eps_default: float = 8 / 255
    """The l_inf budget of an attack, in [0,1] units, unless one is chosen (§5.1)."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        height, width = self.train.images.shape[2:]
        return height, width

    @property
    def flip(self) -> bool:
        """Whether a mirrored image keeps its class: not so for digits."""
        return self.train.flip

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training images, in [0,1] units.

        A constant channel gets one grey level, 1/255, as its deviation: a network divides by it.
        """
        total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for images in torch.split(self.train.images, 1024):
            x = images.cpu().transpose(0, 1).flatten(1) / white("cpu")
            total += x.sum(1, dtype=torch.float64)
            squares += x.square_().sum(1, dtype=torch.float64)
        pixels = self.train.images[:, 0].numel()
        mean = total / pixels
        std = (squares / pixels - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
        return tuple(mean.tolist()), tuple(std.tolist())


def white(device: torch.device | str) -> Tensor:
    """What uint8 images are divided by, to have them as float32 in [0,1]: k/255, correctly rounded, on every device.

    It lies on the device, a tensor () float32, since CUDA multiplies by the inverse of a number that the host holds.
    """
    return torch.full((), 255.0, dtype=torch.float32, device=device)


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """A boolean mask (N,) that picks `n` of the N samples at random, from each class its share of them.

    A class's share is rounded by largest remainder, so that the counts add up to `n`.
    """
    labels = labels.cpu()
    counts = torch.bincount(labels)
    shares = counts.double() * n / max(len(labels), 1)
    quota = shares.floor().long()
    quota[(quota - shares).argsort(stable=True)[: n - int(quota.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for k, wanted in enumerate(quota.tolist()):
        members = (labels == k).nonzero()[:, 0]
        mask[members[torch.randperm(len(members), generator=generator)[:wanted]]] = True
    return mask


def halves(split: Split, seed: int) -> tuple[Split, Split]:
    """Two disjoint halves of `split`, equal up to one image, each with its share of every class (Algorithm 1).

    RnasError if there are fewer than two images.
    """
    if len(split) < 2:
        raise RnasError(f"cannot halve a training set of {len(split)} images: the search needs two or more")
    mask = stratified(split.labels, (len(split) + 1) // 2, seed)
    first, second = (m.nonzero()[:, 0].to(split.labels.device) for m in (mask, ~mask))
    return split[first], split[second]


def limited(split: Split, per_class: int, seed: int) -> Split:
    """At most `per_class` images of each class, drawn at random, in their old order."""
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for k in range(int(split.labels.max()) + 1):
        members = (split.labels == k).nonzero()[:, 0]
        keep.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return split[torch.cat(keep).sort().values]


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    augment: bool = False,
    device: torch.device | str = "cpu",
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `split`: `x` float32 (B,3,H,W) in [0,1] and `y` int64 (B,), both on `device`.

    With a `seed` the order and the augmentation are random, the same for the same (seed, epoch) on every device;
    torch's global generators are neither read nor changed. Without one, the order is that of the split.
    `augment` crops at random from the image padded with 4·H/32 black pixels, and mirrors half of the images where
    `split.flip` allows it. Move the split to the device first (`split.to`) where memory allows.
    RnasError if there is not a single batch, or if augmentation has no seed.
    """
    if batch_size < 1:
        raise RnasError(f"the batch size is {batch_size}: expected 1 or more")
    if len(split) < (batch_size if drop_last else 1):
        raise RnasError(
            f"the data set is too small: {len(split)} images do not fill a batch of {batch_size}; "
            "choose a smaller batch size or give more images"
        )
    if augment and seed is None:
        raise RnasError("augmentation is random: give batches a seed")
    return _batches(split, batch_size, seed, epoch, augment, torch.device(device), drop_last)


def _batches(
    split: Split, batch_size: int, seed: int | None, epoch: int, augment: bool, device: torch.device, drop_last: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    n, home = len(split), split.images.device
    order = torch.arange(n)
    crops = None
    if seed is not None:
        # All of the epoch's draws are made here, on the CPU, and cross to the device once.
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(n, generator=generator)
        if augment:
            pad = padding(split.images.shape[2])
            shifts = torch.randint(2 * pad + 1, (2, n), generator=generator)
            mirror = torch.randint(2, (1, n), generator=generator) * split.flip
            crops = torch.cat([shifts, mirror]).to(device)
    order = order.to(home)
    scale = white(device)
    n -= n % batch_size if drop_last else 0
    together = batch_size * max(1, TOGETHER // (batch_size * split.images[0].numel()))
    for start in range(0, n, together):
        rows = slice(start, min(start + together, n))
        images = split.images[order[rows]].to(device)
        labels = split.labels[order[rows]].to(device)
        if crops is not None:
            images = crop_and_flip(images, *crops[:, rows])
        for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
            yield x / scale, y


def padding(height: int) -> int:
    """How many pixels of border a random crop may show: 4 at 32x32 (§5.1), at least 1."""
    return max(1, 4 * height // 32)


def crop_and_flip(x: Tensor, down: Tensor, right: Tensor, mirror: Tensor) -> Tensor:
    """Cut each image out of its zero-padded self, `down` and `right` (B,) pixels from the corner; flip where
    `mirror` (B,) is 1. `x` (B,3,H,W) of any type; the result has its shape and type."""
    height, width = x.shape[2:]
    padded = F.pad(x, [padding(height)] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B,3,shifts,shifts,H,W)
    x = windows[torch.arange(len(x), device=x.device), :, down, right]
    return torch.where(mirror.bool().view(-1, 1, 1, 1), x.flip(3), x)


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit number from two, such that neighbours share no stream."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
