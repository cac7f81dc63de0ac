"""Training: one loop, one checkpoint format, one run folder."""

from .bounds import bound_steps
from .checkpoint import load_checkpoint, save_checkpoint
from .evaluate import accuracy, reestimate_batch_norm
from .fit import Result, fit
from .folder import read_json, read_metrics
from .guard import TrainingError
from .settings import Settings

__all__ = [
    "Result",
    "Settings",
    "TrainingError",
    "accuracy",
    "bound_steps",
    "fit",
    "load_checkpoint",
    "read_json",
    "read_metrics",
    "reestimate_batch_norm",
    "save_checkpoint",
]
