"""For all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors of tests are so small that two threads on a busy machine mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
