"""Where this user's files are kept between runs: decoded data, measured kernels, compiled functions."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FEWBITS_CACHE`, else `~/.cache/fewbits`; it need not exist."""
    return Path(os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits")
