"""Settings say at once, and by name, what cannot be."""

import dataclasses
import math
import re
from typing import Any

import pytest

from fewbits.training import Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be a number above 0, got 0"),
        ({"epochs": math.nan}, "epochs must be a number above 0, got nan"),
        ({"epochs": math.inf}, "epochs must be a number above 0, got inf"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be a whole number of 1 or more, got -1"),
        ({"lr": -0.1}, "lr must be a number above 0, got -0.1"),
        ({"lr": math.inf}, "lr must be a number above 0, got inf"),
        ({"accumulate": 0}, "accumulate must be a whole number of 1 or more, got 0"),
        ({"max_bad_steps": 0}, "max_bad_steps must be a whole number of 1 or more, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number of 1 or more, got 0"),
        ({"weight_decay": -1e-4}, "weight_decay must be a number of 0 or more, got -0.0001"),
        ({"weight_decay": math.nan}, "weight_decay must be a number of 0 or more, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, got -1"),
        ({"bn_batches": -1}, "bn_batches must be a whole number of 0 or more, got -1"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must be a number of 0 or more, got -1.0"),
        ({"quantizer_lr": -1.0}, "quantizer_lr must be a number of 0 or more, got -1.0"),
        ({"helper_lr": -1.0}, "helper_lr must be a number of 0 or more or None, got -1.0"),
        ({"processes": 0}, "processes must be a whole number of 1 or more or None, got 0"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, constant, got 'linear'"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
        ({"ema": 1.0}, "ema must be a number between 0 and 1 or None, got 1.0; 0.999 is usual"),
        ({"ema": 0.0}, "ema must be a number between 0 and 1 or None, got 0.0"),
        ({"clip_grad": 0.0}, "clip_grad must be a number above 0 or None, got 0.0"),
        ({"milestones": (0.5, 1.0)}, "milestones must be a list, each a number between 0 and 1, got (0.5, 1.0)"),
        ({"seed": 10**23}, "seed must be a whole number from 0 to 2^63 - 1, got 1000"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2^63 - 1, got -1"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size must be a multiple of accumulate, got 10 and 4"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": "3"}, "epochs must be a number above 0, got '3' (str)"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of 1 or more, got 2.5 (float)"),
        ({"compile": 1}, "compile must be true or false, got 1 (int)"),
        ({"milestones": 0.5}, "milestones must be a list, each a number between 0 and 1, got 0.5 (float)"),
    ],
)
def test_settings_of_another_type(wrong: dict[str, Any], message: str):
    """Found: epochs="3" was compared with 0, batch_size=2.5 failed in the sampler."""
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        Settings(**wrong)


def test_settings_are_frozen_data():
    assert Settings() == Settings()
    assert Settings(epochs=2) != Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().epochs = 3  # type: ignore[misc]


def test_every_setting_is_explained():
    explained = (Settings.__doc__ or "").split("Args:")[1]
    for field in dataclasses.fields(Settings):
        assert f"\n        {field.name}: " in explained
