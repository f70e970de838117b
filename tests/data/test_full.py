"""The real images in full, in the official layouts: 60,000 of CIFAR-10 and 110,000 of Tiny-ImageNet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnas.data

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.slow

LOAD = """
import json, resource, sys, torch, rnas.data
d = rnas.data.load(sys.argv[1], root=sys.argv[2])
# Every pixel is touched; in parts, because sum() makes an int64 copy.
sums = [sum(int(x.sum(dtype=torch.int64)) for x in torch.split(s.images, 1000)) for s in (d.train, d.test)]
print(json.dumps({"counts": [s.labels.bincount().unique().tolist() for s in (d.train, d.test)], "sums": sums,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))
"""


def unpacked(what: str, to: Path) -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real images are not beside this checkout")
    subprocess.run([sys.executable, SHARED / "unpack.py", what, to], check=True, capture_output=True)
    return to


def loaded(name: str, root: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", LOAD, name, root], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "what", "counts", "gigabytes"),
    [("cifar10", "cifar10-bin", [[5000], [1000]], 2), ("tiny-imagenet", "tiny-folder", [[500], [50]], 4)],
)
def test_full_size(tmp_path, name, what, counts, gigabytes):
    """The right numbers of images of every class, in a process of bounded memory, decoded and from the cache."""
    root = unpacked(what, tmp_path)
    first, second = loaded(name, root), loaded(name, root)
    assert first["counts"] == second["counts"] == counts
    assert first["sums"] == second["sums"]
    assert max(first["peak"], second["peak"]) < gigabytes << 30


def test_cifar10_has_its_labels_in_order(tmp_path):
    """The canonical first test images are a cat, two ships and an airplane; `.npz` and binary form agree."""
    binary = rnas.data.load("cifar10", root=unpacked("cifar10-bin", tmp_path / "bin"))
    arrays = rnas.data.load(unpacked("cifar10-npz", tmp_path / "cifar10.npz"))
    assert [binary.classes[k] for k in binary.test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    for a, b in ((binary.train, arrays.train), (binary.test, arrays.test)):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def test_tiny_imagenet_agrees_with_its_images(tmp_path):
    """The same JPEGs as one folder per class give the same images, in another order of the test split."""
    official = rnas.data.load("tiny-imagenet", root=unpacked("tiny-folder", tmp_path / "official"))
    own = rnas.data.load(unpacked("tiny-images", tmp_path / "own"))
    assert own.classes == official.classes
    assert torch.equal(own.train.labels, official.train.labels)
    assert torch.equal(own.train.images, official.train.images)
    for k in (0, 57, 199):
        mine, theirs = (
            s.test.images[s.test.labels == k].float().mean((1, 2, 3)).sort().values for s in (own, official)
        )
        assert torch.equal(mine, theirs)
