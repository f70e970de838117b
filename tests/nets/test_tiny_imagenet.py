"""RNAS-L as published, on real Tiny-ImageNet images (64x64, 200 classes), learns under attack."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rnas import data
from rnas.attacks import PGD
from rnas.nets import zoo

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    """The first images of each of the 200 classes, in the official folder layout."""
    if not (SHARED / "unpack.py").is_file():
        pytest.skip("the real images of the project (shared/data) are not here")
    root = tmp_path_factory.mktemp("data")
    unpack = [sys.executable, SHARED / "unpack.py", "tiny-folder", root, "--per-class", "5"]
    subprocess.run(unpack, check=True, capture_output=True)
    return data.load("tiny-imagenet", root=root)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_few_steps_of_pgd_7_training(tiny_imagenet: data.Dataset) -> None:
    assert tiny_imagenet.train.images.shape[1:] == (3, 64, 64)
    assert len(tiny_imagenet.classes) == 200
    torch.manual_seed(0)
    mean, std = tiny_imagenet.statistics()
    network = zoo.build("RNAS-L", 200, image_size=64, mean=mean, std=std)
    # A large rate: gradients of the untrained network are some hundred long and clipped to 5.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, weight_decay=3e-4)
    attack = PGD(eps=8 / 255, step=2 / 255, steps=7)
    x, y = next(data.batches(tiny_imagenet.train, 2, seed=0, epoch=1, augment=False, device="cpu", drop_last=True))
    losses = []
    for _ in range(5):  # on the same images, so that learning shows at once
        x_adv = attack(network, x, y)
        assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
        loss = nn.functional.cross_entropy(network(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
