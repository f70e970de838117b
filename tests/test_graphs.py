"""Recorded attacks, without a GPU: the recording is emulated, operation by operation, on the CPU.

As with a CUDA graph, what is replayed reads and writes the memory that was there when it was recorded: a number that
the host had read, or a tensor that somebody replaces, would be stale. CUDA itself is not emulated (test_gpu.py).
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnas import graphs
from rnas.attacks import PGD
from rnas.nets.fast import FastSupernet
from rnas.nets.zoo import build
from rnas.precision import Precision
from rnas.settings import SearchSpace
from rnas.steps import craft, craft_away, weight_step
from tape import Tape

ATTACK = PGD(steps=2)


def emulated(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    with Tape() as tape:
        output = run()
    return tape.replay, output


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where replaying is always quicker."""
    monkeypatch.setattr(graphs, "recordable", lambda device: True)
    monkeypatch.setattr(graphs, "record", emulated)
    monkeypatch.setattr(graphs, "pays", lambda launched, replayed_in: True)


def batch(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n)


def supernet() -> FastSupernet:
    return FastSupernet(SearchSpace(cells=2, channels=4, nodes=2), 10)


def recordings(net: nn.Module) -> list[graphs.Recorded | None]:
    kept = graphs._kept.get(net)
    return [] if kept is None else list(kept.recorded.values())


NETS = {
    "supernet": supernet,
    "RNAS-L": lambda: build("RNAS-L", classes=10, cells=3, channels=4, image_size=(16, 16)),
    "ResNet18": lambda: build("ResNet18", classes=10),
}


@pytest.mark.parametrize(
    ("name", "precision", "crafting"),
    [
        ("supernet", Precision(), "PGD"),
        ("supernet", Precision(bf16=True), "PGD"),
        ("supernet", Precision(), "TRADES"),
        ("RNAS-L", Precision(), "PGD"),
        ("ResNet18", Precision(), "PGD"),
    ],
)
def test_replays_follow_the_network_and_the_images(
    name: str, precision: Precision, crafting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, α and running statistics change in place from step to step: the recording folds them anew."""
    monkeypatch.setattr("rnas.nets.fast.on_cpu", lambda x: False)
    torch.manual_seed(1)
    recorded = NETS[name]()
    launched = copy.deepcopy(recorded)
    crafted = []
    for net in (recorded, launched):
        monkeypatch.setattr(graphs, "recordable", lambda device, on=net is recorded: on)
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        images = []
        for step in range(4):
            x, y = batch(seed=step)
            if crafting == "TRADES":
                images.append(craft_away(ATTACK, net, x, precision))
            else:
                images.append(craft(ATTACK, net, x, y, precision))
            weight_step(net, list(net.parameters()), optimizer, None, images[-1], y, clip=5.0)
        crafted.append(torch.stack(images))
    assert [type(r) for r in recordings(recorded)] == [graphs.Recorded]
    assert recordings(launched) == []
    steps = (crafted[0] - crafted[1]).abs().amax((1, 2, 3, 4))
    assert (steps < 1e-6).all(), steps


def test_what_is_drawn_is_what_is_drawn_without_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a run would depend on which way was quicker."""
    states = []
    for on in (True, False):
        monkeypatch.setattr(graphs, "recordable", lambda device, on=on: on)
        torch.manual_seed(3)
        net = supernet()
        for _ in range(4):
            craft(ATTACK, net, *batch())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_does_not_pay_is_launched_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "pays", lambda launched, replayed_in: False)
    net = supernet()
    images = []
    for _ in range(4):
        torch.manual_seed(4)
        images.append(craft(ATTACK, net, *batch()))
    assert recordings(net) == [None]
    assert all(torch.equal(images[0], x) for x in images)


@pytest.mark.parametrize(("left", "kept"), [(600, True), (599, False)])
def test_a_recording_leaves_room_for_the_other_steps(left: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((left + 100, left))
    monkeypatch.setattr(graphs, "_free_memory", lambda device: next(free))
    net = supernet()
    for _ in range(3):
        craft(ATTACK, net, *batch())
    assert [r is not None for r in recordings(net)] == [kept]


def raising() -> None:
    raise torch.OutOfMemoryError("out of memory\nand a long explanation")


def recording_fails(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    run()
    raising()
    raise AssertionError


def replay_fails(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    torch.rand(1)
    return raising, run()


def result_is_wrong(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    replay, output = emulated(run, device)
    return replay, 1 - output


def draws_are_too_many(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    replay, output = emulated(run, device)
    return lambda: (replay(), torch.rand(1), None)[-1], output


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (recording_fails, "out of memory\\)"),
        (replay_fails, "out of memory\\)"),
        (result_is_wrong, "another result"),
        (draws_are_too_many, "another result"),
    ],
)
def test_a_recording_that_fails_is_reported_and_not_tried_again(
    failing: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and random numbers are then those that there would have been without any recording."""
    net = supernet()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "recordable", lambda device: False)
        torch.manual_seed(5)
        expected = [craft(ATTACK, net, *batch()) for _ in range(4)]
        drawn = torch.get_rng_state()
    tries = []
    monkeypatch.setattr(graphs, "record", lambda run, device: (tries.append(device), failing(run, device))[-1])
    torch.manual_seed(5)
    with pytest.warns(RuntimeWarning, match=message) as warned:
        images = [craft(ATTACK, net, *batch()) for _ in range(4)]
    assert (len(warned), len(tries), recordings(net)) == (1, 1, [None])
    assert all(torch.equal(a, b) for a, b in zip(expected, images, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_network_that_has_diverged_is_no_news_here(recwarn: pytest.WarningsRecorder) -> None:
    net = supernet()
    with torch.no_grad():
        net.classifier.weight.fill_(torch.nan)
    for _ in range(3):
        assert craft(PGD(steps=2, norm="l2"), net, *batch()).isnan().any()
    assert len(recordings(net)) == 1
    assert not recwarn


def test_other_images_and_moved_weights_are_recorded_anew() -> None:
    net = supernet()
    for n in (4, 2):
        for _ in range(3):
            craft(ATTACK, net, *batch(n))
    assert len(recordings(net)) == 2
    before = [p.data for p in net.parameters()]
    for p in net.parameters():
        p.data = 2 * p.data
    assert {t.data_ptr() for t in before}.isdisjoint(p.data_ptr() for p in net.parameters())
    craft(ATTACK, net, *batch())
    assert recordings(net) == [], "those on the old weights are gone"


def test_only_networks_that_are_known_whole_are_recorded() -> None:
    class Annealed(nn.Module):
        """What it computes depends on more than parameters and buffers."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
            self.temperature = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) / self.temperature

    net = Annealed()
    for _ in range(3):
        craft(ATTACK, net, *batch())
    assert recordings(net) == []
    ours = supernet()
    for _ in range(3):
        craft(ATTACK, ours, *batch())
    assert len(recordings(ours)) == 1
    seen = []
    ours.classifier.register_forward_hook(lambda *_: seen.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.Recorded, "__call__", lambda *_: pytest.fail("replayed, though somebody listens"))
        craft(ATTACK, ours, *batch())


def test_seeded_attacks_and_those_that_stop_early_are_not_recorded() -> None:
    net = supernet()
    for attack in (PGD(steps=1, seed=0), PGD(steps=1, any_iterate=True)):
        for _ in range(3):
            craft(attack, net, *batch())
    assert recordings(net) == []


def test_a_network_takes_its_recordings_with_it() -> None:
    net = supernet()
    for _ in range(3):
        craft(ATTACK, net, *batch())
    (recorded,) = recordings(net)
    gone = weakref.ref(net), weakref.ref(recorded)
    del net, recorded
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_recordings_can_be_given_up() -> None:
    net = supernet()
    for _ in range(3):
        craft(ATTACK, net, *batch())
    graphs.forget(net)
    assert recordings(net) == []
    graphs.forget(net)


def test_a_result_is_nobody_elses_memory() -> None:
    net = supernet()
    results = [craft(ATTACK, net, *batch(seed=s)) for s in range(3)]
    kept = results[-1].clone()
    results.append(craft(ATTACK, net, *batch(seed=3)))
    assert torch.equal(results[2], kept)


@pytest.mark.parametrize(
    ("setting", "version", "expected"),
    [(None, "2.13.0", True), (None, "2.11.0", False), ("1", "2.11.0", True), ("0", "2.13.0", False)],
)
def test_the_environment_switches_it_off_and_on(
    setting: str | None, version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    if setting is None:
        monkeypatch.delenv("RNAS_CUDA_GRAPHS", raising=False)
    else:
        monkeypatch.setenv("RNAS_CUDA_GRAPHS", setting)
    assert graphs.recordable(torch.device("cuda")) is expected
    assert not graphs.recordable(torch.device("cpu"))
    assert graphs.pays(1.0, 0.5)
    assert not graphs.pays(0.5, 1.0)
