"""For all tests. Without a GPU kernels run in Triton's interpreter, on CPU tensors, with its faults repaired."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported and when kernels are: keep this first
    from moe_engine import simulator

    simulator.repair()

# The tensors of tests are so small that two threads on a busy machine mostly wait for each other: here, in the fixtures
# of modules too, and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def one_thread():
    """A test that takes more threads has them for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
