"""Over the whole zoo: a network builds, runs, learns and repeats itself."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rnas import published as paper
from rnas.errors import RnasError
from rnas.genotype import Cell, CellCodes, Genotype
from rnas.nets import handmade, zoo
from rnas.nets.count import macs, parameters
from rnas.nets.derived import DerivedCell, DropPath, Node

NAMES = [name for name, p in paper.architectures().items() if p.source]


def small(name: str, classes: int = 10, image_size: int = 32) -> nn.Module:
    """The architecture, as a cell network with few channels and, where they are not its own, few cells."""
    cells = 20 if name == "RobNet-free" else 5
    return zoo.build(name, classes, cells=cells, channels=4, image_size=image_size)


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_zoo_is_table_1_and_the_extras() -> None:
    assert zoo.names()[:19] == [p.name for p in paper.architectures().values() if p.table_name]
    assert [paper.architectures()[n].table_name for n in zoo.names()[:19]] == [r["model"] for r in paper.table(1)]
    assert set(zoo.names()) == {*NAMES, "DSRNA"}


@pytest.mark.parametrize(("size", "classes"), [(16, 2), (32, 10), (32, 100), (64, 200)])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str, size: int, classes: int) -> None:
    torch.manual_seed(0)
    network = small(name, classes, size)
    x = images(2, size).requires_grad_()
    logits = network(x)
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    first = next(p for p in network.parameters() if p.dim() == 4)
    for gradient in (x.grad, first.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_eval_mode_repeats_itself_and_treats_images_alone(name: str) -> None:
    torch.manual_seed(0)
    network = small(name).eval()
    x = images(3, 32)
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(network(x), logits)
        torch.testing.assert_close(network(x[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["RNAS-L", "ResNet18"])
def test_normalisation_is_the_first_layer(name: str) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    torch.manual_seed(0)
    inside = zoo.build(name, cells=5, channels=4, mean=mean, std=std).eval()
    torch.manual_seed(0)
    outside = zoo.build(name, cells=5, channels=4, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    x = images(2, 32)
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(x), outside(by_hand))


@pytest.mark.parametrize("name", ["VGG16", "ResNet18", "DenseNet121", "MobileNetV2", "ShuffleNetV2", "SqueezeNet"])
def test_stages_can_be_hooked_by_name(name: str) -> None:
    network = zoo.build(name).eval()
    seen = []
    for stage in network.children():
        stage.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    network(images(1, 32))
    assert seen[0] == (1, 3, 32, 32)
    assert len(seen) >= 6
    assert seen[-1] == (1, 10)


# Counting


def test_macs_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16x16 outputs, 8 channels, each a sum over 3 * 9
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),  # depthwise: each a sum over 25
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    network[1].eval()
    modes = [m.training for m in network.modules()]
    assert macs(network) == 16 * 16 * 8 * 27 + 16 * 16 * 8 * 25 + 80
    assert macs(network, (16, 32)) == 8 * 16 * 8 * 27 + 8 * 16 * 8 * 25 + 80
    assert [m.training for m in network.modules()] == modes
    assert not any(m._forward_hooks for m in network.modules())


def test_stem_stride_makes_64_pixels_as_cheap_as_32() -> None:
    full, halved = (zoo.build("RNAS-L", image_size=64, cells=5, channels=4, stem_stride=s) for s in (1, 2))
    assert parameters(full) == parameters(halved)
    assert macs(halved, 64) == macs(full, 32)
    assert macs(full, 64) > 3.9 * macs(full, 32)


def test_table_has_every_architecture_and_leaves_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: paper.architectures()[name] for name in ("ResNet18", "DSRNA", "RNAS-L")}
    monkeypatch.setattr(paper, "architectures", lambda: chosen)
    state = torch.get_rng_state()
    resnet, dsrna, rnas_l = zoo.zoo_table()
    assert torch.equal(torch.get_rng_state(), state)
    assert (resnet["parameters"], resnet["macs"], resnet["paper_params_M"]) == (11173962, 555422720, 11.2)
    assert (dsrna["source"], dsrna["parameters"], dsrna["macs"], dsrna["paper_params_M"]) == (None, None, None, 3.5)
    assert rnas_l["parameters"] == 3170926
    assert rnas_l["source"].startswith("hye999/RNAS")


# Parts


def test_a_node_sums_its_edges() -> None:
    node = Node((("skip_connect", 0), ("skip_connect", 2), ("none", 1)), 4, (1, 1), affine=True)
    states = list(torch.rand(3, 2, 4, 8, 8))
    assert torch.equal(node(states), states[0] + states[2])


def test_robnet_code_11_is_convolution_plus_skip() -> None:
    both = CellCodes((("11", "00"),)).cell(0, reduction=False)
    assert both == Cell(nodes=((("sep_conv_3x3", 0), ("skip_connect", 0)),), concat=(2,))
    node = Node(both.nodes[0], 4, (1, 1), affine=False).eval()
    x = torch.rand(1, 4, 8, 8)
    assert torch.equal(node([x, x]), node[0](x) + x)
    assert not any("bn" in name for name, _ in node.named_parameters())


def test_robnet_has_no_affine_parameters_but_in_the_stem() -> None:
    network = small("RobNet-free")
    assert not any(m.affine for cell in network.cells for m in cell.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_reduction_cell_halves_the_image() -> None:
    cell = Cell(
        nodes=((("max_pool_3x3", 0), ("sep_conv_7x7", 1)), (("conv_7x1_1x7", 0), ("skip_connect", 2))), concat=(3,)
    )
    out = DerivedCell(cell, 6, 8, 4, reduction=True, after_reduction=False)(
        torch.rand(2, 6, 8, 8), torch.rand(2, 8, 8, 8)
    )
    assert out.shape == (2, 4, 4, 4)


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    drop = DropPath()
    drop.p = 0.25
    x = torch.ones(20000, 1, 2, 2)
    torch.manual_seed(0)
    out = drop(x)
    kept = out[:, 0, 0, 0] != 0
    assert torch.equal(out, torch.where(kept, 1 / 0.75, 0.0).view(-1, 1, 1, 1).expand_as(out))
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)  # 6 standard deviations
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_changes_training_only() -> None:
    torch.manual_seed(0)
    network = small("RNAS-L")
    network.set_drop_path(0.9)
    x = images(4, 32)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_auxiliary_head(size: int) -> None:
    network = zoo.build("RNAS-L", 7, cells=5, channels=4, image_size=size, auxiliary=True)
    logits, auxiliary = network.forward_auxiliary(images(2, size))
    assert logits.shape == auxiliary.shape == (2, 7)
    auxiliary.sum().backward()
    assert network.auxiliary.classifier.weight.grad.abs().max() > 0
    assert network.classifier.weight.grad is None


def test_auxiliary_head_explains_the_papers_nasnet_figure() -> None:
    with torch.device("meta"):
        assert parameters(zoo.build("NASNet", auxiliary=True)) == 4288944
    with pytest.raises(RnasError, match="auxiliary=True"):
        small("RNAS-L").forward_auxiliary(images(1, 32))


def test_forward_cells_gives_every_cell_and_the_same_logits() -> None:
    network = zoo.build("RNAS-L", cells=6, channels=4).eval()
    logits, outputs = network.forward_cells(images(2, 32))
    assert [tuple(o.shape) for o in outputs] == [
        (2, 16, 32, 32),
        (2, 16, 32, 32),
        (2, 32, 16, 16),
        (2, 32, 16, 16),
        (2, 64, 8, 8),
        (2, 64, 8, 8),
    ]
    assert torch.equal(logits, network(images(2, 32)))


def test_shuffle_interleaves_the_halves() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert handmade.Shuffle()(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


# Names


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rnas-l", "RNAS-L"),
        ("RNAS_L", "RNAS-L"),
        ("NASNet-A", "NASNet"),
        ("AmoebaNet-A", "AmoebaNet"),
        ("DARTS-V2", "DARTS"),
        ("darts_v1", "DARTS-V1"),
        ("pdarts", "P-DARTS"),
        ("MobileNetv2", "MobileNetV2"),
        ("vgg16-bn", "VGG16"),
        ("Wsr-NAS", "WsrNet-Plus"),
    ],
)
def test_names_are_read_generously(spelling: str, name: str) -> None:
    assert paper.find(spelling).name == name


def test_no_two_architectures_share_a_spelling() -> None:
    spellings = [s for p in paper.architectures().values() for s in (p.name, *p.aliases)]
    assert all(paper.find(s).name == p.name for p in paper.architectures().values() for s in (p.name, *p.aliases))
    assert len({paper._plain(s) for s in spellings}) == len(spellings)


# Bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("RNAS-M", {}, "unknown architecture 'RNAS-M': did you mean RNAS-"),
        ("resnet", {}, "did you mean ResNet18"),
        ("RNAS-L", {"classes": 1}, "classes is 1: expected 2 or more"),
        ("VGG16", {"classes": 0}, "classes is 0: expected 2 or more"),
        ("RNAS-L", {"cells": 0}, "cells is 0: expected 1 or more"),
        ("RNAS-L", {"classes": "10"}, "classes is '10': expected 2 or more"),
        ("ResNet18", {"classes": 2.5}, "classes is 2.5: expected 2 or more"),
        ("RNAS-L", {"cells": 3.0}, "cells is 3.0: expected 1 or more"),
        (None, {}, "the name of the architecture is None"),
        ("RNAS-L", {"mean": (0.5,)}, "expected three numbers each"),
        ("RNAS-L", {"std": (0.2, 0.0, 0.2)}, "expected three numbers each, for std above 0"),
        ("RNAS-L", {"channels": -3}, "channels is -3: expected 1 or more"),
        ("RNAS-L", {"image_size": 4}, "image size 4 does not fit"),
        ("RNAS-L", {"image_size": (32, 30)}, "image size 30 does not fit .* multiple of 4"),
        ("RNAS-L", {"image_size": 8, "stem_stride": 2}, "image size 8 does not fit .* 16 or more"),
        ("RNAS-L", {"stem_stride": 3}, "stem_stride is 3: expected 1 .* or 2"),
        ("VGG16", {"image_size": 8}, "image size 8 does not fit VGG16.* 16 or more"),
        ("RobNet-free", {"cells": 8}, "cells is 8, but this architecture has 20 cells"),
        ("DSRNA", {}, "DSRNA cannot be built: no genotype .* --method dsrna"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    name: str, options: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(nn.Conv2d, "__init__", built)
    with pytest.raises(RnasError, match=message):
        zoo.build(name, **options)


def test_the_smallest_images_do_run() -> None:
    for name in ("RNAS-L", "ResNet18", "DenseNet121", "MobileNetV2", "ShuffleNetV2", "SqueezeNet"):
        assert zoo.build(name, cells=5, channels=4, image_size=8)(images(2, 8)).shape == (2, 10)
    assert zoo.build("RNAS-L", cells=5, channels=4, image_size=(12, 20))(torch.rand(2, 3, 12, 20)).shape == (2, 10)


def test_build_genotype_takes_cells_of_ones_own() -> None:
    cell = Cell(nodes=((("sep_conv_3x3", 0), ("max_pool_3x3", 1)),), concat=(2,))
    network = zoo.build_genotype(Genotype(cell, cell), 3, cells=2, channels=2, image_size=16)
    assert network(images(2, 16)).shape == (2, 3)


# torch.hub


def test_a_clone_works_with_torch_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    clone = str(Path(__file__).parents[2])
    network = torch.hub.load(clone, "rnas_l", source="local", classes=7, cells=5, channels=4)
    assert network(images(2, 32)).shape == (2, 7)


@pytest.mark.slow
def test_the_page_of_the_zoo_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert zoo.table_text(zoo.zoo_table(), markdown=True) in page, "put the output of rnas zoo --markdown there"


def test_the_table_as_text() -> None:
    row = {"name": "X", "year": 2022, "kind": "cell", "source": "here", "note": "a note", "paper_params_M": 3.5}
    rows = [row | {"parameters": 1234567, "macs": 89_000_000}, row | {"parameters": None, "macs": None, "source": None}]
    assert zoo.table_text(rows, markdown=True).splitlines()[1:] == [
        "| - | - | - | -: | -: | -: | - |",
        "| X | 2022 | cell | 1,234,567 | 89.0 | 3.5 | here; a note |",
        "| X | 2022 | cell | – | – | 3.5 | none; a note |",
    ]
    assert zoo.table_text(rows).splitlines() == [
        "Name  Year  Kind  Parameters  MACs (M)  Paper (M)",
        "    Source",
        "X     2022  cell   1,234,567      89.0        3.5",
        "    here; a note",
        "X     2022  cell           –         –        3.5",
        "    none; a note",
    ]
