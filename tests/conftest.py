"""What every test counts on: one setting of threads and network, and the shared reference files."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Read by libraries as they are imported, so it stands before the imports below.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads starve torch's otherwise
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# For the processes that tests start; pytest's own path is set in pyproject.toml.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A shell that starts the suite in the background has it ignore Ctrl-C, and so all it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared among processes, each takes one core, and so do the processes that tests start.
SHARED = "PYTEST_XDIST_WORKER" in os.environ
if SHARED:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and find_spec("triton"):
    import interpreter  # noqa: F401  makes Triton run kernels on the CPU, before one is defined

torch.set_num_threads(1 if SHARED else min(2, os.cpu_count() or 1))
torch.backends.cudnn.allow_tf32 = False  # float32 is meant in convolutions too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than a tiny model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference files beside the project: audio/ and official/."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference files: {folder} is not there")
    return folder
