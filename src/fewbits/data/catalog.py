"""Data sets by name, wherever they are on this machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from fewbits.cache import cache_dir
from fewbits.data.dataset import Dataset
from fewbits.data.folder import load_folder
from fewbits.data.places import roots
from fewbits.data.sources import SOURCES, Source
from fewbits.data.split import TensorSplit
from fewbits.data.torchvision_import import import_torchvision
from fewbits.names import unknown_name


@dataclass(frozen=True)
class Found:
    """One row of what `fewbits data` prints.

    Args:
        where: the folder, or "" where there is none.
        get: how to come by a set that is not there, else "".
    """

    name: str
    found: bool
    where: str
    num_train: int
    num_test: int
    get: str


def load(name: str, root: Path | None = None, download: bool = False, image_size: int | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
        name: digits, cifar10, cifar100, fashion-mnist, flowers17, or an image folder as `folder:PATH` or a path.
        root: the only folder to look in; None looks where `places.roots` says.
        download: fetch a set that is missing, with torchvision, into `root` or `$FEWBITS_DATA`, else the user's cache.
        image_size: pixels a side; sets in memory are resized batch by batch, image folders are cut to it (224 unless
            given).

    Raises:
        TypeError: a name that is no text.
        ValueError: an unknown name; a set that is not there (with where it was looked for); files that are damaged.
    """
    if not isinstance(name, str):
        raise TypeError(unknown_name("name", name, SOURCES, "folder:PATH"))
    if name.startswith("folder:"):
        return load_folder(Path(name.removeprefix("folder:")).expanduser(), image_size)
    if name not in SOURCES:
        if "/" in name or "\\" in name or Path(name).is_dir():
            return load_folder(Path(name).expanduser(), image_size)
        raise ValueError(unknown_name("data", name, SOURCES, "folder:PATH"))
    source = SOURCES[name]
    folder = _find(source, roots(root))
    if folder is None and download:
        folder = _download(name, source, root)
    if folder is None:
        looked = ", ".join(str(place) for place in roots(root))
        raise ValueError(f"{name} was not found; looked in {looked}. {source.get}")
    return _resized(source.read(folder), image_size)


def find(root: Path | None = None) -> list[Found]:
    """What is there, by name; looks at folders and opens no image."""
    rows = []
    for name, source in SOURCES.items():
        folder = _find(source, roots(root))
        where = "" if folder is None else "comes with scikit-learn" if name == "digits" else str(folder)
        rows.append(
            Found(name, folder is not None, where, source.num_train, source.num_test, "" if where else source.get)
        )
    return rows


def _find(source: Source, places: tuple[Path, ...]) -> Path | None:
    return next((folder for place in places if (folder := source.find(place)) is not None), None)


def _resized(dataset: Dataset, image_size: int | None) -> Dataset:
    if image_size is None or image_size == dataset.image_size:
        return dataset
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    train, test = dataset.train, dataset.test
    if not isinstance(train, TensorSplit) or not isinstance(test, TensorSplit):
        raise ValueError(f"{dataset.name} cannot be resized")
    return replace(
        dataset,
        train=replace(train, image_size=image_size),
        test=replace(test, image_size=image_size),
        image_size=image_size,
    )


def _download(name: str, source: Source, root: Path | None) -> Path | None:
    if source.download is None:
        raise ValueError(f"{name} cannot be downloaded. {source.get}")
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        raise ValueError(
            f'downloading needs torchvision: pip install "fewbits[timm]"; or else: {source.get}'
        ) from error
    # Of the places that are looked in without being named, only the cache is ours to write to.
    target = next((place for place in roots(root) if len(roots(root)) == 1), cache_dir() / "data")
    try:
        for train in (True, False):
            getattr(torchvision.datasets, source.download)(root=str(target), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} could not be downloaded to {target} ({error}). {source.get}") from error
    return source.find(target)
