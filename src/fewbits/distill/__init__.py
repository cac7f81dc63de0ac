"""Objectives: what is tapped, what is compared, who is taught."""

from .base import Edit, Group, Networks, Phase, Step, Tap, Term
from .objective import Losses, Objective
from .terms import CrossEntropy, FeatureDistance, LogitDistance

__all__ = [
    "CrossEntropy",
    "Edit",
    "FeatureDistance",
    "Group",
    "LogitDistance",
    "Losses",
    "Networks",
    "Objective",
    "Phase",
    "Step",
    "Tap",
    "Term",
]
