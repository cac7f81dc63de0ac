"""A promise to compiled graphs: every quantizer's gate is open.

A graph reads gates as tensors, so that closing one never recompiles; then it must have both, what a quantizer gives and
what it was given. Whoever knows that no gate closes says so, and gets a graph without gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

are_open = False
"""Whether it was promised. The compiler remembers what it was, and compiles a second graph when it is not."""


@contextmanager
def promised_open(promise: bool) -> Iterator[None]:
    """Within it compiled graphs rely on ``promise``."""
    global are_open
    before, are_open = are_open, promise
    try:
        yield
    finally:
        are_open = before
