"""Where data is looked for and where decoded arrays are kept."""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache import cache_dir

logger = logging.getLogger(__name__)


def roots(root: Path | None = None) -> tuple[Path, ...]:
    """The folders that may hold `cifar10/`, `pretrained-cifar10/` and so on, best first.

    `root` alone if given; else `$FEWBITS_DATA` alone if set; else `../shared/data` as seen from the working directory
    and from the checkout that this file is in, then `data` in the user's cache.
    """
    if root is not None:
        return (Path(root).expanduser(),)
    if named := os.environ.get("FEWBITS_DATA"):
        return (Path(named).expanduser(),)
    candidates = [Path.cwd().parent / "shared" / "data"]
    source = Path(__file__).resolve().parents[2]
    if source.name == "src":
        candidates.append(source.parents[1] / "shared" / "data")
    candidates.append(cache_dir() / "data")
    return tuple(dict.fromkeys(candidates))


def content_key(files: Iterable[Path]) -> str:
    """A short name for the bytes of these files in this order: 80 MB take about a tenth of a second."""
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        data = file.read_bytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def cached_array(name: str, files: Iterable[Path], decode: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """`decode()`, or what it gave when the same bytes were last decoded.

    The cached file is mapped copy-on-write, so processes share its memory. A cache that cannot be read is decoded
    again, and one that cannot be written is done without.
    """
    path = cache_dir() / "decoded" / f"{name}-{content_key(files)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        cached: NDArray[np.uint8] = np.load(path, mmap_mode="c", allow_pickle=False)
        return cached
    array = decode()
    try:
        _write_atomically(path, array)
    except OSError as error:
        logger.info("decoded %s is not cached: %s", name, error)
    return array


def _write_atomically(path: Path, array: NDArray[np.uint8]) -> None:
    """A reader sees the whole file or none, also when several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
