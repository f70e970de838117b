"""The Triton kernels of batch normalisation against torch, in float64; without a GPU in Triton's
interpreter (see conftest.py)."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rnas.fast.kernels import batch_norm as triton_batch_norm
from rnas.fast.kernels.batch_norm import Cut, normalized

EPS = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")


def reference(x: Tensor, scale: Tensor, plus: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, inverse_std = torch.native_batch_norm(x, scale, None, None, None, True, 0.0, EPS)
    out = out if plus is None else out + plus
    return (out.relu() if relu else out), mean, inverse_std


def apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference as a part of that of `b`."""
    return float(((a.double() - b).norm() / b.norm()).detach())


def check(
    shape: tuple[int, ...],
    with_plus: bool = False,
    relu: bool = False,
    *,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bar: float = 1e-5,
) -> None:
    """Results, statistics and all gradients; the reference computes in float64 from the same inputs."""
    own = [torch.randn(shape, device=device) + mean, torch.rand(shape[1], device=device) + 0.5]
    own[0] = own[0].to(dtype)
    own += [torch.randn(shape, device=device).to(dtype)] * with_plus
    grad = torch.randn(shape, device=device).to(dtype)
    exact = [t.double().requires_grad_() for t in own]
    for t in own:
        t.requires_grad_()
    x, scale, *plus = own
    out, *found = normalized(x, scale, EPS, *(plus or [None]), relu=relu)
    assert out.dtype == dtype
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in found)
    x, scale, *plus = exact
    expected, *statistics = reference(x, scale, plus[0] if plus else None, relu)
    for a, b in zip([out, *found], [expected, *statistics], strict=True):
        assert apart(a, b) < bar
    if relu:  # rounding decides alike for both which numbers pass
        expected = torch.where(out > 0, reference(x, scale, plus[0] if plus else None, False)[0], 0)
    expected.backward(grad.double())
    out.backward(grad)
    for a, b in zip(own, exact, strict=True):
        assert a.grad is not None
        assert a.grad.dtype == a.dtype
        assert apart(a.grad, b.grad) < bar


FORMS = [(with_plus, relu) for with_plus in (False, True) for relu in (False, True)]


@interpreted
@pytest.mark.parametrize(("with_plus", "relu"), FORMS)
def test_it_is_torchs(with_plus: bool, relu: bool) -> None:
    check((6, 3, 8, 8), with_plus, relu)


@interpreted
@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (5, 3, 7, 5), (37, 2, 3, 1), (3, 1, 40, 37), (33, 2, 32, 32)])
def test_no_shape_has_to_be_even(shape: tuple[int, ...]) -> None:
    check(shape, True, True)


@interpreted
def test_there_may_be_many_tiles_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_batch_norm, "TILE", 64)
    monkeypatch.setattr(triton_batch_norm, "CHUNKS", 4)
    assert Cut.of(torch.empty(30, 3, 9, 9))[2:5] == (8, 4, 4)
    check((30, 3, 9, 9), True, True)
    check((30, 3, 9, 9))


@interpreted
@pytest.mark.parametrize("mean", [30.0, -300.0])
def test_a_large_mean_costs_no_more_than_its_own_rounding(mean: float) -> None:
    check((50, 2, 8, 8), mean=mean, bar=1e-5 + abs(mean) * 2**-24)


@interpreted
def test_one_number_far_from_all_others_spoils_nothing() -> None:
    x = torch.randn(50, 2, 8, 8)
    x[0, :, 0, 0] = 1e4
    _, mean, inverse_std = normalized(x, torch.ones(2), EPS)
    _, *expected = reference(x.double(), torch.ones(2).double(), None, False)
    assert apart(mean, expected[0]) < 1e-5
    assert apart(inverse_std, expected[1]) < 1e-5


@interpreted
@pytest.mark.parametrize(("with_plus", "relu"), FORMS)
def test_bfloat16(with_plus: bool, relu: bool) -> None:
    check((9, 3, 8, 8), with_plus, relu, dtype=torch.bfloat16, bar=5e-3)


@interpreted
def test_only_what_is_needed_gets_a_gradient() -> None:
    x, plus = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    scale = torch.ones(3)
    normalized(x, scale, EPS, plus, relu=True)[0].sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    assert plus.grad is None


@interpreted
def test_a_gradient_may_lie_in_memory_as_it_likes() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    normalized(x, torch.ones(3), EPS, relu=True)[0].sum().backward()  # of strides 0
    expected = x.detach().clone().requires_grad_()
    reference(expected, torch.ones(3), None, True)[0].sum().backward()
    assert expected.grad is not None
    assert torch.allclose(x.grad, expected.grad, atol=1e-5)


@interpreted
def test_nan_stays_nan() -> None:
    assert normalized(torch.full((2, 1, 2, 2), torch.nan), torch.ones(1), EPS, relu=True)[0].isnan().all()


def test_there_are_enough_programs_and_few_chunks() -> None:
    for images in (128, 512):
        for channels in (16, 64, 256):
            for side in (32, 16, 8):
                cut = Cut.of(torch.empty(images, channels, side, side, device="meta"))
                assert cut.chunks <= 64
                assert cut.chunks * cut.share >= images > (cut.chunks - 1) * cut.share
                all_tiles = images * channels * side * side // 2048
                assert channels * cut.chunks >= min(4 * 132, all_tiles)


@pytest.mark.gpu
@pytest.mark.skipif("emulated_gpu" in sys.modules, reason="an emulated GPU runs no Triton kernels")
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs no kernels on a GPU")
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(
    "shape", [(128, 64, 32, 32), (128, 128, 16, 16), (512, 256, 8, 8), (7, 5, 9, 7), (2, 3, 65, 64)]
)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, bar: float) -> None:
    for with_plus, relu in FORMS:
        check(shape, with_plus, relu, dtype=dtype, device="cuda", bar=bar)
    check(shape, mean=100.0, dtype=torch.float32, device="cuda", bar=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif("emulated_gpu" in sys.modules, reason="an emulated GPU runs no Triton kernels")
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs no kernels on a GPU")
def test_a_gpu_gives_the_same_each_time_in_a_graph_too() -> None:
    x = torch.randn(128, 64, 16, 16, device="cuda", requires_grad=True)
    scale = torch.rand(64, device="cuda", requires_grad=True)

    def run() -> list[Tensor]:
        out, *statistics = normalized(x, scale, EPS, x.detach(), relu=True)
        return [out, *statistics, *torch.autograd.grad(out, (x, scale), out.detach())]

    stream = torch.cuda.Stream()  # kernels are compiled before, beside the stream that records
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    for a, b, c in zip(first, recorded, run(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
