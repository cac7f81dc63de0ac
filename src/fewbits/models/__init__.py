"""Reference networks by name, and their weights."""

from fewbits.models.registry import MODELS, PRETRAINED, Pretrained, build, names, pretrained
from fewbits.models.weights import adapt, classifiers, load_into, load_weights

__all__ = [
    "MODELS",
    "PRETRAINED",
    "Pretrained",
    "adapt",
    "build",
    "classifiers",
    "load_into",
    "load_weights",
    "names",
    "pretrained",
]
