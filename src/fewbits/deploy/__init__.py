"""From a trained network to a file that an engine runs: small, fused to integer kernels, and proved equal."""

from .bench import BenchRow, accuracy, bench, costs
from .costs import Cost
from .export import export
from .freeze import freeze_ranges
from .measure import measure_kernels
from .packed import Packed, load_packed, pack
from .probe import Probed, probe
from .prove import Proof, prove
from .result import CodeRow, Exported, LayerRow, ParityError
from .seal import check as check_seal

__all__ = [
    "BenchRow",
    "CodeRow",
    "Cost",
    "Exported",
    "LayerRow",
    "Packed",
    "ParityError",
    "Probed",
    "Proof",
    "accuracy",
    "bench",
    "check_seal",
    "costs",
    "export",
    "freeze_ranges",
    "load_packed",
    "measure_kernels",
    "pack",
    "probe",
    "prove",
]
