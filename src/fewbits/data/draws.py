"""Random numbers that depend on (seed, epoch, sample index) and on nothing else.

A stateful generator gives a sample other numbers when the batch size, the number of processes or the starting batch
changes. A hash of the sample's own coordinates does not, so a resumed or distributed run sees the very same pictures.
"""

import torch
from torch import Tensor

# SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: int64 tensors shift arithmetically, so the copies of the sign bit are masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function of int64 counters; multiplication wraps modulo 2^64.

    >>> [hex(v & 0xFFFFFFFFFFFFFFFF) for v in mix(torch.tensor([0, 1])).tolist()]
    ['0xe220a8397b1dcdaf', '0x910a2dec89025cc1']
    """
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, _SHIFTS[2])


def sample_keys(seed: int, epoch: int, indices_N: Tensor) -> Tensor:
    """One int64 key a sample, from which any number of streams can be drawn.

    Args:
        seed: any integer.
        epoch: any integer.
        indices_N: int64 sample indices, shape (N,).
    """
    key = mix(torch.tensor(_signed(seed)))
    key = mix(key ^ _signed(epoch))
    return mix(key ^ indices_N)


def draw_integers(keys_N: Tensor, stream: int, bound: int) -> Tensor:
    """Integers in 0..bound - 1, int64, shape (N,); `stream` numbers the independent draws of one sample."""
    if not 1 <= bound <= 1 << 31:
        raise ValueError(f"bound must be between 1 and 2^31, got {bound}")
    # The high 31 bits times a bound of at most 2^31 stay inside int64; the bias is below bound / 2^31.
    return (_shift_right(mix(keys_N + stream), 33) * bound) >> 31


def draw_uniform(keys_N: Tensor, stream: int) -> Tensor:
    """Numbers in [0, 1), float64, shape (N,)."""
    return _shift_right(mix(keys_N + stream), 11).double() * 2.0**-53


def sample_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch: a permutation of 0..num_samples - 1, int64."""
    key = int(sample_keys(seed, epoch, torch.tensor([-1])))
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(key))
