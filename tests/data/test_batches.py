"""Halves and batches: stratified, seeded, and resumable, whatever the global generators do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from rnas.data import Split, batches, halves
from rnas.data.dataset import crop_and_flip, padding, stratified
from rnas.errors import RnasError


def numbered(n: int, size: int = 8, classes: int = 3, flip: bool = True) -> Split:
    """Images that tell their number in every pixel."""
    x = torch.arange(n).view(-1, 1, 1, 1).expand(n, 3, size, size).to(torch.uint8)
    return Split(x, torch.arange(n) % classes, flip)


def noise(n: int, size: int = 8, flip: bool = True) -> Split:
    x = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Split(x, torch.arange(n) % 3, flip)


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), seed=st.integers(0, 9))
def test_halves_share_every_class(labels, seed):
    y = torch.tensor(labels)
    split = Split(torch.arange(len(y)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8), y)
    a, b = halves(split, seed)
    assert 0 <= len(a) - len(b) <= 1
    assert sorted(a.images[:, 0, 0, 0].tolist() + b.images[:, 0, 0, 0].tolist()) == list(range(len(y)))
    for k in set(labels):
        assert abs(int((a.labels == k).sum()) - int((b.labels == k).sum())) <= 1
    again, _ = halves(split, seed)
    assert torch.equal(a.images, again.images)


def test_halves_depend_on_the_seed():
    first, second = (halves(numbered(60), seed)[0].images for seed in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(RnasError, match="cannot halve"):
        halves(numbered(1), 0)


@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=50), data=st.data())
def test_stratified_takes_as_many_as_asked_and_each_class_its_share(labels, data):
    n = data.draw(st.integers(0, len(labels)))
    mask = stratified(torch.tensor(labels), n, 0)
    assert int(mask.sum()) == n
    for k in set(labels):
        picked = sum(m for m, label in zip(mask.tolist(), labels, strict=True) if label == k)
        assert abs(picked - labels.count(k) * n / len(labels)) < 1


def test_without_a_seed_the_order_is_kept():
    got = list(batches(numbered(10), 4))
    assert [len(y) for _, y in got] == [4, 4, 2]
    x = torch.cat([x for x, _ in got])
    assert x.dtype == torch.float32
    assert torch.equal(x[:, 1, 2, 3], torch.arange(10) / 255)
    assert torch.cat([y for _, y in got]).dtype == torch.int64
    assert [len(y) for _, y in batches(numbered(10), 4, drop_last=True)] == [4, 4]
    assert [len(y) for _, y in batches(numbered(8), 4, drop_last=True)] == [4, 4]


def test_a_batch_depends_on_seed_and_epoch_and_on_nothing_else():
    split = noise(50)

    def epoch(seed: int, number: int) -> torch.Tensor:
        return torch.cat([x for x, _ in batches(split, 16, seed=seed, epoch=number, augment=True)])

    before = torch.get_rng_state()
    first = epoch(1, 2)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"
    torch.manual_seed(99)
    assert torch.equal(epoch(1, 2), first)
    others = [epoch(1, 3), epoch(2, 2), epoch(2, 1), epoch(0, 3)]
    assert not any(torch.equal(first, other) for other in others)


def test_every_image_comes_once():
    x = torch.cat([x for x, _ in batches(numbered(50), 16, seed=0, epoch=1)])
    assert sorted((x[:, 0, 0, 0] * 255).round().int().tolist()) == list(range(50))
    assert (x[:, 0, 0, 0] * 255).round().int().tolist() != list(range(50))


@settings(max_examples=30)
@given(size=st.integers(4, 40), flip=st.booleans(), seed=st.integers(0, 1000))
def test_a_crop_is_a_shifted_perhaps_mirrored_image_with_black_beyond_its_border(size, flip, seed):
    split = noise(3, size, flip)
    pad = padding(size)
    ((x, y),) = batches(split, 3, seed=seed, epoch=0, augment=True)
    for image, label in zip((x * 255).round().to(torch.uint8), y, strict=True):
        padded = torch.zeros(3, size + 2 * pad, size + 2 * pad, dtype=torch.uint8)
        padded[:, pad:-pad, pad:-pad] = split.images[int(label)]  # three images, three labels
        windows = [padded[:, i : i + size, j : j + size] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        candidates = windows + [w.flip(2) for w in windows] * flip
        assert any(torch.equal(image, c) for c in candidates)


def test_flips_and_shifts_are_uniform():
    """1,000 images of 32x32: nine shifts each way and two orientations, none rare."""
    marked = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    marked[:, :, 15, 10] = 255
    ((x, _),) = batches(Split(marked, torch.zeros(1000, dtype=torch.long)), 1000, seed=0, epoch=0, augment=True)
    rows, columns = x[:, 0].flatten(1).argmax(1) // 32, x[:, 0].flatten(1).argmax(1) % 32
    assert set(rows.tolist()) == set(range(11, 20))
    assert set(columns.tolist()) == set(range(6, 15)) | set(range(17, 26))  # 10 +- 4, and its mirror image 21 +- 4
    assert torch.bincount(rows)[11:].min() > 70
    assert 400 < int((columns >= 17).sum()) < 600


def test_padding_follows_the_paper():
    assert [padding(size) for size in (4, 16, 32, 64)] == [1, 2, 4, 8]


def test_crop_without_a_shift_is_the_identity():
    x = noise(4).images
    centre = torch.full((4,), padding(8))
    assert torch.equal(crop_and_flip(x, centre, centre, torch.zeros(4)), x)
    assert torch.equal(crop_and_flip(x, centre, centre, torch.ones(4)), x.flip(3))


def test_bad_arguments_are_refused_before_the_first_batch():
    with pytest.raises(RnasError, match="10 images do not fill a batch of 16"):
        batches(numbered(10), 16, drop_last=True)
    with pytest.raises(RnasError, match="batch size is 0"):
        batches(numbered(10), 0)
    with pytest.raises(RnasError, match="seed"):
        batches(numbered(10), 4, augment=True)


def calls(split: Split, batch_size: int) -> list[str]:
    """What drawing all augmented batches after the first, which comes with the epoch's draws, calls of torch."""
    drawn = batches(split, batch_size, seed=0, augment=True)
    next(drawn)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        list(drawn)
    return [event.name for event in profiled.events() or []]


def test_a_batch_of_any_size_is_the_same_few_calls(monkeypatch):
    """No work for each image, and nothing that would make a GPU's host wait for a number."""
    monkeypatch.setattr("rnas.data.dataset.TOGETHER", 0)  # each batch is augmented by itself
    small, large = calls(noise(32), 8), calls(noise(512), 128)
    assert small == large
    assert len([name for name in small if name.startswith("aten::")]) < 3 * 100
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"} & set(small)


def test_batches_that_are_augmented_together_take_fewer_calls_and_are_the_same(monkeypatch):
    split = noise(75)
    together, fewer = list(batches(split, 8, seed=0, augment=True)), calls(split, 8)
    for at_once in (0, 2 * 8 * 3 * 8 * 8):  # one batch, two batches
        monkeypatch.setattr("rnas.data.dataset.TOGETHER", at_once)
        assert len(calls(split, 8)) > 2 * len(fewer)
        for (x, y), (a, b) in zip(together, batches(split, 8, seed=0, augment=True), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_pixels_are_their_value_over_255_correctly_rounded():
    k = torch.arange(256)
    ((x, _),) = batches(numbered(256), 256)
    assert torch.equal(x[:, 0, 0, 0], (k.double() / 255).float())


@pytest.mark.gpu
def test_no_batch_makes_the_host_wait():
    split = noise(400, 32).to("cuda")
    drawn = batches(split, 128, seed=0, augment=True, device="cuda")
    next(drawn)  # the epoch's draws cross over once
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(drawn)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_batch_costs_under_three_percent_of_a_step_on_a_gpu(tmp_path):
    """Batch 128; RNAS-L and ResNet18; standard and adversarial training, at 32 and 64 pixels."""
    if "emulated_gpu" in sys.modules:
        pytest.skip("times on an emulated GPU mean nothing")
    command = [sys.executable, "-m", "benchmarks.data", "--parts", "share", "--json", tmp_path / "share.json"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = json.loads((tmp_path / "share.json").read_text())["share"]
    assert found["device"] == "cuda"
    shares = [found[size][name]["share"] for size in ("32x32", "64x64") for name in ("RNAS-L", "ResNet18")]
    assert max(share for both in shares for share in both.values()) < 0.03, shares


@pytest.mark.gpu
def test_batches_are_the_same_on_the_gpu():
    split = noise(50)
    on_gpu = split.to("cuda")
    for home in (split, on_gpu):
        for (x, y), (a, b) in zip(
            batches(split, 16, seed=3, epoch=1, augment=True),
            batches(home, 16, seed=3, epoch=1, augment=True, device="cuda"),
            strict=True,
        ):
            assert torch.equal(x, a.cpu())
            assert torch.equal(y, b.cpu())
