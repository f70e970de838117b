"""Networks that are not rnas's own, in a module that can be imported: what `fit` is given, and `model.json` names."""

import torch
from torch import Tensor, nn


class Digits(nn.Module):
    """Two convolutions with batch normalisation, and a linear layer of 16x16 images' features."""

    def __init__(self, stride: int = 2):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(8)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class Tied(nn.Module):
    """Two layers that share their weights, and a buffer that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(768, 10)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.second(self.first(x).relu()) * self.scale).flatten(1))


class Heads(Digits):
    """A second head: (logits, auxiliary logits), always or in train mode alone; or a dict of both."""

    def __init__(self, form: str):
        super().__init__()
        self.auxiliary, self.form = nn.Linear(512, 10), form

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:  # type: ignore[override]
        features = self.pool(self.features(x)).flatten(1)
        logits, auxiliary = self.head(features), self.auxiliary(features)
        if self.form == "dict":
            return {"logits": logits, "auxiliary": auxiliary}
        return (logits, auxiliary) if self.form == "tuple" or self.training else logits


class Whole(nn.Module):
    """Batch normalisation of a single value for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 16), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Cut(Digits):
    """No gradient gets from the logits to the images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def with_stride_1() -> nn.Module:
    return Digits(stride=1)


def nothing() -> None:
    """What returns no network."""
