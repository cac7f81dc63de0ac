"""Few numbers of a few seeds: their spread, and how far two recipes differ on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean, and sample standard deviation (divided by n - 1); None of one value."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its 95 % interval; without one where there is one pair.

    Args:
        mean: of the differences.
        low: end of the interval of Student's t with n - 1 degrees of freedom.
        high: its other end.
        num_pairs: n.
    """

    mean: float
    low: float | None
    high: float | None
    num_pairs: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of no value.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, std=1.0)
    """
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """``values`` minus ``base`` over the seeds that both have: mean d and d -+ t(0.975, n - 1) s / sqrt(n).

    Args:
        values: by seed.
        base: by seed.

    Returns:
        None without a common seed.

    >>> difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0})
    Difference(mean=2.0, low=-0.48..., high=4.48..., num_pairs=3)
    """
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    found = spread(pairs)
    if found is None:
        return None
    if found.std is None:
        return Difference(found.mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * found.std / math.sqrt(len(pairs))
    return Difference(found.mean, found.mean - half, found.mean + half, len(pairs))
