"""Data sets by name, image folders, and batches that are the same however many processes read them."""

from fewbits.cache import cache_dir
from fewbits.data.augment import NONE, Augment
from fewbits.data.catalog import Found, find, load
from fewbits.data.dataset import Dataset
from fewbits.data.folder_split import FolderSplit
from fewbits.data.normalisation import IMAGENET, Normalisation
from fewbits.data.places import roots
from fewbits.data.sources import SOURCES
from fewbits.data.split import Split, TensorSplit

__all__ = [
    "IMAGENET",
    "NONE",
    "SOURCES",
    "Augment",
    "Dataset",
    "FolderSplit",
    "Found",
    "Normalisation",
    "Split",
    "TensorSplit",
    "cache_dir",
    "find",
    "load",
    "roots",
]
