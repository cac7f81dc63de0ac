"""An int32 bias that is fine enough for 2-bit codes.

An engine adds the bias to the integer sum, in units of ``input scale * weight scale``. At 2 bits such a unit is several
steps of an 8-bit output, so that rounding the bias to whole units would move most codes. But int8 weights have room:
2-bit codes times a whole number up to 63 still fit, and shrink the unit as much. And of all factors ``k`` of a channel
the best makes ``k * bias`` almost whole: by Dirichlet's theorem the rest is below ``1 / (k_max + 1)`` of a unit that is
``k`` times smaller, some thousandths of the original one instead of a half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..integers import LARGEST_BIAS, Floats, Ints

_SUMS = 4096
"""Sums that are looked at for a channel."""

_GOOD_ENOUGH = 1e-6
_REFINED = 16
# In order of their distance from 1, so that of equals the nearest is taken.
_STRETCHES = 1.0 + 1e-5 * np.array([0, *(s * sign for s in (1, 2, 3, 4, 6, 8, 11, 15, 20) for sign in (1, -1))])

_NEGLIGIBLE = 1e-4
"""Of an output step: what moves a result by less gives other codes in fewer than one of 5,000 channels."""


@dataclass(frozen=True)
class OutputGrid:
    """What a layer's result is rounded to: ``round((sum + bias) * ratio)``, clipped.

    Args:
        ratio: unit of the integer sum over step of the output, one for each channel.
        lowest, highest: codes without the zero point, behind the integer Clip.
        centre, spread: mean and standard deviation of the sums, from the batch norm; None where there is none.
        stride: the sums are multiples of it, for the input's codes are.
    """

    ratio: Floats
    lowest: int
    highest: int
    centre: Floats | None = None
    spread: Floats | None = None
    stride: int = 1


def constant_channels(bias: Floats, reach: Floats, output: OutputGrid) -> npt.NDArray[np.bool_]:
    """Channels with a bias too large for int32 that give one code whatever they read.

    A batch norm whose factor is all but zero leaves its shift alone; and from far beyond the end of the output's grid
    no sum leads back to it.

    Args:
        bias: in units of input scale times weight scale, one for each channel.
        reach: the largest sum of products that each channel can have, in the same units.
        output: what the result is rounded to.

    >>> grid = OutputGrid(np.array([1e-9, 1e-3, 1e-3]), 0, 15)
    >>> constant_channels(np.array([4e9, 4e9, 4e3]), np.array([1e4, 1e4, 1e4]), grid).tolist()
    [True, True, False]
    """
    is_still = reach * output.ratio < _NEGLIGIBLE
    is_beyond = (np.abs(bias) - reach) * output.ratio > output.highest - output.lowest + 1
    return np.asarray((np.abs(bias) >= LARGEST_BIAS) & (is_still | is_beyond))


@dataclass(frozen=True)
class Choice:
    """One number for each channel.

    Args:
        factor: of the weight codes, from 1.
        bias: whole, in units that are ``factor`` times smaller than the original ones.
        stretch: what the scale is multiplied by besides, within 2e-4 of 1, or far below it where all sums but one are
            clipped.
        wrong: share of the sums that get another code than with the true bias, as far as sums were looked at.
    """

    factor: Ints
    bias: Ints
    stretch: Floats
    wrong: Floats


def choose(bias: Floats, largest: Ints, output: OutputGrid | None = None) -> Choice:
    """Factors and whole biases, one for each channel.

    The sum of products is a whole number, so the output codes that a channel can give are countable: among all factors
    the one is taken that gives the most of them exactly as the true bias does, frequent ones first, and of equals the
    nearest. Where some are still wrong, stretching the scale by a hundred-thousandth moves them to the right side.

    Args:
        bias: in units of input scale times weight scale, one for each channel.
        largest: see ``largest_factors``.
        output: None where the result stays float; then only nearness counts.

    >>> choose(np.array([0.0, 0.3333, 7.5]), np.array([63, 63, 63])).factor.tolist()
    [1, 3, 2]
    """
    chosen = []
    for channel, wanted in enumerate(bias):
        switch = None if output is None else _switch(wanted, int(largest[channel]), output, output.ratio[channel])
        if switch is not None:
            chosen.append((*switch, 0.0))
            continue
        candidates = np.arange(1, largest[channel] + 1)
        k = np.concatenate([candidates, candidates])
        rounded = np.concatenate([np.floor(candidates * wanted), np.ceil(candidates * wanted)])
        shift = rounded / k - wanted
        sums, share = _sums(wanted, output, channel)
        wrong = np.zeros(k.shape) if output is None else _wrong(sums, share, shift, wanted, output.ratio[channel])
        # A hair of preference for small factors, so that float noise does not choose among equals.
        order = np.lexsort((np.abs(shift) + 1e-9 * k, wrong))
        best, stretch, left = order[0], 1.0, wrong[order[0]]
        if output is not None and left > _GOOD_ENOUGH:
            best, stretch, left = _stretched(order[:_REFINED], sums, share, shift, wanted, output.ratio[channel])
        if output is not None and len(sums) == _SUMS:
            # Of more sums than are looked at, the best choice fits those: all of them cross a boundary as often as the
            # result moves by one step.
            there = stretch * (sums + wanted + shift[best])
            left = output.ratio[channel] * np.abs(there - sums - wanted) @ share
        chosen.append((k[best], rounded[best], stretch, left))
    factors, whole, stretches, shares = zip(*chosen, strict=True)
    return Choice(np.array(factors, np.int64), np.array(whole).astype(np.int64), np.array(stretches), np.array(shares))


def _switch(bias: float, largest: int, output: OutputGrid, ratio: float) -> tuple[int, int, float] | None:
    """Factor, bias and stretch of a channel that only tells whether its sum is below, at or above ``middle``.

    Where a depthwise convolution reads a channel that is always the same (zero, mostly), the batch norm has seen no
    variance and scales by hundreds: every other sum is clipped, and what this one gives is a fraction of a unit, which
    no whole bias can say. Any smaller unit clips the others as well, and with the code of ``middle`` as the unit its
    value is one unit.

    Returns:
        None where that is not what the channel does, or where ``largest`` units are not enough to clip.
    """
    middle = output.stride * round(-bias / output.stride)
    exact = ratio * (bias + middle)
    code = min(max(round(exact), output.lowest), output.highest)
    reach = largest * abs(code)
    for value, unit in ((exact, ratio), (code, reach)):
        step = output.stride * unit
        if code == 0 or value + step < output.highest or value - step > output.lowest:
            return None
    return largest, (1 if code > 0 else -1) - largest * middle, reach / ratio


def _sums(bias: float, output: OutputGrid | None, channel: int) -> tuple[Floats, Floats]:
    """Sums that no end of the output's grid cuts off (at most so many of them), and how often each comes."""
    if output is None:
        return np.zeros(0), np.zeros(0)
    ratio = output.ratio[channel]
    stride = output.stride
    first = np.ceil(((output.lowest - 0.5) / ratio - bias) / stride)
    last = np.floor(((output.highest + 0.5) / ratio - bias) / stride)
    centre, spread = (first + last) / 2, (last - first) / 4 + 1e-9
    if output.centre is not None and output.spread is not None:
        centre, spread = output.centre[channel] / stride, output.spread[channel] / stride
        first, last = max(first, np.floor(centre - 4 * spread)), min(last, np.ceil(centre + 4 * spread))
    count = int(min(last - first + 1, _SUMS))
    if count <= 0:
        return np.zeros(0), np.zeros(0)
    sums = np.asarray(np.round(np.linspace(first, last, count)), np.float64)
    share = np.exp(-0.5 * ((sums - centre) / spread) ** 2)
    return stride * sums, np.asarray(share / share.sum(), np.float64)


def _wrong(sums: Floats, share: Floats, shift: Floats, bias: float, ratio: float) -> Floats:
    """Share of the sums that get another code when the bias is off by ``shift`` (in units of the sum)."""
    if sums.size == 0:
        return np.zeros(shift.shape)
    exact = ratio * (sums + bias)
    # How far each result is below the next rounding boundary, and above the last one.
    room = 0.5 - (exact - np.round(exact))
    moved = ratio * shift
    return np.where(moved > 0, _share_within(room, share, moved), _share_within(1 - room, share, -moved))


def _share_within(room: Floats, share: Floats, moved: Floats) -> Floats:
    order = room.argsort()
    total = np.concatenate([[0.0], share[order].cumsum()])
    return total[np.searchsorted(room[order], moved)]


def _stretched(
    order: Ints, sums: Floats, share: Floats, shift: Floats, bias: float, ratio: float
) -> tuple[int, float, float]:
    """The best of a few biases with a slightly longer or shorter step, and the share that is wrong still."""
    exact = np.round(ratio * (sums + bias))
    best, least, found = int(order[0]), np.inf, 1.0
    for candidate in order:
        moved = ratio * (sums + bias + shift[candidate])
        wrong = (np.round(moved * _STRETCHES[:, None]) != exact) @ share
        index = int(wrong.argmin())
        if wrong[index] < least:
            best, least, found = int(candidate), float(wrong[index]), float(_STRETCHES[index])
    return best, found, least
