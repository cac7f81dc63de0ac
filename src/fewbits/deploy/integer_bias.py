"""An int32 bias that is fine enough for 2-bit codes.

An engine adds the bias to the integer sum, in units of ``input scale * weight scale``. At 2 bits such a unit is several steps
of an 8-bit output, so that rounding the bias to whole units would move most codes. But int8 weights have room: 2-bit
codes times a whole number up to 63 still fit, and shrink the unit as much. And of all factors ``k`` of a channel the best
makes ``k * bias`` almost whole: by Dirichlet's theorem the rest is below ``1 / (k_max + 1)`` of a unit that is ``k`` times
smaller, some thousandths of the original one instead of a half.
"""

from __future__ import annotations

import numpy as np

from .weights import Floats, Ints

LARGEST_BIAS = 2**30
"""Leaves half of int32 to the sum of products."""

_SATURATION = 32767
"""Processors without VNNI add two u8 x s8 products in 16 bits."""


def largest_factor(largest_weight: int, largest_input: int) -> int:
    """The largest whole number that weight codes may be multiplied by, so that they and their products fit."""
    fits = min(127, _SATURATION // (2 * largest_input)) // max(largest_weight, 1)
    return max(fits, 1)


def choose(bias: Floats, largest: int) -> tuple[Ints, Ints]:
    """Factors and whole biases, one for each channel.

    Args:
        bias: in units of input scale times weight scale, one for each channel.
        largest: see ``largest_factor``.

    Returns:
        ``k`` from 1 to ``largest`` with the smallest ``|round(k * bias) / k - bias|``, and ``round(k * bias)``.

    >>> [v.tolist() for v in choose(np.array([0.0, 0.3333, 7.5]), 63)]
    [[1, 3, 2], [0, 1, 15]]
    """
    factors = np.arange(1, largest + 1)[:, None]
    whole = np.round(factors * bias)
    # A hair of preference for small factors, so that float noise does not choose among equals.
    error = np.abs(whole / factors - bias) + 1e-9 * factors
    best = error.argmin(0)
    return factors[best, 0], whole[best, np.arange(len(bias))].astype(np.int64)
