"""The speed benchmarks: each runs to its end and writes its JSON; what they project is known for made-up steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as everything
from benchmarks import compiled, data, depthwise, kept_memory, profiled, search_step, train_step
from benchmarks.projected import search_seconds
from benchmarks.timing import interleaved, median, ratio

from rnas.compute.precision import Precision
from rnas.nas.methods.rnas import Settings as Search
from rnas.nets.count import macs
from rnas.nets.zoo import build
from rnas.settings import Perturbation, SearchSpace


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Every benchmark sets its own number, for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_cells(name: str, classes: int, cells: int = 3) -> torch.nn.Module:
    return build(name, classes, cells=cells, channels=4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and maps of a size that takes a second, on a machine of known rates."""
    monkeypatch.setattr(search_step, "SearchSpace", lambda: SearchSpace(cells=3, channels=2, nodes=1))
    for module in (train_step, compiled):
        monkeypatch.setattr(module, "build", small_cells)
    for module in (search_step, train_step):
        monkeypatch.setattr(module, "rates", lambda *_: {"gemm_gflops": 100.0, "copy_gb_per_s": 10.0})
    monkeypatch.setattr(train_step, "printed_by", lambda program, options: 200.0)  # a process of its own
    monkeypatch.setattr(depthwise, "MAPS", ((4, 8),))
    monkeypatch.setattr(kept_memory, "STEPS", ("pgd",))


STEP = {"pgd": 1.0, "weight": 10.0, "alpha": 100.0, "projection": 1000.0}


def test_a_small_search_counted_by_hand() -> None:
    """4 iterations an epoch. Warm-up: 4 weight steps, two measurements. Then 2 + 2 steps, 10 of the projection on 2
    attacks, and 4 measurements: each 2 batches, an attack and 1000 each."""
    settings = Search(out=Path(), perturbation=Perturbation(attack_steps=2), epochs=4, monitor=20, projection_steps=10)
    measuring = 2 * (2 + 1000)
    warming = 4 * (2 + 10) + 2 * measuring
    searching = 2 * (2 + 10) + 2 * (2 + 100) + 10 * 1000 + 2 * 2 + 4 * measuring
    assert search_seconds(STEP, 10, settings, images=80) == warming + 3 * searching


def test_the_papers_search() -> None:
    """§5.1: 60 epochs, the first 15 of them warm-up, batches of 128 from halves of 25,000 images: T = 195."""
    nothing = dict.fromkeys(STEP, 0.0)
    assert search_seconds({**nothing, "weight": 1.0}, 128) == 15 * 195 + 45 * 97
    assert search_seconds({**nothing, "alpha": 1.0}, 128) == 45 * 97
    attacks = 15 * (195 + 2 * 2) + 45 * (2 * 97 + 20 + 2 * (2 + 1 + 7))
    assert search_seconds({**nothing, "pgd": 1.0}, 128) == 7 * attacks


def test_what_does_not_fit_is_left_out() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("made up")

    seconds = interleaved({"large": too_large, "small": lambda: None}, 3, "cpu")
    assert seconds["large"] == []
    assert len(seconds["small"]) == 3
    assert median(seconds["large"]) is None
    assert ratio(median(seconds["large"]), median(seconds["small"])) is None


def written(main: Callable[[list[str]], None], options: str, folder: Path) -> dict:
    main([*options.split(), "--json", str(folder / "found.json")])
    return json.loads((folder / "found.json").read_text())


def test_the_benchmark_of_the_search_runs(small: None, tmp_path: Path) -> None:
    options = "--batch-size 2 --precision fp32 bf16 --rounds 1 --memory-batch-size 0"
    runs = written(search_step.main, options, tmp_path)["runs"]
    assert [(run["batch_size"], run["precision"]) for run in runs] == [(2, "fp32"), (2, "bf16")]
    fast = {step: of["fast"] for step, of in runs[0]["seconds"].items() if step != "iteration"}
    assert runs[0]["papers_search_seconds"]["fast"] == pytest.approx(search_seconds(fast, 2))
    assert runs[0]["launched_seconds"] == {}, "without a GPU nothing is recorded"


@pytest.mark.slow
def test_the_benchmark_of_training_runs(small: None, tmp_path: Path) -> None:
    """The floor of training is 7 passes for the images, forward and back, and one also for the weights: 17 in all."""
    (run,) = written(train_step.main, "--networks RNAS-L --batch-size 2 --rounds 1", tmp_path)["runs"]
    training, evaluation = run["RNAS-L"]["PGD-7 training"], run["RNAS-L"]["PGD-20"]
    assert training["floor_seconds"] == pytest.approx(17 * 2 * 2 * macs(small_cells("RNAS-L", 10)) / 100e9)
    assert evaluation["floor_seconds"] / training["floor_seconds"] == pytest.approx(40 / 17)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracing
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # which it imports on a GPU
@pytest.mark.slow
def test_the_benchmark_of_compiling_runs(small: None, tmp_path: Path) -> None:
    """With torch's tracing and without its compiler."""
    options = "--networks RNAS-L --cells 3 --batch-size 2 --rounds 1 --backend eager"
    (run,) = written(compiled.main, options, tmp_path)["runs"]
    torch._dynamo.reset()
    assert run["RNAS-L"].keys() == set(compiled.PASSES)


@pytest.mark.slow
def test_shares_of_a_profile_add_up(small: None, tmp_path: Path) -> None:
    shares = written(profiled.main, "--batch-size 2", tmp_path)["shares"]
    assert all(sum(of.values()) == pytest.approx(1) for of in shares.values())
    assert shares["pgd, fast"]["matrix products"] > shares["pgd, published"]["matrix products"]


@pytest.mark.slow
def test_the_small_benchmarks_run(small: None, tmp_path: Path) -> None:
    found = written(depthwise.main, "--batch-size 2 --rounds 1", tmp_path)["convolutions"]
    assert [(f["kernel"], f["stride"], f["dilation"]) for f in found] == [(k, s, d) for k, d, s in depthwise.KERNELS]
    assert written(kept_memory.main, "--rounds 1", tmp_path)["steps"]["pgd"]["ratio"] > 0


@pytest.mark.parametrize("step", search_step.PASSES)
def test_a_step_as_a_search_takes_it_has_the_gradients_of_the_step(
    step: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed on a GPU is what is timed elsewhere."""
    steps = search_step.Steps("fast", 2, "cpu", Precision(), image_size=8)
    found: list[tuple[torch.Tensor, ...]] = []
    differentiate = steps._differentiate
    monkeypatch.setattr(steps, "_differentiate", lambda *of: found.append(differentiate(*of)) or found[-1])
    steps.prepare(step)()
    result = steps.as_chosen(step)()
    if step == "pgd":
        assert result.shape == steps.x.shape
        return
    wanted = steps.thetas if step == "weight" else steps.alphas
    gradients = result[1] if step == "projection" else [p.grad for p in wanted]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], gradients, strict=True))


def test_a_result_is_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `make bench` writes on a GPU stands beside the results of others; on a CPU it is a quick look."""
    ran: list[list[str]] = []
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr(everything, "QUICK", {"steps": (ran.append, ["--rounds", "2"])})
    monkeypatch.setattr(everything, "ON_A_GPU", {"steps": (ran.append, ["--device", "cuda"])})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert everything.main([]) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert everything.main(["steps"]) == 0
    assert everything.main(["stairs"]) == 2
    assert ran == [
        ["--rounds", "2", "--json", str(tmp_path / "quick-steps.json")],
        ["--device", "cuda", "--json", str(tmp_path / "steps-nvidia-h100-80gb-hbm3.json")],
    ]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_every_benchmark_runs_on_a_gpu(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make bench` runs there, with less of everything: times, projections and peak memory in both precisions."""
    few = {
        "search_step": "--batch-size 2 --rounds 1",
        "train_step": "--batch-size 2 --rounds 1 --networks RNAS-L",
        "data": "--batch-size 2 --rounds 1 --networks RNAS-L --sizes 32",
        "compiled": "--batch-size 2 --rounds 1 --networks RNAS-L --cells 3 --backend eager",
    }
    programs = {name: (run, [*given, *few[name].split()]) for name, (run, given) in everything.ON_A_GPU.items()}
    monkeypatch.setattr(everything, "ON_A_GPU", programs)
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "build", lambda name, classes, image_size: small_cells(name, classes))
    monkeypatch.setattr(data, "EPOCH", 8)
    assert everything.main([]) == 0
    torch._dynamo.reset()
    results = {name: json.loads(next(tmp_path.glob(f"{name}-*.json")).read_text()) for name in few}
    for run, precision in zip(results["search_step"]["runs"], ("fp32", "bf16"), strict=True):
        assert run["precision"] == precision
        weight = run["peak_mib"]["weight"]
        assert 0 < weight["fast, save_memory"] < weight["fast"]
        assert run["papers_search_seconds"]["fast"] > 0
    assert results["train_step"]["runs"][0]["RNAS-L"]["PGD-7 training"]["peak_mib"]["ours"] > 0
    assert results["data"]["share"]["device"] == "cuda"


SASS = """Function:_kernel
--:-:-:-:1	MOV R1, c[0x0][0x28];
01:-:0:-:1	@P0 LDG.E R4, [R2.64];
LBB0:
--:-:-:-:2	LDG.E R5, [R2.64+0x4];
LBB1:
--:-:-:-:2	LDG.E R5, [R2.64+0x4];
--:-:-:-:1	FFMA R4, R5, R4, R4;
--:-:-:Y:5	@P1 BRA LBB1;
--:-:-:-:1	IADD3 R2, R2, 0x4, RZ;
--:-:-:Y:5	@P2 BRA LBB0;
--:-:-:-:5	STG.E [R2.64], R4;
--:-:-:-:5	EXIT;
LBB2:
--:-:-:-:0	BRA LBB2;
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    pytest.importorskip("triton")
    from benchmarks import triton_kernels

    once, outer, loop = triton_kernels.counted(SASS)
    assert once == {"instructions": 5, "loads": 1}
    assert outer == {"instructions": 3, "loads": 1}
    assert loop == {"instructions": 3, "loads": 1}
