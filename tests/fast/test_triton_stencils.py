"""The kernels of the fast supernet in Triton, against torch: without a GPU by Triton's interpreter, on small images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from rnas.fast import cuda as fast_gpu
from rnas.fast import supernet as fast
from rnas.fast import triton as fast_triton
from rnas.fast.kernels.stencils import Passed, Stencil, convolve, kernel_grad, mix, pass_back, pass_on, spread
from rnas.fast.supernet import FastSupernet
from rnas.genotype import OPERATIONS
from rnas.settings import SearchSpace
from supernets import alphas, weights, with_alphas

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see conftest.py
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
B, E, C, H, W = 2, 2, 3, 4, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got.double() - wanted.double()).norm()) < 1e-5 * float(wanted.double().norm())


class Case:
    """A stencil of E edges, and what torch says of it."""

    def __init__(self, k: int, stride: int, dilation: int, h: int, w: int):
        self.stencil = Stencil(random(E * C, 1, k, k), stride, dilation)
        b = B if h * w < 128 else 1  # the interpreter takes its time
        self.shared, self.each = random(b, C, h, w), random(b, E, C, h, w)
        self.out = random(b, E, C, -(-h // stride), -(-w // stride))
        self.weight = random(E, C, C)

    def convolved(self, x: Tensor, kernel: Tensor | None = None) -> Tensor:
        kernel = self.stencil.kernel if kernel is None else kernel
        if x.ndim == 4:
            x = x[:, None].expand_as(self.each)
        padding = self.stencil.dilation * (kernel.shape[-1] // 2)
        wide = F.conv2d(x.flatten(1, 2), kernel, None, self.stencil.stride, padding, self.stencil.dilation, E * C)
        return wide.view_as(self.out)

    def mixed(self, x: Tensor) -> Tensor:
        return torch.einsum("edc,bechw->bedhw", self.weight, x)

    def input_grad(self, x: Tensor) -> Tensor:
        """From `out` as the gradient of the stencil's output."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.convolved(x), x, self.out)[0]


@pytest.fixture(
    params=[
        (3, 1, 1, 4, 5),
        (5, 2, 2, 4, 5),
        (3, 1, 2, 8, 9),
        *(
            pytest.param(p, marks=pytest.mark.slow if INTERPRETED else ())
            for p in ((5, 1, 1, 13, 11), (3, 1, 2, 13, 11), (5, 2, 1, 26, 22))
        ),
    ],
    ids=lambda p: "k{} stride {} dilation {} {}x{}".format(*p),
)
def case(request: pytest.FixtureRequest) -> Case:
    """A thread has one pixel of the output, or two of a column from 64 pixels on, or four from 128 on; 13 rows leave
    some of the four below the image."""
    return Case(*request.param)


def test_depthwise_convolutions(case: Case) -> None:
    for x in (case.shared, case.each):
        assert_close(convolve(x, case.stencil, torch.empty_like(case.out)), case.convolved(x))


def test_depthwise_and_pointwise_convolutions_in_one(case: Case) -> None:
    out, bias = torch.empty_like(case.out), random(E * C)
    assert_close(
        mix(case.shared, case.weight, out, case.stencil, relu=True), case.mixed(case.convolved(case.shared.relu()))
    )
    mixed = case.mixed(case.convolved(case.each))
    assert_close(mix(case.each, case.weight, case.out.clone(), case.stencil, add=True), case.out + mixed)
    biased = (mixed + bias.view(1, E, C, 1, 1)).relu()
    assert_close(mix(case.each, case.weight, out, case.stencil, bias=bias), biased)
    back = torch.einsum("edc,bedhw->bechw", case.weight, case.out)
    assert_close(mix(case.out, case.weight.transpose(1, 2), out), back)


@pytest.mark.parametrize("d", [17, 33])
def test_with_more_channels_a_thread_has_fewer_pixels(d: int) -> None:
    x, weight, kernel = random(1, 2, 12, 11), random(1, d, 2), random(2, 1, 3, 3)
    wanted = torch.einsum("edc,bchw->bedhw", weight, F.conv2d(x, kernel, padding=1, groups=2))
    assert_close(mix(x, weight, torch.empty_like(wanted), Stencil(kernel)), wanted)


def test_an_image_of_several_tiles() -> None:
    x, kernel = random(1, 1, 26, 22), random(1, 1, 3, 3)
    wanted = F.conv2d(x, kernel, padding=1)[:, None]
    assert_close(convolve(x, Stencil(kernel), torch.empty_like(wanted)), wanted)


def test_infinity_touches_no_other_tap() -> None:
    """13 rows leave pixels below the image, with no gradient; its product with infinity would be NaN."""
    x = random(1, 1, 13, 11)
    x[..., -1, 0] = torch.inf
    got = kernel_grad(x, Stencil(random(1, 1, 3, 3)), torch.ones(1, 1, 1, 13, 11, device=DEVICE))
    assert got[0, 0].isfinite().tolist() == [[True, True, True], [False, False, True], [False, False, True]]


def test_the_gradient_through_both(case: Case) -> None:
    if case.stencil.stride != 1:
        pytest.skip("the second convolutions of an operation have stride 1")
    mask = torch.randn_like(case.each)
    wanted = torch.einsum("edc,bedhw->bechw", case.weight, case.input_grad(case.each) * (mask > 0))
    out = mix(case.out, case.weight.transpose(1, 2), torch.empty_like(case.out), case.stencil, flip=True, mask=mask)
    assert_close(out, wanted)


def test_gradients_of_depthwise_convolutions(case: Case) -> None:
    assert_close(spread(case.out, case.stencil, torch.empty_like(case.each)), case.input_grad(case.each))
    summed = case.input_grad(case.shared)
    assert_close(spread(case.out, case.stencil, torch.empty_like(case.shared)), summed)
    added = spread(case.out, case.stencil, case.shared.clone(), mask=case.shared, add=True)
    assert_close(added, case.shared + summed * (case.shared > 0))
    for x in (case.shared, case.each):
        kernel = case.stencil.kernel.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(case.convolved(x, kernel), kernel, case.out)
        assert_close(kernel_grad(x, case.stencil, case.out), wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("which", ["node max avg", "max avg", "max", "avg", "node", ""])
def test_what_is_passed_on_of_a_node_and_its_pools(which: str, stride: int) -> None:
    if stride == 2 and "node" in which:
        pytest.skip("a node is passed on as it is without a stride")
    scales = [random(E * C) if name in which.split() else None for name in ("node", "max", "avg")]
    passed, bias, x = Passed(*scales, stride), random(E * C), random(B, C, H, W).requires_grad_()
    nodes = (
        x,
        F.max_pool2d(x, 3, stride, 1),
        F.avg_pool2d(x, 3, stride, 1, count_include_pad=False),
    )
    out = random(B, E, C, -(-H // stride), -(-W // stride))
    wanted = out + bias.view(1, E, C, 1, 1)
    for node, scale in zip(nodes, scales, strict=True):
        if scale is not None:
            wanted = wanted + node[:, None] * scale.view(1, E, C, 1, 1)
    got = out.clone()
    argmax = pass_on(x.detach(), passed, bias, got, add=True)
    assert_close(got, wanted.detach())
    if which:
        (gradient,) = torch.autograd.grad(wanted, x, out)
        assert_close(pass_back(out, passed, argmax, x.detach().clone(), add=True), x.detach() + gradient)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow if INTERPRETED else ())])
def test_a_supernet(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reduction cell; `fast_gpu` is its other form, and that is tested against the plain supernet."""
    monkeypatch.setattr(fast, "on_cpu", lambda x: False)
    operations = tuple(name for name in OPERATIONS if not (INTERPRETED and "5x5" in name))  # which take it minutes
    space = SearchSpace(cells=3, channels=2, nodes=1, operations=operations)
    net = with_alphas(FastSupernet(space, 3)).to(DEVICE).train(train)
    for alpha in alphas(net):
        alpha.data.normal_()
    x = torch.rand(2, 3, 8, 8, device=DEVICE).requires_grad_()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = []
    for backend in (fast_gpu.OnGpu(), fast_triton.OnTriton()):
        monkeypatch.setattr(fast, "backend_for", lambda x, train=False, recorded=False, backend=backend: backend)
        net.load_state_dict(state)
        logits = net(x, weights(net)) if train else net.frozen_view(weights(net))(x)
        wanted = [x, *net.thetas, *alphas(net)] if train else [x]
        found.append([logits, *torch.autograd.grad(logits.square().sum(), wanted), *map(torch.clone, net.buffers())])
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_has_diverged_stays_so() -> None:
    """NaN passes through ReLUs and pools, as in torch; the hardware's maximum would make it 0."""
    x = torch.full((1, 1, 2, 2), float("nan"), device=DEVICE)
    one, kernel = torch.ones(1, 1, 1, device=DEVICE), Stencil(torch.ones(1, 1, 3, 3, device=DEVICE))
    out, bias = torch.zeros(1, 1, 1, 2, 2, device=DEVICE), torch.zeros(1, device=DEVICE)
    assert mix(x, one, out.clone(), kernel, relu=True).isnan().all()
    assert mix(x, one, out.clone(), kernel, bias=bias).isnan().all()
    pass_on(x, Passed(None, torch.ones(1, device=DEVICE), None), bias, out)
    assert out.isnan().all()


def test_all_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not. In a process of its own that compiles for an H100, without
    one: of each kernel one that a search launches."""
    program = """
from benchmarks import search_step, triton_kernels
from rnas.settings import SearchSpace

search_step.SearchSpace = lambda: SearchSpace(cells=3, channels=4, nodes=1)
launches = [launch for step in ("pgd", "weight") for launch in triton_kernels.launches_of(step, 8)]
for name, launch in {launch.kernel.__name__: launch for launch in launches}.items():
    found = triton_kernels.compiled(launch, 90)
    assert found.loop["loads"] or found.once["loads"], name
    print(name)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stencils = "_mix _stencil _spread _kernel_grad _pass _pass_grad"
    assert {*done.stdout.split()} == {*f"{stencils} _chunk_statistics _normalize _chunk_gradients _gradients".split()}
