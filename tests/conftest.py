"""What every test relies on: a process as the command line's, and torch's generators as at the start of a run."""

import os

from rnas.compute import threads as process

process.settle()  # before torch is imported
NO_GPU = "there is no GPU here"
if os.environ.get("RNAS_EMULATED_GPU", "0") != "0":
    try:
        import emulated_gpu  # noqa: F401  (before torch, too)
    except ImportError as e:
        NO_GPU = f"there is no GPU here, nor an emulated one: {e}"

import pytest  # noqa: E402
import torch  # noqa: E402

if torch.version.cuda is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported: Triton's run on the CPU, slowly

# Beside other workers (`pytest -n`) each takes its share of the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_configure(config: pytest.Config) -> None:
    if "not gpu" in config.option.markexpr:  # what the default tier asserts, bit for bit, is a CPU's
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(NO_GPU)


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in both forms of the fast supernet, here on a CPU."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("rnas.fast.supernet.on_cpu", lambda x: False)
