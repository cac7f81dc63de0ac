import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The test modules and the processes that they start share one file. It is found by its place: the tests are no package.
_spec = importlib.util.spec_from_file_location("training_worker", Path(__file__).with_name("worker.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["training_worker"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["training_worker"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums come in the same order as in the processes that the tests start, and tiny networks are faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
