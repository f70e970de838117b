"""Evaluations that can be trusted: successes re-checked, kills survived, self-deception noticed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks.test_basics import images, small_net
from torch import Tensor, nn

import rnas
from rnas.attacks import APGD, CW, FAB, FGSM, PGD, Attack, AutoAttack, Square
from rnas.attacks.autoattack import standard
from rnas.attacks.fab import projection
from rnas.attacks.norms import Norm
from rnas.compute.freezing import Model
from rnas.errors import RnasError
from rnas.evaluation import battery as evaluation
from rnas.evaluation import trust
from rnas.evaluation.battery import NAMES, attack_named, run_attacks
from rnas.evaluation.verdicts import STATE

EPS = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack's parts with fewer steps: the contracts do not depend on them."""

    def member(name: str, eps: float, norm: Norm, seed: int | None, rows: int | None = None) -> Attack:
        match name:
            case "apgd-ce" | "apgd-dlr" | "apgd-margin":
                return APGD(eps=eps, norm=norm, loss=name[5:], steps=10, seed=seed, rows=rows)  # type: ignore[arg-type]
            case "apgd-t":
                return APGD(eps=eps, norm=norm, loss="dlr-targeted", steps=10, seed=seed, rows=rows)
            case "fab-t":
                return FAB(eps=eps, norm=norm, steps=5, seed=seed, rows=rows)
        return Square(eps=eps, norm=norm, queries=30, seed=seed, rows=rows)

    monkeypatch.setattr(evaluation, "member", member)
    monkeypatch.setattr("rnas.attacks.autoattack.member", member)


def fitted(classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and 24 images that it classifies correctly with margins of all sizes."""
    net = small_net(classes).eval()
    x, _ = images(24)
    with torch.no_grad():
        logits = net(x)
        net[5].weight.mul_(8)
        net[5].bias.copy_(-(8 * (logits - net[5].bias)).mean(0))
        return net, x, net(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_is_at_least_as_strong_as_each_of_its_members(norm: Norm) -> None:
    net, x, y = fitted()
    eps = EPS if norm == "linf" else 0.2
    result = run_attacks(net, x, y, ["aa", *standard(5)], eps=eps, norm=norm)
    assert 0 < result.masks["aa"].sum() < 24
    for name in standard(5):
        assert not (result.masks["aa"] & ~result.masks[name]).any()
    alone = AutoAttack(eps=eps, norm=norm, seed=0)(net, x, y)
    assert np.array_equal((net(alone).argmax(1) == y).numpy(), result.masks["aa"])


def test_each_attack_of_autoattack_sees_only_what_the_ones_before_left() -> None:
    net, x, y = fitted()
    seen: list[tuple[str, int, int]] = []
    run_attacks(
        net, x, y, ["aa"], eps=EPS, progress=lambda name, done, total, left, _: seen.append((name, total, left))
    )
    assert [name for name, _, _ in seen] == [f"aa/{name}" for name in standard(5)]
    assert seen[0][1] == 24
    assert all(total == left for (_, _, left), (_, total, _) in itertools.pairwise(seen))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_gradients_off(context: type[torch.no_grad]) -> None:
    net, x, y = fitted()
    names = ["fgsm", "pgd3", "pgd3-any", "cw-l2", "aa"]
    expected = run_attacks(net, x, y, names, eps=EPS).masks
    with context():
        masks = run_attacks(net, x, y, names, eps=EPS).masks
        x_adv = AutoAttack(eps=EPS, seed=0)(net, x, y)
    assert all(np.array_equal(masks[name], expected[name]) for name in names)
    assert np.array_equal((net(x_adv).argmax(1) == y).numpy(), expected["aa"])


def test_any_iterate_is_at_least_as_strong_as_the_last() -> None:
    net, x, y = fitted()
    masks = run_attacks(net, x, y, ["pgd5", "pgd5-any"], eps=EPS).masks
    assert not (masks["pgd5-any"] & ~masks["pgd5"]).any()


def test_neither_order_nor_batch_size_changes_a_verdict() -> None:
    """In float64, where what a batch's size changes in the last digit carries no image over the boundary."""
    net, x, y = fitted()
    net, x = net.double(), x.double()
    names = ["pgd5", "cw-l2", "aa"]
    masks = run_attacks(net, x, y, names, eps=EPS).masks
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    others = run_attacks(net, x[order], y[order], names, eps=EPS, batch_size=5).masks
    for name in names:
        assert np.array_equal(masks[name][order.numpy()], others[name])


def test_a_linear_model_falls_exactly_where_its_margin_says() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn((5, 3 * 64), generator=generator)
    x = 0.3 + 0.4 * torch.rand((24, 3, 8, 8), generator=generator)  # no pixel can reach a face of the box

    def linear(x: Tensor) -> Tensor:
        return x.flatten(1) @ w.T

    y = linear(x).argmax(1)
    z = linear(x)
    reach = (w[None] - w[y][:, None]).abs().sum(2)  # what each rival can gain per unit of ε
    reach[torch.arange(24), y] = torch.inf
    least = ((z.gather(1, y[:, None]) - z) / reach).masked_fill(reach.isinf(), torch.inf).amin(1)
    eps = float(least.median()) * 1.03
    clear = ((least / eps - 1).abs() > 0.02).numpy()  # FAB ends its search close to the boundary, not on it
    assert clear.sum() > 20
    masks = run_attacks(linear, x, y, ["cw", "fab-t", "apgd-t"], eps=eps).masks
    for name in ("cw", "fab-t", "apgd-t"):
        assert np.array_equal(masks[name][clear], (least > eps).numpy()[clear]), name


def test_a_network_that_is_only_fooled_in_its_fast_form_is_attacked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = fitted()

    class Lenient(nn.Module):
        """Right about everything in its fast form only when it is not attacked."""

        def forward(self, x: Tensor) -> Tensor:
            return net(x)  # type: ignore[no-any-return]

        def frozen_view(self) -> Model:
            return lambda x: net((x * 4).round() / 4) + x.mean() * 0

    honest = run_attacks(net, x, y, ["pgd10"], eps=EPS).masks["pgd10"]
    verdict = run_attacks(Lenient(), x, y, ["pgd10"], eps=EPS).masks["pgd10"]
    assert not (honest & ~verdict).any()  # no success is counted that the model itself does not confirm


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_any_number_of_classes_from_two(classes: int) -> None:
    net, x, y = fitted(classes)
    result = run_attacks(net, x, y, ["aa"], eps=EPS)
    assert result.masks["aa"].sum() < 24
    assert any("APGD-T needs 3 classes" in w for w in result.warnings) == (classes == 2)
    if classes == 2:
        for name in ("apgd-t", "apgd-dlr"):
            with pytest.raises(RnasError, match="3 classes"):
                run_attacks(net, x, y, [name], eps=EPS)
            with pytest.raises(RnasError, match="3 classes"):
                attack_named(name, EPS)(net, x, y)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_killed_evaluation_goes_on_to_the_same_masks(tmp_path: Path, after: int) -> None:
    net, x, y = fitted()
    names = ["pgd5", "aa", "square"]
    whole = run_attacks(net, x, y, names, eps=EPS, batch_size=8)
    calls = 0

    def kill(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Killed

    with pytest.raises(Killed):
        run_attacks(net, x, y, names, eps=EPS, batch_size=8, state=tmp_path, progress=kill)
    resumed = run_attacks(net, x, y, names, eps=EPS, batch_size=8, state=tmp_path)
    assert all(np.array_equal(whole.masks[name], resumed.masks[name]) for name in whole.masks)
    again: list[object] = []
    run_attacks(net, x, y, names, eps=EPS, batch_size=8, state=tmp_path, progress=lambda *a: again.append(a))
    assert again == []


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from rnas.evaluation.battery import run_attacks
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
x = torch.rand(20, 3, 8, 8)
y = net(x).argmax(1)
kill = len(sys.argv) > 2
def progress(name, done, *_):
    if kill and name == "cw" and done == 15:
        os.kill(os.getpid(), signal.SIGKILL)
r = run_attacks(net, x, y, ["pgd3", "cw"], eps=0.03, batch_size=5, state=Path(sys.argv[1]), progress=progress)
print("".join(str(int(v)) for name in ("pgd3", "cw") for v in r.masks[name]))
"""


def test_sigkill_leaves_a_state_that_can_be_continued(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)

    assert run(str(tmp_path / "a"), "kill").returncode == -signal.SIGKILL
    resumed, whole = run(str(tmp_path / "a")), run(str(tmp_path / "b"))
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout
    assert set(whole.stdout.strip()) == {"0", "1"}


def test_a_state_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    net, x, y = fitted()
    run_attacks(net, x, y, ["fgsm"], eps=EPS, state=tmp_path)
    with pytest.raises(RnasError, match="eps"):
        run_attacks(net, x, y, ["fgsm"], eps=2 * EPS, state=tmp_path)
    with torch.no_grad():
        net[5].bias.add_(1)
    with pytest.raises(RnasError, match="model"):
        run_attacks(net, x, y, ["fgsm"], eps=EPS, state=tmp_path)
    for damaged in ("", "[]", json.dumps({"identity": {}, "verdicts": {}, "seconds": {}})):
        (tmp_path / STATE).write_text(damaged)
        with pytest.raises(RnasError, match=STATE):
            run_attacks(net, x, y, ["fgsm"], eps=EPS, state=tmp_path)


class Doubled(nn.Module):
    """The weights of another network with a forward of its own."""

    def __init__(self, net: nn.Module, factor: float = 2.0) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)  # type: ignore[no-any-return]


class Shifted(Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0 * self.factor  # type: ignore[no-any-return]


class Named(Doubled):
    pass


class Rounded(torch.autograd.Function):
    """Rounding, with the gradient of the identity as a stand-in for its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def others() -> dict[str, tuple[Model, Model]]:
    """Pairs of models that share weights, or that nothing but their answers or gradients tells apart."""
    net, _, _ = fitted()
    return {
        "callables": (lambda x: net(x), lambda x: 2 * net(x)),
        "forwards": (Doubled(net), Shifted(net)),
        "attributes": (Doubled(net), Doubled(net, 3.0)),
        "classes": (Doubled(net), Named(net)),
        "offsets": (lambda x: net(x), lambda x: net(x) + 1),
        "black boxes": (lambda x: net(x).detach(), lambda x: 2 * net(x).detach()),
        "stand-ins": (lambda x: net((4 * x).round() / 4), lambda x: net(Rounded.apply(x))),
    }


@pytest.mark.parametrize("pair", others())
def test_a_state_of_another_model_is_refused(pair: str, tmp_path: Path) -> None:
    _, x, y = fitted()
    one, other = others()[pair]
    run_attacks(one, x, y, ["square"], eps=EPS, state=tmp_path)
    run_attacks(one, x, y, ["square"], eps=EPS, state=tmp_path)
    with pytest.raises(RnasError, match=r"another evaluation \(other (model|answers|gradients)"):
        run_attacks(other, x, y, ["square"], eps=EPS, state=tmp_path)


def test_a_state_is_known_again_in_another_mode_by_another_name_and_after_rounding(tmp_path: Path) -> None:
    net, x, y = fitted()
    run_attacks(net, x, y, ["fgsm"], eps=EPS, state=tmp_path / "module")
    run_attacks(net.train(), x, y, ["fgsm"], eps=EPS, state=tmp_path / "module")
    net.eval()
    run_attacks(lambda x: net(x), x, y, ["fgsm"], eps=EPS, state=tmp_path / "callable")
    run_attacks(lambda z: net(z * (1 + 1e-6)), x, y, ["fgsm"], eps=EPS, state=tmp_path / "callable")


def test_a_randomised_model_can_be_resumed(tmp_path: Path) -> None:
    net, x, y = fitted()

    def noisy(x: Tensor) -> Tensor:
        return net(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]

    first = run_attacks(noisy, x, y, ["fgsm"], eps=EPS, state=tmp_path)
    again = run_attacks(noisy, x, y, ["fgsm"], eps=EPS, state=tmp_path)
    # What is broken stays so; the clean pass, which is not kept, may differ.
    assert not (again.masks["fgsm"] & ~first.masks["fgsm"] & first.masks["clean"]).any()


class Clock:
    """Every batch takes a second for each image that it holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        genuine = evaluation.confirmed

        def counted(attack: Attack, plain: Model, net: Model, x: Tensor, y: Tensor) -> Tensor:
            self.now += len(x)
            return genuine(attack, plain, net, x, y)

        monkeypatch.setattr(evaluation, "confirmed", counted)
        monkeypatch.setattr(evaluation.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("names", [["aa", "apgd-ce", "square"], ["square", "apgd-ce", "aa"]])
def test_seconds_are_what_an_attack_took_whoever_ran_it_first(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = fitted()
    Clock(monkeypatch)
    alone = {name: run_attacks(net, x, y, [name], eps=EPS, batch_size=7).seconds[name] for name in names}
    assert alone["aa"] > alone["apgd-ce"] == alone["square"] == 24
    assert run_attacks(net, x, y, [*names, *names], eps=EPS, batch_size=7).seconds == pytest.approx(alone)
    told: dict[str, float] = {}
    together = run_attacks(
        net, x, y, names, eps=EPS, batch_size=7, progress=lambda *a: told.update({a[0].partition("/")[0]: a[4]})
    )
    assert together.seconds == pytest.approx(alone)
    assert told[names[0]] == pytest.approx(alone[names[0]])
    calls = 0

    def kill(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed

    with pytest.raises(Killed):
        run_attacks(net, x, y, names, eps=EPS, batch_size=7, state=tmp_path, progress=kill)
    resumed = run_attacks(net, x, y, names, eps=EPS, batch_size=7, state=tmp_path)
    assert resumed.seconds == pytest.approx(alone, rel=1e-3)


def torn(path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the process dies at the `after`-th file: written beside its place, not yet renamed into it."""
    genuine, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            (path / "left behind.tmp").write_bytes(Path(source).read_bytes()[:100])  # what no cleaning up reached
            raise Killed
        genuine(source, target)

    monkeypatch.setattr("rnas.files.os.replace", replace)


def test_a_kill_between_writing_and_renaming_a_file_loses_one_batch(tmp_path: Path) -> None:
    net, x, y = fitted()
    names = ["fgsm", "aa"]
    whole = run_attacks(net, x, y, names, eps=EPS, batch_size=12)
    after, died = 0, True
    while died:
        after += 1
        folder = tmp_path / str(after)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            torn(folder, after, monkeypatch)
            try:
                run_attacks(net, x, y, names, eps=EPS, batch_size=12, state=folder)
                died = False
            except Killed:
                pass
        resumed = run_attacks(net, x, y, names, eps=EPS, batch_size=12, state=folder)
        assert all(np.array_equal(whole.masks[name], resumed.masks[name]) for name in whole.masks)
    assert after > 6


@pytest.mark.parametrize("name", ["", "pgd", "pgd0", "pgd20-all", "auto-attack", "PGD20", "fgsm "])
def test_unknown_attacks_are_refused_before_anything_runs(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        raise AssertionError("the model was asked")

    with pytest.raises(RnasError, match="unknown attack"):
        run_attacks(model, *images(), ["fgsm", name], eps=EPS)


def test_every_listed_attack_exists_and_steps_are_a_quarter_of_eps() -> None:
    assert all(attack_named(name, 0.1) for name in NAMES if name != "aa")
    assert attack_named("pgd20", 8 / 255, seed=None) == PGD(steps=20, eps=8 / 255, step=2 / 255)
    assert attack_named("cw", 8 / 255, seed=None) == CW()


def counting(net: nn.Module) -> tuple[Model, list[int]]:
    """The network, and how many images it is asked about, question by question."""
    asked: list[int] = []

    def model(x: Tensor) -> Tensor:
        asked.append(len(x))
        return net(x)  # type: ignore[no-any-return]

    return model, asked


def test_no_more_images_than_the_batch_size_are_worked_on_at_a_time() -> None:
    """What bounds the memory, with nine targets and the self-checks too."""
    net, x, y = fitted(12)
    model, asked = counting(net)
    names = ["fgsm", "pgd3", "pgd3-any", "cw", "cw-l2", "aa"]
    run_attacks(model, x, y, names, eps=EPS, batch_size=5)
    assert max(asked) == 5


@pytest.mark.parametrize("name", ["pgd9-any", "apgd-ce", "square"])
def test_an_image_that_broke_is_asked_about_no_more(name: str) -> None:
    net, x, y = fitted()
    model, asked = counting(net)
    x_adv = attack_named(name, 2 * EPS, seed=0, rows=1).perturb(model, x, y)  # 1: a pass asks about an image once
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == 24
    assert asked[-1] < 24
    assert asked[-1] >= int((net(x_adv).argmax(1) == y).sum())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, z: (x + 0.5, y, z), r"\[0,1\]"),
        (lambda x, y, z: (x, y + 5 * (torch.arange(24) == 23), z), "classes 0 to 4"),
        (lambda x, y, z: (x, y - 5 * (torch.arange(24) == 23), z), "classes 0 to 4"),
        (lambda x, y, z: (x, y[:23], z), "one for each image"),
        (lambda x, y, z: (x, y, lambda x: z(x)[0]), "for 8 images"),
        (lambda x, y, z: (x, y, lambda x: z(x)[:, :, None]), "for 8 images"),
        (lambda x, y, z: (x, y, lambda x: z(x) / (x - 0.5).abs().amax((1, 2, 3)).sign()[:, None]), "NaN or infinite"),
        (lambda x, y, z: (x, y, lambda x: (z(x),)), "tuple"),
        (lambda x, y, z: (x, y, lambda x: None), "NoneType"),
    ],
)
def test_bad_input_is_found_before_the_first_step_even_in_the_last_batch(
    spoil: Callable[[Tensor, Tensor, Model], tuple[Tensor, Tensor, Model]], message: str, tmp_path: Path
) -> None:
    net, x, y = fitted()
    x[-1] = 0.5
    x, y, model = spoil(x, y, net)
    with pytest.raises(RnasError, match=message):
        run_attacks(model, x, y, ["square"], eps=EPS, batch_size=8, state=tmp_path, progress=pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("eps", "norm"), [(0, "linf"), (-EPS, "l2"), (float("nan"), "l2"), (8, "linf"), (EPS, "l1")])
def test_impossible_threats_are_refused_before_the_model_is_asked(eps: float, norm: Norm) -> None:
    model, asked = counting(small_net())
    with pytest.raises(RnasError):
        run_attacks(model, *images(), ["cw-l2"], eps=eps, norm=norm)
    for kind in (APGD, AutoAttack, CW, FAB, FGSM, PGD, Square):
        with pytest.raises(RnasError):
            kind(eps=eps, norm=norm)(model, *images())  # type: ignore[operator]
    assert asked == []


def test_a_state_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    net, x, y = fitted()
    (tmp_path / "file").write_text("")
    with pytest.raises(RnasError, match="cannot write"):
        run_attacks(net, x, y, ["fgsm"], eps=EPS, state=tmp_path / "file", progress=pytest.fail)


# --- self-checks ----------------------------------------------------------------------------------------------------


def steep(net: nn.Module) -> Model:
    """Gradient masking: a steep sigmoid before the logits changes no verdict and saturates every gradient."""
    return lambda x: torch.sigmoid(1e4 * (net(x) - net(x).mean(1, keepdim=True)))


def test_an_honest_network_raises_no_warning() -> None:
    net, x, y = fitted()
    assert run_attacks(net, x, y, ["pgd10", "square"], eps=EPS).warnings == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (steep, "gradients vanish"),
        (steep, "does not fall as eps grows"),
        (lambda net: nn.Sequential(net, nn.Softmax(1)), "probabilities"),
        (lambda net: lambda x: net(x + 0.1 * torch.randn_like(x)), "randomised"),
    ],
)
def test_self_deception_is_noticed(spoil: object, message: str) -> None:
    net, x, _ = fitted()
    model = spoil(net)  # type: ignore[operator]
    with torch.no_grad():
        y = model(x).argmax(1)
    assert any(message in warning for warning in run_attacks(model, x, y, ["fgsm"], eps=EPS).warnings)


def test_a_constant_model_is_not_called_robust() -> None:
    x, y = images(24)
    result = run_attacks(lambda x: 9 * torch.eye(5)[:1].expand(len(x), 5) + 0 * x.mean(), x, y, ["aa"], eps=EPS)
    assert np.array_equal(result.masks["aa"], (y == 0).numpy())
    assert len(result.warnings) == 1  # neither vanishing gradients nor failing attacks: it has but one answer
    assert "answers class 0 to 100.0% of the images" in result.warnings[0]
    wrong = run_attacks(
        lambda x: 9 * torch.eye(5)[:1].expand(len(x), 5) + 0 * x.mean(), x, y * 0 + 1, ["fgsm"], eps=EPS
    )
    assert wrong.warnings == ["the model classifies no image correctly"]


def test_a_black_box_attack_that_wins_over_masked_gradients_is_noticed() -> None:
    net, x, y = fitted()
    warnings = run_attacks(steep(net), x, y, ["pgd10", "square"], eps=0.1).warnings
    assert any("square, a black-box attack, breaks" in w for w in warnings)


def test_an_attack_without_a_radius_does_not_hide_that_accuracy_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cw-l2 breaks at some distance is still a survivor at ε, which is what the check looks at."""

    def bright(x: Tensor) -> Tensor:
        """Class 1 for images that are brighter than grey."""
        rise = (x.mean((1, 2, 3)) - 0.5).unsqueeze(1)
        return torch.cat([torch.ones_like(rise), 1 + 200 * rise], dim=1)

    checked: list[int] = []
    genuine = trust.insensitive_to_eps

    def watched(net: Model, x: Tensor, y: Tensor, *, eps: float, norm: Norm) -> str | None:
        checked.append(len(x))
        return genuine(net, x, y, eps=eps, norm=norm)

    monkeypatch.setattr(trust, "insensitive_to_eps", watched)
    x, y = torch.full((4, 3, 8, 8), 0.45), torch.zeros(4, dtype=torch.int64)
    masks = run_attacks(bright, x, y, ["cw-l2", "fgsm"], eps=0.01).masks
    assert not masks["cw-l2"].any()
    assert masks["fgsm"].all()
    assert checked == [4]


def test_a_black_box_attack_that_wins_is_noticed() -> None:
    tried, holds = np.ones(10, dtype=bool), np.ones(10, dtype=bool)
    beaten = holds.copy()
    beaten[:3] = False
    for white, accused in (("pgd20", False), ("apgd-ce", False), ("cw", True), ("apgd-t", True), ("fab-t", True)):
        said = str(trust.black_box_wins({white: (tried, holds), "pgd7": (tried, holds), "square": (tried, beaten)}))
        assert ("may be masked" in said) == accused, white
        assert ("run aa" in said) != accused, white
    assert "3 images" in str(trust.black_box_wins({"pgd20": (tried, holds), "square": (tried, beaten)}))
    assert trust.black_box_wins({"pgd20": (tried, beaten), "square": (tried, beaten)}) is None
    assert trust.black_box_wins({"fgsm": (tried, holds), "square": (tried, beaten)}) is None


# --- the projection of FAB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_projection_beside_a_harder_image(norm: Norm) -> None:
    """A plane out of reach, with a coordinate that does not matter: its answer does not depend on its neighbours."""
    t = torch.full((2, 4), 0.5)
    w = torch.tensor([[1.0, 2.0, 0.0, 1.0], [1.0, 0.1, 0.01, 3.0]])
    rise = torch.tensor([9.0, 1.9])
    alone, beside = projection(t[:1], w[:1], rise[:1], norm), projection(t, w, rise, norm)
    assert torch.isfinite(beside).all()
    torch.testing.assert_close(beside[:1], alone)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 40))
def test_fab_projection_reaches_the_plane_and_nothing_nearer_does(norm: Norm, seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand((1, size), generator=generator, dtype=torch.float64).round(decimals=1)
    w = torch.randn((1, size), generator=generator, dtype=torch.float64)
    w[:, ::4] = 0
    rise = 0.5 * torch.randn(1, generator=generator, dtype=torch.float64)
    d = projection(t, w, rise, norm)
    assert float((t + d).min()) >= -1e-12
    assert float((t + d).max()) <= 1 + 1e-12
    most = torch.where(w * rise > 0, w * (1 - t), -w * t).sum() * rise.sign()
    if float(most.abs()) < float(rise.abs()):  # out of reach: the corner
        torch.testing.assert_close((w * d).sum(1).abs(), most.abs())
        return
    torch.testing.assert_close((w * d).sum(1), rise, atol=1e-9, rtol=1e-9)
    length = d.abs().max() if norm == "linf" else d.norm()
    # Whatever else reaches the plane is no shorter: random feasible points, moved onto the plane where possible.
    other = (torch.rand((200, size), generator=generator, dtype=torch.float64) - t) * w.ne(0)
    gain = (other * w).sum(1)
    scale = rise / gain
    reaching = other[(scale > 0) & (scale <= 1)] * scale[(scale > 0) & (scale <= 1)][:, None]
    lengths = reaching.abs().amax(1) if norm == "linf" else reaching.norm(dim=1)
    assert bool((lengths >= length - 1e-9).all())


def test_arguments_of_other_kinds_are_named() -> None:
    x, y = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    with pytest.raises(RnasError, match=r"images are a ndarray: expected a torch\.Tensor"):
        rnas.evaluate(model, x.numpy(), y, ["fgsm"])
    with pytest.raises(RnasError, match=r"labels are a list: expected a torch\.Tensor"):
        rnas.evaluate(model, x, y.tolist(), ["fgsm"])
    with pytest.raises(RnasError, match=r"attacks is 'pgd2': expected a list of names, such as \['pgd2'\]"):
        rnas.evaluate(model, x, y, "pgd2")
    result = rnas.evaluate(model, x, y, ["pgd2"])
    with pytest.raises(RnasError, match="unknown attack of this evaluation 'aa': known are pgd2"):
        result.robust("aa")
