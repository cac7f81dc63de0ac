"""Quantize, teach, ship: vision networks on 8 to 1 bits, taught by the full-precision network they came from."""

__version__ = "0.1.0"

__all__: list[str] = ["__version__"]
