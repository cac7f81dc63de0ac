"""What ``export`` refuses before it looks at the network."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewbits.deploy import export


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"student": SimpleNamespace(student=nn.ReLU())}, TypeError, "student must be a network.*pass its .student"),
        ({"student": "resnet20"}, TypeError, r"student must be a network.*fewbits\.models\.build\('resnet20'"),
        ({"example": np.zeros((2, 3, 8, 8))}, TypeError, "example must be a Tensor, got a ndarray"),
        ({"minimum_equal": 2}, ValueError, "minimum_equal must be a number from 0 to 1, got 2"),
        ({"minimum_equal": float("nan")}, ValueError, "minimum_equal must be a number from 0 to 1, got nan"),
    ],
)
def test_arguments_of_another_kind(change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path):
    """Found: "int() argument must be ... not 'complex'" for minimum_equal=2."""
    given = {"student": nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "example": torch.zeros(2, 3, 8, 8)} | change
    with pytest.raises(error, match=said):
        export(given.pop("student"), tmp_path / "student.onnx", normalisation=None, **given)
