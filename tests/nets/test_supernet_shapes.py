"""Supernets of other shapes, and other weights than a softmax of all operations: the fast one is the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnas.compute.freezing import frozen
from rnas.errors import RnasError
from rnas.fast import recording as graphs
from rnas.fast.cpu import OnCpu
from rnas.fast.cpu_kernels import channel_sum, depthwise, packed, packed_weight, pointwise, shuffled_together, unpacked
from rnas.fast.supernet import FastSupernet
from rnas.genotype import OPERATIONS
from rnas.nets.space import CellWeights, Mask, Shape, Weights
from rnas.nets.supernet import MixedOperation, Supernet, SupernetCell, shuffled
from rnas.settings import SearchSpace

SPACE = SearchSpace(cells=3, channels=4, nodes=2)  # normal, reduction, reduction
FEW = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3")
in_both_forms = pytest.mark.usefixtures("form")


def drawn_mask(space: SearchSpace, generator: torch.Generator, share: float = 0.4) -> Mask:
    """Every operation by chance; so some edges, and in a small space some nodes, have none."""
    drawn = torch.rand(space.edges, len(space.operations), generator=generator) < share
    return tuple(tuple(row) for row in drawn.tolist())


def drawn_weights(shape: Shape, generator: torch.Generator, hard: bool = False, live: bool = False) -> Weights:
    """Positive weights of every operation, or `hard` ones of 0 and 1; with `live` those the host knows to be 0."""
    space = shape.space
    rows = space.cells if shape.per_cell else 2
    mix = torch.rand(rows, space.edges, len(space.operations), generator=generator, dtype=torch.float64)
    if hard:
        mix = (mix < 0.3).double()
    masks = None
    if live:
        masks = tuple(drawn_mask(space, generator) for _ in range(rows))
        mix = mix * torch.tensor(masks)
    bypass = torch.rand(rows, space.edges, generator=generator, dtype=torch.float64)
    return Weights(tuple(mix), tuple(bypass) if shape.part > 1 else None, masks)


def pair(shape: Shape) -> tuple[Supernet, FastSupernet]:
    """A plain and a fast supernet with the same random weights and running statistics."""
    torch.manual_seed(0)
    plain, fast = Supernet(shape, 10).double(), FastSupernet(shape, 10).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def everything(net: Supernet, x: Tensor, weights: Weights) -> list[Tensor]:
    """Outputs, running statistics, and a loss's gradients for images, parameters, weights of operations."""
    x = x.clone().requires_grad_()
    form, given = weights.form, [t.clone().requires_grad_() for t in weights.tensors]
    torch.manual_seed(1)  # of a dropout
    logits, cells = net.forward_cells(x, form.filled(given))
    generator = torch.Generator().manual_seed(2)
    outputs = [logits, *cells]
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).mean() for o in outputs)
    wanted = [x, *net.parameters(), *given]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*(o.detach() for o in outputs), *(b.clone() for b in net.buffers()), *gradients]


def assert_same(shape: Shape, weights: Weights, train: bool, save_memory: bool = False, batch: int = 4) -> list[Tensor]:
    """That the fast supernet is the plain one; what that computes."""
    x = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, fast = pair(shape)
    fast.save_memory(save_memory)
    expected, got = (everything(net.train(train), x, weights) for net in (plain, fast))
    scale = max(float(t.abs().max()) for t in expected if t.is_floating_point())
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert a.shape == b.shape
        assert b.isfinite().all()
        assert (a - b).abs().max() < 1e-10 * scale, f"tensor {i} of shape {tuple(a.shape)}"
    return expected


@settings(max_examples=24, deadline=None)
@given(
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=4, unique=True).filter(
        lambda o: o != ["none"]
    ),
    seed=st.integers(0, 2**20),
    masked=st.booleans(),
    part=st.sampled_from([1, 2, 4]),
    per_cell=st.booleans(),
    hard=st.booleans(),
    live=st.booleans(),
    train=st.booleans(),
    batch=st.integers(2, 5),
    as_on_gpu=st.booleans(),
)
def test_any_shape_and_weights(
    operations: list[str],
    seed: int,
    masked: bool,
    part: int,
    per_cell: bool,
    hard: bool,
    live: bool,
    train: bool,
    batch: int,
    as_on_gpu: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    space = replace(SPACE, operations=tuple(operations))
    allowed = (drawn_mask(space, generator), drawn_mask(space, generator)) if masked else None
    shape = Shape(space, allowed, part, per_cell)
    weights = drawn_weights(shape, generator, hard, live)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if as_on_gpu:
            monkeypatch.setattr("rnas.fast.supernet.on_cpu", lambda x: False)
        assert_same(shape, weights, train, batch=batch)


@in_both_forms
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("part", [1, 4])
def test_nothing_on_any_edge_is_zero_and_finite(part: int, train: bool) -> None:
    """Known to the host, as weights alone, or because nothing is allowed: each node is what passes by its edges."""
    space = replace(SPACE, operations=FEW)
    off: Mask = ((False,) * len(FEW),) * space.edges
    shape = Shape(space, part=part)
    weights = drawn_weights(shape, torch.Generator().manual_seed(0))
    zero = weights._replace(mix=tuple(torch.zeros_like(m) for m in weights.mix))
    results = [
        assert_same(shape, zero._replace(live=(off, off)), train),
        assert_same(shape, zero, train),
        assert_same(replace(shape, allowed=(off, off)), weights, train),
    ]
    for of in results:
        for cell in of[1 : 1 + space.cells]:
            assert bool((cell == 0).all()) == (part == 1)
    assert all(torch.equal(a, b) for a, b in zip(*(of[: 1 + space.cells] for of in results[:2]), strict=True))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_what_is_live_changes_no_output(train: bool) -> None:
    """Zeros that the host knows are zeros: the same outputs and gradients of what is left. Operations that are off
    see nothing: their running statistics stay."""
    shape = Shape(replace(SPACE, operations=FEW))
    weights = drawn_weights(shape, torch.Generator().manual_seed(4), live=True)
    plain, fast = pair(shape)
    before = {name: b.clone() for name, b in fast.named_buffers()}
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    known, unknown = fast.train(train)(x, weights), plain.train(train)(x, weights._replace(live=None))
    assert torch.allclose(known, unknown, atol=1e-10)
    assert weights.live is not None
    off = [
        f"cells.{i}.edges.{edge}.operations.{k}."
        for i in range(SPACE.cells)
        for edge in range(SPACE.edges)
        for k in range(len(FEW))
        if not weights.live[fast.row(i)][edge][k]
    ]
    seen = dict(fast.named_buffers())
    assert all(torch.equal(seen[n], b) for n, b in before.items() if n.startswith(tuple(off)))
    assert sum(not torch.equal(seen[n], b) for n, b in before.items()) > 0 or not train


def test_what_is_not_allowed_is_not_built_and_nothing_else_is_renamed() -> None:
    space = replace(SPACE, operations=FEW)
    mask: Mask = tuple(tuple(k != edge % len(FEW) for k in range(len(FEW))) for edge in range(space.edges))
    whole, some = Supernet(space, 10), Supernet(Shape(space, allowed=(mask, mask)), 10)
    names = set(whole.state_dict())
    assert set(some.state_dict()) < names
    assert not any(".edges.3.operations.3." in name for name in some.state_dict())
    assert any(".edges.3.operations.3." in name for name in names)
    masked = tuple(torch.rand(space.edges, len(FEW)) * torch.tensor(mask) for _ in range(2))
    whole.load_state_dict({**whole.state_dict(), **some.state_dict()})
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(whole.eval()(x, Weights(masked)), some.eval()(x, Weights(masked)), atol=1e-6)


def test_a_channel_shuffle_by_hand() -> None:
    """Channel g·C/K + j becomes j·K + g: of 8 channels and K = 4 the order is 0 2 4 6 1 3 5 7."""
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert shuffled(x, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert shuffled_together(x[:, :2], x[:, 2:]).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(("images", "pack"), [(4, 4), (6, 4), (1, 2), (3, 1)])
def test_packed_images(images: int, pack: int) -> None:
    """Side by side in the channels: what is computed of them is computed of each."""
    x = torch.randn(images, 3, 4, 6)
    wide = packed(x, pack)
    assert wide.shape == (-(-images // pack), 3 * pack, 4, 6)
    assert torch.equal(unpacked(wide, pack, images), x)
    kernel, weight = torch.randn(3, 1, 3, 3), torch.randn(2, 3)
    seen = unpacked(depthwise(wide, packed_weight(kernel, pack), 1, 1), pack, images)
    assert torch.allclose(seen, depthwise(x, kernel, 1, 1), atol=1e-6)
    seen = unpacked(pointwise(wide, packed_weight(weight, pack)), pack, images)
    assert torch.allclose(seen, pointwise(x, weight), atol=1e-6)
    assert torch.allclose(channel_sum(wide, pack), channel_sum(x).repeat(pack), atol=1e-5)


def test_a_network_is_told_that_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In train mode Triton's kernels pay in a recording alone; who records says so, and takes it back."""
    told = []
    monkeypatch.setattr(
        "rnas.fast.supernet.backend_for", lambda x, train=False, recorded=False: told.append(recorded) or OnCpu()
    )
    shape = Shape(replace(SPACE, operations=FEW))
    weights, (_, fast) = drawn_weights(shape, torch.Generator()), pair(shape)
    assert isinstance(fast, graphs.TellsRecorded)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with fast.recorded():
        fast(x, weights)
    fast(x, weights)
    assert told == [True] * SPACE.cells + [False] * SPACE.cells


@pytest.mark.parametrize("reduction", [False, True])
def test_part_channels_are_the_published_cell(reduction: bool) -> None:
    """As PC-DARTS defines it, edge by edge: mix the first C/K channels, join the others, shuffle, weigh by β, sum."""
    shape = Shape(SearchSpace(channels=8, nodes=2, operations=FEW), part=4)
    cell = SupernetCell(shape, 8, 16, 8, reduction, False).double().eval()
    s0, s1 = torch.randn(2, 8, 8, 8).double(), torch.randn(2, 16, 8, 8).double()
    alpha = torch.rand(5, len(FEW)).double().softmax(1)
    beta = torch.cat([b.softmax(0) for b in torch.rand(5).double().split([2, 3])])
    got = cell(s0, s1, CellWeights(beta[:, None] * alpha, beta))

    def edge(row: int, x: Tensor, stride: int) -> Tensor:
        mixed, others = cell.edges[row](x[:, :2], alpha[row]), x[:, 2:]
        return shuffled(torch.cat([mixed, F.max_pool2d(others, 2) if stride == 2 else others], 1), 4)

    a, b, stride = cell.pre0(s0), cell.pre1(s1), 2 if reduction else 1
    c = beta[0] * edge(0, a, stride) + beta[1] * edge(1, b, stride)
    d = beta[2] * edge(2, a, stride) + beta[3] * edge(3, b, stride) + beta[4] * edge(4, c, 1)
    assert torch.allclose(got, torch.cat([c, d], 1))


@in_both_forms
@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("part", [1, 2])
def test_dropped_skips(part: int, live: bool, save_memory: bool) -> None:
    """A dropout after stride-1 skips, drawn before a cell: computed again it is the same, and in eval mode there is
    none."""
    shape = Shape(replace(SPACE, operations=FEW), part=part)
    weights = drawn_weights(shape, torch.Generator().manual_seed(5), live=live)
    dropping = weights._replace(dropout=torch.tensor(0.4, dtype=torch.float64))
    dropped = assert_same(shape, dropping, train=True, save_memory=save_memory)
    assert not torch.allclose(dropped[0], assert_same(shape, weights, train=True)[0])
    assert torch.equal(assert_same(shape, dropping, train=False)[0], assert_same(shape, weights, train=False)[0])


def test_dropout_keeps_the_mean_and_touches_stride_1_skips_alone() -> None:
    cell = SupernetCell(Shape(replace(SPACE, operations=FEW)), 4, 8, 4, reduction=True, after_reduction=False)
    kept = cell.draw_kept(torch.zeros(50, 8, 16, 16), torch.tensor(0.3))
    assert cell.skipping == [4]  # of a reduction cell's edges only the one between its nodes has stride 1
    assert kept.shape == (1, 50, 4, 8, 8)
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    edge = MixedOperation(Shape(replace(SPACE, operations=FEW)), False, 0, 4, 1)
    x, weights = torch.rand(2, 4, 8, 8), torch.tensor([0.0, 0.0, 0.5, 0.0])
    mask = (torch.rand_like(x) < 0.5).float()
    assert torch.equal(edge(x, weights, kept=mask), 0.5 * x * mask)


@in_both_forms
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("part", [1, 4])
def test_frozen_is_eval_mode(part: int, live: bool) -> None:
    shape = Shape(SPACE, part=part, per_cell=True)
    weights = drawn_weights(shape, torch.Generator().manual_seed(6), live=live)
    plain, fast = pair(shape)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    results = []
    for net in (plain, fast):
        seen = x.clone().requires_grad_()
        with frozen(net.train(), weights) as view:
            logits = view(seen)
        results.append((logits, torch.autograd.grad(logits.square().sum(), seen)[0]))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))


def test_a_part_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(RnasError):
        Shape(SPACE, part=3)


def test_weights_taken_apart_and_put_together() -> None:
    shape = Shape(SPACE, part=2, per_cell=True)
    weights = drawn_weights(shape, torch.Generator(), live=True)._replace(dropout=torch.tensor(0.1))
    again = weights.form.filled(weights.tensors)
    assert again == weights
    assert hash(again.form) == hash(weights.form)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_shapes_on_a_gpu(train: bool) -> None:
    """Masks, part channels, weights of each cell, operations that are off, a dropout: as in the same form on a CPU."""
    generator = torch.Generator().manual_seed(7)
    space = replace(SPACE, operations=FEW)
    shape = Shape(space, (drawn_mask(space, generator), drawn_mask(space, generator)), part=2, per_cell=True)
    weights = drawn_weights(shape, generator, live=True)
    plain, fast = (net.cuda().train(train) for net in pair(shape))
    on_gpu = weights.form.filled([t.cuda() for t in weights.tensors])
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64).cuda()
    assert torch.allclose(plain(x, on_gpu), fast(x, on_gpu), atol=1e-10)
    dropping = on_gpu._replace(dropout=torch.tensor(0.3).cuda())
    outputs = []
    for net in (plain, fast):
        torch.manual_seed(8)
        outputs.append(net(x, dropping))
    assert torch.allclose(*outputs, atol=1e-10)
