"""Attacks compute in true float32 (or float64), and leave torch's precision settings as they found them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.attacks.test_basics import images, small_net
from torch import Tensor

from rnas.attacks import PGD
from rnas.compute.precision import PLACES, full_precision
from rnas.evaluation.battery import run_attacks

Set = Callable[[], None]


def place(backend: str, op: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, precision)


def older(name: str) -> object:
    """What the older API answers: "mixed" where torch refuses to say."""
    try:
        return {
            "matmul": torch.get_float32_matmul_precision,
            "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
            "cudnn": lambda: torch.backends.cudnn.allow_tf32,
        }[name]()
    except RuntimeError:
        return "mixed"


def everything() -> dict[object, object]:
    table: dict[object, object] = {p: torch._C._get_fp32_precision_getter(*p) for p in PLACES}
    return {**table, **{name: older(name) for name in ("matmul", "cublas", "cudnn")}}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for p in PLACES:
        if p not in (("cuda", "conv"), ("cuda", "rnn")):
            place(*p, "none")


def cudnn_parent() -> None:
    torch.backends.cudnn.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "none"


def generic() -> None:
    torch.backends.fp32_precision = "tf32"


def new_matmul() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_conv() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def old_flags() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


SETTINGS: list[Set] = [
    lambda: None,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: place("mkldnn", "all", "bf16"),
    old_flags,
    generic,
    cudnn_parent,
    new_matmul,
    new_conv,
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_setting_of_either_api_reaches_in_and_all_come_back(settings: Set) -> None:
    settings()
    before = everything()
    with full_precision():
        inside = everything()
        assert {inside[p] for p in PLACES} <= {"none", "ieee"}
        # Neither API is confused: compiled models and torch.backends.cudnn.flags ask the older one.
        assert (inside["matmul"], inside["cublas"], inside["cudnn"]) == ("highest", False, False)
    assert everything() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert everything() == before


def test_children_follow_their_parents_again_afterwards() -> None:
    """A value that was inherited must not be written down as the child's own."""
    generic()
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_reduced_precision_on_a_cpu_does_not_reach_a_model() -> None:
    a, b = torch.randn(2, 256, 256)
    exact = a @ b
    torch.set_float32_matmul_precision("medium")  # bf16, where the processor has it
    with full_precision():
        assert torch.equal(a @ b, exact)


def test_direct_calls_are_float32_under_the_callers_autocast() -> None:
    net, (x, y) = small_net().eval(), images()
    seen: set[torch.dtype] = set()

    def watched(x: Tensor) -> Tensor:
        logits: Tensor = net(x)
        seen.add(logits.dtype)
        return logits

    attack = PGD(eps=0.1, step=0.03, steps=3, seed=0)
    expected = attack(net, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(net, x, y), expected)
        attack(watched, x, y)
        run_attacks(watched, x, y, ["pgd2"], eps=0.1)
        assert seen == {torch.float32}
        attack.perturb(watched, x, y)  # training chooses for itself
        assert seen == {torch.float32, torch.bfloat16}
