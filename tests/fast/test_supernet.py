"""The fast supernet is the plain one: same parameters, outputs, gradients and running statistics, whatever the mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnas.attacks import PGD
from rnas.compute.freezing import frozen
from rnas.compute.precision import full_precision
from rnas.fast.cpu_kernels import depthwise, depthwise_input_grad, depthwise_weight_grad
from rnas.fast.supernet import FastCell, FastSupernet
from rnas.genotype import OPERATIONS
from rnas.nets.space import CellWeights, Shape
from rnas.nets.supernet import Supernet, SupernetCell
from rnas.settings import SearchSpace
from rnas.vulnerability import network_vulnerability
from supernets import alphas, searching, weights, with_alphas

SMALL = SearchSpace(cells=4, channels=4, nodes=3)  # normal, reduction, reduction, normal
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def assert_equal(a: list[Tensor], b: list[Tensor], dtype: torch.dtype, scale: float | None = None) -> None:
    assert len(a) == len(b)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert p.shape == q.shape
        difference = distance(p, q) if scale is None else float((p - q).abs().max()) / scale
        assert difference < TOLERANCE[dtype], f"tensor {i} of shape {tuple(p.shape)} differs by {difference:.1e}"


def pair(
    space: SearchSpace = SMALL, dtype: torch.dtype = torch.float64, alpha: str = "random", seed: int = 0
) -> tuple[Supernet, FastSupernet]:
    """A plain and a fast supernet with the same random weights, α and running statistics."""
    torch.manual_seed(seed)
    plain, fast = with_alphas(Supernet(space, 10)).to(dtype), with_alphas(FastSupernet(space, 10)).to(dtype)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    for a in alphas(plain):
        a.data.normal_()
        if alpha == "one-hot":  # a softmax of (0, …, 0, 60, 0, …, 0) is one up to rounding
            a.data.copy_(60 * F.one_hot(torch.randint(len(space.operations), (len(a),)), len(space.operations)))
    fast.load_state_dict(plain.state_dict())
    return plain, fast


in_both_forms = pytest.mark.usefixtures("form")


def images(n: int = 3, size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def everything(net: Supernet, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and running statistics; and the gradients of a loss on them for the images and every parameter."""
    x = x.clone().requires_grad_()
    logits, cells = net.forward_cells(x, weights(net))
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), device=x.device)
    for out in (logits, *cells):
        loss = loss + (out * torch.randn(out.shape, generator=generator, dtype=out.dtype).to(x.device)).mean()
    gradients = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True, materialize_grads=True)
    return [logits.detach(), *(c.detach() for c in cells), *(b.clone() for b in net.buffers())], list(gradients)


def compare(plain: Supernet, fast: FastSupernet, x: Tensor) -> None:
    (values, gradients), (fast_values, fast_gradients) = everything(plain, x), everything(fast, x)
    assert_equal(values, fast_values, x.dtype)
    # A gradient that is zero but for rounding has no digits to compare: measure each by the largest of its kind.
    scale = max(float(g.abs().max()) for g in gradients) if x.dtype == torch.float32 else None
    assert_equal(gradients, fast_gradients, x.dtype, scale)


@in_both_forms
@pytest.mark.parametrize("alpha", ["random", "one-hot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_equals_the_plain_supernet(train: bool, dtype: torch.dtype, alpha: str) -> None:
    plain, fast = pair(dtype=dtype, alpha=alpha)
    compare(plain.train(train), fast.train(train), images(dtype=dtype))


@in_both_forms
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("after_reduction", [False, True])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("column", [None, *range(len(OPERATIONS))], ids=["mixed", *OPERATIONS])
def test_every_cell_and_operation(column: int | None, reduction: bool, after_reduction: bool, train: bool) -> None:
    space = SearchSpace(nodes=2)
    torch.manual_seed(3)
    plain = SupernetCell(Shape(space), 6, 8, 4, reduction, after_reduction).double().train(train)
    fast = FastCell(Shape(space), 6, 8, 4, reduction, after_reduction).double().train(train)
    fast.load_state_dict(plain.state_dict())
    shape = (space.edges, len(OPERATIONS))
    one_hot = torch.zeros(shape, dtype=torch.float64)
    if column is not None:
        one_hot[:, column] = 1
    size = 16 if after_reduction else 8
    results = []
    for cell in (plain, fast):
        generator = torch.Generator().manual_seed(4)
        s0 = torch.randn(3, 6, size, size, generator=generator, dtype=torch.float64).requires_grad_()
        s1 = torch.randn(3, 8, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
        weights = torch.rand(shape, generator=generator, dtype=torch.float64) if column is None else one_hot.clone()
        weights.requires_grad_()
        out = cell(s0, s1, CellWeights(weights))
        gradients = torch.autograd.grad(
            (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum(),
            [s0, s1, weights, *cell.parameters()],
            allow_unused=True,
            materialize_grads=True,
        )
        results.append([out.detach(), *gradients, *cell.buffers()])
    assert_equal(*results, torch.float64, scale=1.0)


@settings(max_examples=16, deadline=None)
@given(
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3, unique=True).filter(
        lambda o: o != ["none"]
    ),
    channels=st.integers(1, 3),
    nodes=st.integers(1, 3),
    cells=st.integers(1, 4),
    batch=st.integers(2, 5),
    size=st.sampled_from([8, 12]),
    train=st.booleans(),
    as_on_gpu=st.booleans(),
)
def test_any_space(
    operations: list[str], channels: int, nodes: int, cells: int, batch: int, size: int, train: bool, as_on_gpu: bool
) -> None:
    space = SearchSpace(cells=cells, channels=channels, nodes=nodes, operations=tuple(operations))
    plain, fast = pair(space)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if as_on_gpu:
            monkeypatch.setattr("rnas.fast.supernet.on_cpu", lambda x: False)
        (values, gradients), (fast_values, fast_gradients) = (
            everything(net.train(train), images(batch, size)) for net in (plain, fast)
        )
    assert_equal(values, fast_values, torch.float64)
    assert_equal(gradients, fast_gradients, torch.float64, scale=max(float(g.abs().max()) for g in gradients))


def test_one_seed_gives_both_the_same_start_and_state_dicts_are_interchangeable() -> None:
    torch.manual_seed(5)
    plain = with_alphas(Supernet(SMALL, 10))
    torch.manual_seed(5)
    fast = with_alphas(FastSupernet(SMALL, 10))
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fast.named_parameters()]
    assert len(plain.thetas) == len(fast.thetas)
    plain.load_state_dict(fast.state_dict())


@in_both_forms
def test_a_copy_has_weights_of_its_own() -> None:
    _, fast = pair()
    twin = copy.deepcopy(fast).eval()
    before = fast.eval()(images(), weights(fast)).detach()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(fast(images(), weights(fast)), before)
    assert not torch.allclose(twin(images(), weights(twin)), before)


@in_both_forms
def test_two_passes_share_one_backward() -> None:
    x = images(4)
    gradients = []
    nets = pair()
    for net in nets:
        clean, adversarial = net.forward_cells(x, weights(net))[1], net.forward_cells(1 - x, weights(net))[1]
        gradients.append(torch.autograd.grad(network_vulnerability(clean, adversarial), alphas(net)))
    assert_equal(*map(list, gradients), torch.float64)
    assert_equal(*(list(net.buffers()) for net in nets), torch.float64)


@in_both_forms
def test_only_what_is_wanted_is_differentiated() -> None:
    plain, fast = pair()
    for net in (plain, fast):
        for p in net.thetas:
            p.requires_grad_(False)
    loss, fast_loss = (F.cross_entropy(net(images(), weights(net)), torch.tensor([0, 1, 2])) for net in (plain, fast))
    fast_loss.backward()
    assert all(p.grad is None for p in fast.thetas)
    gradients = torch.autograd.grad(loss, alphas(plain))
    assert_equal(list(gradients), [a.grad for a in alphas(fast) if a.grad is not None], torch.float64)


@in_both_forms
def test_saving_memory_changes_nothing() -> None:
    plain, fast = pair()
    fast.save_memory()
    compare(plain.train(), fast.train(), images())


@in_both_forms
def test_frozen_equals_eval_mode_and_leaves_the_network_alone() -> None:
    plain, fast = pair()
    fast.train()
    before = {name: t.clone() for name, t in fast.state_dict().items()}
    x = images().requires_grad_()
    plain_x = images().requires_grad_()
    with frozen(fast, weights(fast)) as view:
        logits = view(x)
        logits.square().sum().backward()
    expected = plain.eval()(plain_x, weights(plain))
    expected.square().sum().backward()
    assert x.grad is not None
    assert plain_x.grad is not None
    assert_equal([expected.detach(), plain_x.grad], [logits.detach(), x.grad], torch.float64)
    assert all(module.training for module in fast.modules())
    assert all(p.requires_grad and p.grad is None for p in fast.parameters())
    assert all(torch.equal(before[name], t) for name, t in fast.state_dict().items())


@in_both_forms
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), pytest.param(torch.float32, 1e-3, marks=pytest.mark.slow)]
)
def test_ten_steps_of_search_have_the_same_losses(dtype: torch.dtype, tolerance: float) -> None:
    """The search's own steps, attacks included: the losses of weights and α, and F, of the plain supernet. With an l_2
    attack, for in l_inf a pixel whose gradient is zero but for rounding may step either way."""
    traces = []
    for net in pair(SearchSpace(cells=3, channels=4, nodes=2), dtype):
        alpha = [a.detach().clone() for a in alphas(net)]
        engine = searching(net, PGD(eps=0.5, step=0.2, steps=2, random_start=False, norm="l2"))
        for a, value in zip(engine.method.parameters(), alpha, strict=True):
            a.data.copy_(value)
        x, y = images(16, 8, dtype), torch.arange(16) % 10
        trace = []
        for _ in range(10):
            trace.append(engine.descend_weights(engine.adversarial(x[:8], y[:8]), y[:8]).loss.item())
            trace.append(engine.method.descend_alphas(engine, x[8:], y[8:]).loss.item())
            trace.append(engine.method.vulnerability()(net, x[8:], engine.adversarial(x[8:], y[8:]))[1].item())
        traces.append(trace)
    assert traces[0][-3] < traces[0][0]
    assert traces[1] == pytest.approx(traces[0], rel=tolerance)


@in_both_forms
def test_one_value_per_channel_is_refused_as_by_torch() -> None:
    plain, fast = pair(SearchSpace(cells=1, channels=2, nodes=1))
    for net in (plain, fast):
        with pytest.raises(ValueError, match="more than"):
            net.train()(torch.rand(1, 3, 1, 1, dtype=torch.float64), weights(net))


@settings(max_examples=60, deadline=None)
@given(
    k=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_depthwise_gradients(k: int, stride: int, dilation: int, height: int, width: int) -> None:
    """Shifted, split into phases, padded: for every shape the gradients are torch's own."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, k, k, generator=generator, dtype=torch.float64, requires_grad=True)
    out = depthwise(x, weight, stride, dilation)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(out, [x, weight], grad)
    x, weight = x.detach(), weight.detach()
    assert_equal(
        list(expected),
        [
            depthwise_input_grad(x, weight, grad, stride, dilation),
            depthwise_weight_grad(x, weight, grad, stride, dilation),
        ],
        torch.float64,
        scale=1.0,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_a_gpu(dtype: torch.dtype, save_memory: bool) -> None:
    plain, fast = (net.cuda() for net in pair(dtype=dtype))
    fast.save_memory(save_memory)
    with full_precision():
        compare(plain.train(), fast.train(), images(dtype=dtype).cuda())
        compare(plain.eval(), fast.eval(), images(dtype=dtype).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 12])
def test_an_attack_on_a_gpu_sees_the_plain_supernet(size: int) -> None:
    """What it runs on there, `frozen_view`, in float32: logits and the images' gradient, but for a ReLU's input that is
    zero up to rounding."""
    plain, fast = (net.cuda().eval() for net in pair(SearchSpace(cells=4, channels=16), dtype=torch.float32))
    x = images(3, size, dtype=torch.float32).cuda().requires_grad_()
    with full_precision():
        (logits, gradient), (fast_logits, fast_gradient) = (
            (out.detach(), *torch.autograd.grad(out.square().sum(), x))
            for out in (plain(x, weights(plain)), fast.frozen_view(weights(fast))(x))
        )
    assert_equal([logits], [fast_logits], torch.float32)
    assert float((gradient - fast_gradient).norm() / gradient.norm()) < 0.02


def test_the_comparison_itself_runs_off_the_cpu() -> None:
    """Or else the test on a GPU would fail there, where nobody is looking."""
    for net in pair():
        values, gradients = everything(net.to("meta"), images().to("meta"))
        assert {t.device.type for t in (*values, *gradients)} == {"meta"}
