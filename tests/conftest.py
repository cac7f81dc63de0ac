import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # child processes sum in the same order as this one

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("fewbits", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fewbits")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder that holds `cifar10/`, `pretrained-cifar10/` and the others; skips where there is none."""
    named = os.environ.get("FEWBITS_DATA")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no data at {root}; set FEWBITS_DATA to the folder that holds cifar10/")
    return root
