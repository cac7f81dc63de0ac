"""From a trained network to a file that an engine runs: small, fused to integer kernels, and proved equal."""

from .export import export
from .result import CodeRow, Exported, LayerRow, ParityError

__all__ = ["CodeRow", "Exported", "LayerRow", "ParityError", "export"]
