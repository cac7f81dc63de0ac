"""Codes <-> bytes: ``n`` codes of ``b`` bits take ``ceil(n * b / 8)`` bytes, whatever ``b`` is.

One dense layout for all widths: code ``i`` occupies bits ``i * b`` to ``i * b + b - 1`` of the stream, lowest bit
first, and bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8`` (little-endian, as
``numpy.packbits(bitorder="little")``). For 1, 2, 4 and 8 bits no code crosses a byte: one shift and one mask unpack it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_size(9, 3)
    4
    """
    return (count * bits + 7) // 8


def pack(codes: npt.ArrayLike, bits: int) -> Bytes:
    """Pack unsigned codes densely.

    Args:
        codes: whole numbers from 0 to ``2**bits - 1``, any shape; read in row-major order.
        bits: 1 to 8.

    Returns:
        uint8, ``packed_size(codes.size, bits)`` bytes; the unused bits of the last byte are zero.

    Raises:
        ValueError: ``bits`` out of range, or a code that does not fit.

    >>> pack([1, 2, 3, 0, 1], bits=2).tolist()
    [57, 1]
    """
    _check_bits(bits)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and not (np.issubdtype(flat.dtype, np.integer) and flat.min() >= 0 and flat.max() < 2**bits):
        raise ValueError(
            f"codes must be whole numbers from 0 to {2**bits - 1} for bits={bits}, got {flat.dtype} from {flat.min()} "
            f"to {flat.max()}; subtract the smallest code first"
        )
    stream = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(-1), bitorder="little")


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first ``count`` codes of ``packed``, as uint8: the inverse of ``pack``.

    Raises:
        ValueError: ``bits`` out of range, or another number of bytes than ``count`` codes take.

    >>> unpack(pack([1, 2, 3, 0, 1], bits=2), bits=2, count=5).tolist()
    [1, 2, 3, 0, 1]
    """
    _check_bits(bits)
    if packed.size != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {packed.size}: damaged?"
        )
    stream = np.unpackbits(packed.reshape(-1), count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").reshape(-1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
