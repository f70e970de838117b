"""Recorded attacks and steps, without a GPU: the recording is emulated, operation by operation, on the CPU.

As with a CUDA graph, what is replayed reads and writes the memory that was there when it was recorded: a number that
the host had read, or a tensor that somebody replaces, would be stale. CUDA itself is not emulated (test_gpu.py).
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.precision import Precision
from rnas.fast import recording as graphs
from rnas.fast.supernet import FastSupernet
from rnas.nas.methods.rnas import Settings as Search
from rnas.nas.search import search
from rnas.nets.zoo import build
from rnas.settings import Perturbation, SearchSpace, Source, Train
from rnas.training.adversarial import craft_trades
from rnas.training.step import differentiated
from rnas.training.train import train
from supernets import craft, given, searching, weight_step
from tape import Tape

ATTACK = PGD(steps=2)
Values = tuple[Tensor, ...]
Recording = tuple[Callable[[], None], Values]


def emulated(run: Callable[[], Values], device: torch.device) -> Recording:
    with Tape() as tape:
        output = run()
    return tape.replay, output


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where replaying is always quicker."""
    monkeypatch.setattr(graphs, "recordable", lambda device: True)
    monkeypatch.setattr(graphs, "record", emulated)
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: True)


def batch(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n)


def supernet() -> FastSupernet:
    return FastSupernet(SearchSpace(cells=2, channels=4, nodes=2), 10)


def recordings(net: nn.Module, kind: graphs.Kind = graphs.ATTACK) -> list[graphs.Recorded | None]:
    kept = graphs._kept.get(net)
    return [] if kept is None else [r for key, r in kept.recorded.items() if key[0] is kind]


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
        ("RNAS-L", Precision(), "TRADES"),
        ("RNAS-L", Precision(), "PGD"),
        ("ResNet18", Precision(), "PGD"),
    ],
)
def test_replays_follow_the_network_and_the_images(
    name: str, precision: Precision, crafting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, α and running statistics change in place from step to step: the recording folds them anew."""
    monkeypatch.setattr("rnas.fast.supernet.on_cpu", lambda x: False)
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
                images.append(craft_trades(ATTACK, net, x, precision))
            else:
                images.append(craft(ATTACK, net, x, y, precision))
            weight_step(net, list(net.parameters()), optimizer, None, images[-1], y, clip=5.0)
        crafted.append(torch.stack(images))
    assert [type(r) for r in recordings(recorded)] == [graphs.Recorded]
    assert [type(r) for r in recordings(recorded, graphs.WEIGHTS)] == [graphs.Recorded]
    assert launched not in graphs._kept
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
    monkeypatch.setattr(graphs, "is_quicker", lambda launched, replayed_in: False)
    net = supernet()
    images = []
    for _ in range(4):
        torch.manual_seed(4)
        images.append(craft(ATTACK, net, *batch()))
    assert recordings(net) == [None]
    assert all(torch.equal(images[0], x) for x in images)


@pytest.mark.parametrize(("free", "kept"), [(800, True), (799, False)])
def test_a_recording_leaves_room_for_the_other_steps(free: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack takes 100, so does its recording, and seven times as much must be left, or else none is tried."""
    monkeypatch.setattr(graphs, "_free_memory", lambda device: free)
    monkeypatch.setattr(graphs, "_weighed", lambda run, device: (run(), 100))
    if not kept:
        monkeypatch.setattr(graphs, "record", lambda run, device: pytest.fail("there is no room"))
    net = supernet()
    for _ in range(3):
        craft(ATTACK, net, *batch())
    assert [r is not None for r in recordings(net)] == [kept]


def raising() -> None:
    raise RuntimeError("not permitted\nand a long explanation")


def recording_fails(run: Callable[[], Values], device: torch.device) -> Recording:
    run()
    raising()
    raise AssertionError


def memory_is_short(run: Callable[[], Values], device: torch.device) -> Recording:
    run()
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    finally:
        raising()  # as the end of the recording does then


def replay_fails(run: Callable[[], Values], device: torch.device) -> Recording:
    torch.rand(1)
    return raising, run()


def result_is_wrong(run: Callable[[], Values], device: torch.device) -> Recording:
    replay, values = emulated(run, device)
    return replay, (1 - values[0], *values[1:])


def draws_are_too_many(run: Callable[[], Values], device: torch.device) -> Recording:
    replay, values = emulated(run, device)
    return lambda: (replay(), torch.rand(1), None)[-1], values


FAILING = [
    (recording_fails, "not permitted\\)"),
    (replay_fails, "not permitted\\)"),
    (result_is_wrong, "another result"),
    (draws_are_too_many, "another result"),
    (memory_is_short, None),
]


@pytest.mark.parametrize(("failing", "message"), FAILING)
def test_a_recording_that_fails_is_reported_and_not_tried_again(
    failing: Callable[..., Any], message: str | None, monkeypatch: pytest.MonkeyPatch
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
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        images = [craft(ATTACK, net, *batch()) for _ in range(4)]
    told = [str(w.message) for w in warned]
    assert re.fullmatch(f"an attack .*{message}.*", *told) if message else not told, "lack of memory is no fault"
    assert (len(tries), recordings(net)) == (1, [None])
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


# ---- training steps --------------------------------------------------------------------------------------------

STEPS = (graphs.WEIGHTS, graphs.ALPHAS, graphs.PROJECTION)


def search_steps(net: FastSupernet, precision: str = "fp32", rounds: int = 4) -> list[Tensor]:
    """All that a few steps of a search return, and the state that they leave behind."""
    torch.manual_seed(6)
    engine = searching(net, ATTACK, precision=precision, lr=0.05, weight_decay=1e-3, clip=1.0)
    returned: list[Tensor] = []
    for step in range(rounds):
        x, y = batch(seed=step)
        slope = engine.descend_weights(engine.adversarial(x, y), y)
        returned += [slope.loss, slope.aux]
        slope = engine.method.descend_alphas(engine, 1 - x, y.flip(0))
        returned += [slope.loss, slope.aux]
        f, grads = engine.method.slope_of_f(engine, x, 1 - x, scale=0.1)
        returned += [f, *(g.clone() for g in grads)]
        engine.measure([(x, y)])  # in eval mode, in between
    values = [v for v in net.state_dict().values() if isinstance(v, Tensor)]
    return [*returned, *values, torch.get_rng_state()]


def training_steps(net: nn.Module, beta: float | None, rounds: int = 4) -> list[Tensor]:
    """The same of a training, of two epochs with a drop-path of their own."""
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    returned: list[Tensor] = []
    for epoch in range(2):
        if hasattr(net, "set_drop_path"):
            net.set_drop_path(0.3 * epoch)
        for step in range(rounds):
            x, y = batch(seed=step)
            returned += weight_step(net, list(net.parameters()), optimizer, ATTACK, x, y, clip=1.0, trades_beta=beta)
        net.eval()
    return [*returned, *net.state_dict().values(), torch.get_rng_state()]


def assert_alike(got: list[Tensor], wanted: list[Tensor]) -> None:
    for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert (g.double() - w.double()).abs().max() <= 1e-5 * w.double().abs().max().clamp_min(1e-3), k


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Callable[[Any], Any]], tuple[Any, Any]]:
    """What a function returns for a network: launched, of a copy of it, and recorded."""

    def both(net: nn.Module, function: Callable[[Any], Any]) -> tuple[Any, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "recordable", lambda device: False)
            launched = function(copy.deepcopy(net))
        return launched, function(net)

    return both


@pytest.mark.parametrize(
    ("precision", "save_memory"),
    [
        ("fp32", False),
        ("bf16", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
    ],
)
def test_replayed_steps_follow_the_search(precision: str, save_memory: bool, form: None, twins: Callable) -> None:
    """Images, labels, weights, α and running statistics are those of the moment, and the results the caller's."""
    net = supernet()
    net.save_memory(save_memory)
    launched, recorded = twins(net, lambda net: search_steps(net, precision))
    assert_alike(recorded, launched)
    assert [[type(r) for r in recordings(net, kind)] for kind in STEPS] == 3 * [[graphs.Recorded]]


@pytest.mark.parametrize(
    ("name", "beta"),
    [
        ("RNAS-L", 6.0),
        ("ResNet18", None),
        pytest.param("RNAS-L", None, marks=pytest.mark.slow),
        pytest.param("ResNet18", 6.0, marks=pytest.mark.slow),
    ],
)
def test_replayed_steps_follow_a_training(name: str, beta: float | None, twins: Callable) -> None:
    """Each epoch's drop-path is another recording, and it draws; of the epoch before none is kept."""
    net = NETS[name]()
    launched, recorded = twins(net, lambda net: training_steps(net, beta))
    assert_alike(recorded, launched)
    assert [type(r) for r in recordings(net, graphs.WEIGHTS)] == [graphs.Recorded]
    assert len(recordings(net)) == 1, "the attack's stays: it sees no drop-path, whatever the mode"


def test_a_cell_that_is_computed_twice_is_not_recorded(twins: Callable) -> None:
    """With random numbers in it: torch reads their state, which no recording may."""
    net = NETS["RNAS-L"]()
    net.save_memory()
    launched, recorded = twins(net, lambda net: training_steps(net, None))
    assert_alike(recorded, launched)
    assert recordings(net, graphs.WEIGHTS) == []


def gradient_is_wrong(run: Callable[[], Values], device: torch.device, net: nn.Module) -> Recording:
    replay, values = emulated(run, device)
    wrong = list(net.parameters())[-2].grad
    return lambda: (replay(), wrong.zero_(), None)[-1], values


def statistics_stay(run: Callable[[], Values], device: torch.device, net: nn.Module) -> Recording:
    replay, values = emulated(run, device)
    variances = [b for name, b in net.named_buffers() if name.endswith("running_var")]

    def part_of_it() -> None:
        kept = [v.clone() for v in variances]
        replay()
        torch._foreach_copy_(variances, kept)

    return part_of_it, values


def count_stays(run: Callable[[], Values], device: torch.device, net: nn.Module) -> Recording:
    replay, values = emulated(run, device)
    count = next(b for name, b in net.named_buffers() if name.endswith("num_batches_tracked"))
    return lambda: (replay(), count.sub_(1), None)[-1], values


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        *((lambda run, device, net, f=f: f(run, device), message) for f, message in FAILING),
        (gradient_is_wrong, "another result"),
        (statistics_stay, "another result"),
        (count_stays, "another result"),
    ],
)
def test_a_step_whose_recording_fails_is_the_step(
    failing: Callable[..., Any], message: str | None, twins: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, running statistics and random numbers too are those of launched steps, bit for bit."""
    net = NETS["RNAS-L"]()
    net.set_drop_path(0.3)
    monkeypatch.setattr(graphs, "record", lambda run, device: failing(run, device, net))
    x, y = batch()

    def steps(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(4):
            weight_step(net, list(net.parameters()), optimizer, None, x, y, clip=1.0)
        return [*net.state_dict().values(), torch.get_rng_state()]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        launched, recorded = twins(net, steps)
    told = [str(w.message) for w in warned]
    assert re.fullmatch(f"a weight step .*{message}.*", *told) if message else not told
    assert recordings(net, graphs.WEIGHTS) == [None]
    assert all(torch.equal(a, b) for a, b in zip(launched, recorded, strict=True))


def test_a_gradient_of_rounding_alone_is_no_other_result() -> None:
    """That of a bias before BN, say; but a missing gradient, a wrong one, or all of them a little, are."""
    wanted = [torch.rand(100), 1e-7 * torch.randn(10), None]
    assert graphs._same_gradients([wanted[0] * 1.01, 1e-7 * torch.randn(10), None], wanted)
    for wrong in (
        [wanted[0] * 1.2, wanted[1], None],
        [wanted[0], torch.ones(10), None],
        [wanted[0], wanted[1], torch.zeros(3)],
        [wanted[0], None, None],
    ):
        assert not graphs._same_gradients(wrong, wanted)
    assert graphs._same_gradients([], [])
    assert graphs._same_gradients([None], [None])


def test_a_parameter_that_somebody_listens_to_is_not_recorded() -> None:
    net = NETS["ResNet18"]()
    heard: list[Tensor] = []
    net.classifier[-1].weight.register_hook(heard.append)
    training_steps(net, None, rounds=2)
    assert len(heard) == 4
    assert recordings(net, graphs.WEIGHTS) == []


def test_gradients_kept_or_changed_between_steps_do_no_harm(twins: Callable) -> None:
    """They are the recording's own memory: whatever happens to them, the next replay writes them anew."""

    def steps(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(8)
        parameters = list(net.parameters())
        optimizer = torch.optim.SGD(parameters, 0.05)
        for step in range(6):
            weight_step(net, parameters, optimizer, None, *batch(seed=step), clip=1.0)
            if step % 2:
                net.zero_grad(set_to_none=False)
            else:
                parameters[0].grad = None
        return list(net.state_dict().values())

    net = supernet()
    launched, recorded = twins(net, steps)
    assert_alike(recorded, launched)
    assert [type(r) for r in recordings(net, graphs.WEIGHTS)] == [graphs.Recorded]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Recorded]:
    """Those that were made."""
    made: list[graphs.Recorded] = []
    replay = graphs.Recorded.__call__
    monkeypatch.setattr(
        graphs.Recorded, "__call__", lambda self, *inputs: (made.append(self), replay(self, *inputs))[1]
    )
    return made


def test_a_whole_search_is_the_same_recorded(
    tmp_path: Path, replays: list[graphs.Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projection with moves of its own included; then its memory is given back."""
    settings = Search(
        out=tmp_path,
        source=Source(data="digits", limit_per_class=14),
        space=SearchSpace(cells=2, channels=4, nodes=2),
        perturbation=Perturbation(attack_steps=2),
        epochs=3,
        warmup=1,
        bound="0.5x",
        batch_size=16,
        alpha_lr=0.01,
        projection_steps=10,
        monitor=32,
    )
    folders = []
    for on in (False, True):
        monkeypatch.setattr(graphs, "recordable", lambda device, on=on: on)
        folders.append(tmp_path / f"recorded-{on}")
        assert not replays
        search(replace(settings, out=folders[-1]))
    # The attack, each of the three steps, and the weight step anew once the method knows its bound.
    assert len(set(map(id, replays))) == 5
    assert_same_states(*folders)


def test_a_whole_training_is_the_same_recorded(
    tmp_path: Path, replays: list[graphs.Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Train(
        arch="RNAS-L",
        out=tmp_path,
        source=Source(data="digits", limit_per_class=16),
        perturbation=Perturbation(attack_steps=2),
        cells=3,
        channels=4,
        epochs=3,
        batch_size=16,
        drop_path=0.3,
    )
    folders = []
    for on in (False, True):
        monkeypatch.setattr(graphs, "recordable", lambda device, on=on: on)
        folders.append(tmp_path / f"recorded-{on}")
        assert not replays
        net = train(replace(settings, out=folders[-1]))
        assert net not in graphs._kept
    assert len(replays) > 20
    assert_same_states(*folders)


def assert_same_states(a: Path, b: Path) -> None:
    """Of two runs' last checkpoints."""
    ours, theirs = (torch.load(f / "checkpoint.pt", map_location="cpu", weights_only=True)["net"] for f in (a, b))
    assert_alike(*([v for v in state.values() if isinstance(v, Tensor)] for state in (ours, theirs)))


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
    assert graphs.is_quicker(1.0, 0.5)
    assert not graphs.is_quicker(0.5, 1.0)


@pytest.mark.parametrize("precision", [Precision(), Precision(bf16=True)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.usefixtures("form")
def test_a_launched_step_leaves_nothing_that_ties_a_recording_to_its_stream(
    precision: Precision, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autograd keeps for a parameter as long as a pass lives remembers the pass's stream; nor is it left to the
    garbage collector. If the test itself keeps the logits, it is still there."""
    monkeypatch.setattr(graphs, "recordable", lambda device: False)
    net = supernet().train()
    hoard = []

    def node(p: Tensor) -> Any:
        return p.view_as(p).grad_fn.next_functions[0][0]

    def loss_of(net: FastSupernet, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = precision.of(net)(x, *given(net))
        hoard.extend([logits] * kept)
        for p in net.thetas:
            node(p).metadata["of the pass"] = True
        return nn.functional.cross_entropy(logits, y), logits

    gc.collect()
    gc.disable()
    try:
        differentiated(graphs.WEIGHTS, loss_of, net, batch(), net.thetas)
        assert any("of the pass" in node(p).metadata for p in net.thetas) == kept
    finally:
        gc.enable()
