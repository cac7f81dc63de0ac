"""``kernels.cpp`` compiled once for this processor and kept in the user's cache.

Nothing depends on it: without a C++ compiler, where the compiled functions do not give PyTorch's bits, or with
``FEWBITS_NATIVE=0`` in the environment, ``load`` says why there are none.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

from ..cache import cache_dir
from .sums import BLOCK

SOURCE = Path(__file__).with_name("kernels.cpp")

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_COMPILERS = ("g++", "c++", "clang++")


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled functions, or None and why."""
    if os.environ.get("FEWBITS_NATIVE") == "0":
        return None, "FEWBITS_NATIVE is 0"
    try:
        library = _open()
        if not _computes_what_pytorch_does(library):
            return None, "what the compiler made is not what PyTorch computes"
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        return None, str(getattr(error, "stderr", None) or error)
    return library, ""


def _computes_what_pytorch_does(library: ctypes.CDLL) -> bool:
    """A handful of values, ties among them."""
    floats = ctypes.c_float * 8
    x = floats(-9.0, -0.75, -0.25, 0.25, 0.75, 1.25, 1.3, 9.0)
    grad, y, grad_x, sums = floats(*[1.0] * 8), floats(), floats(), (ctypes.c_float * BLOCK)()
    grad_step = ctypes.c_float()
    step, low, high = (ctypes.byref(ctypes.c_float(value)) for value in (0.5, -1.0, 3.0))
    groups, inner, none = ctypes.c_long(1), ctypes.c_long(8), ctypes.c_float(0.0)
    library.fewbits_lsq(x, 0, none, y, groups, inner, step, low, high, 1)
    given = (x, 0, none, grad, 0, grad_x, ctypes.byref(grad_step), sums)
    library.fewbits_lsq_backward(*given, groups, inner, step, low, high, ctypes.c_float(0.5), 1)
    # By hand: codes -1, -1, 0, 0, 2, 2 (four ties), 3 and 3; the first two and the last are outside.
    # Shares -1, -1, 0.5, -0.5, 0.5, -0.5, 0.4 and 3, in halves: (-0.5, -1.5, 0.9, 2.5), (0.4, 1), 1.4; times 0.5.
    is_summed = abs(sums[0] - 1.4) < 1e-5 and grad_step.value == sums[0] / 2
    values, inside = [-0.5, -0.5, 0.0, 0.0, 1.0, 1.0, 1.5, 1.5], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    return list(y) == values and list(grad_x) == inside and is_summed


def _open() -> ctypes.CDLL:
    """From the user's cache, or compiled, and then kept there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(None, map(shutil.which, _COMPILERS)), "")]
    if not compiler[0]:
        raise FileNotFoundError(f"there is no C++ compiler: no CXX in the environment, and no {', '.join(_COMPILERS)}")
    described = "\n".join((*compiler, *_FLAGS, _processor()))
    key = hashlib.sha256(SOURCE.read_bytes() + described.encode()).hexdigest()[:16]
    kept = cache_dir() / "native" / f"kernels-{key}.so"
    if _is_ours(kept.parent) and _is_ours(kept) and _is_whole(kept):
        return ctypes.CDLL(str(kept))
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    can_keep = _is_ours(kept.parent) and os.access(kept.parent, os.W_OK)
    with tempfile.TemporaryDirectory(dir=kept.parent if can_keep else None, prefix="fewbits-") as folder:
        made = Path(folder) / kept.name
        _compile(compiler, made)
        if can_keep:
            # Several processes may do this at once; whoever comes last, each file is whole.
            checksum = made.with_suffix(".sha256")
            checksum.write_text(_checksum(made))
            checksum.replace(kept.with_suffix(".sha256"))
            made = made.replace(kept)
        return ctypes.CDLL(str(made))  # which stays when its folder goes


def _compile(compiler: list[str], made: Path) -> None:
    command = [*compiler, *_FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
    run = partial(subprocess.run, check=True, capture_output=True, text=True, errors="replace", timeout=120)
    try:
        run([*command, "-fopenmp"])
    except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread is still one pass
        run(command)


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user, or the system's, can have put it there: it is going to be executed."""
    try:
        state = path.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (state.st_uid in (0, os.getuid()) and not state.st_mode & 0o022)


def _is_whole(path: Path) -> bool:
    """A file that was cut short would take the process along."""
    try:
        return _checksum(path) == path.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """What ``-march=native`` depends on."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = described.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
