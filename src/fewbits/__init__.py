"""Low-bit vision networks, taught by the float network they came from: quantize, teach, ship."""

from . import data, hub, models, quantizers, recipes
from .calibration import calibrate
from .convert import Plan, Rule, float_state, quantize
from .deploy import Exported, Packed, ParityError, export, freeze_ranges, load_packed, pack
from .distill import Losses, Networks, Objective
from .integers import settle_biases
from .quantizers import Codes, Quantizer, QuantSpec
from .quantizers.again import QuantizingAgain
from .recipes import Recipe
from .report import report
from .summary import Summary, summarize
from .training import Result, Settings, TrainingError, accuracy, bound_steps, fit

__all__ = [
    "Codes",
    "Exported",
    "Losses",
    "Networks",
    "Objective",
    "Packed",
    "ParityError",
    "Plan",
    "QuantSpec",
    "Quantizer",
    "QuantizingAgain",
    "Recipe",
    "Result",
    "Rule",
    "Settings",
    "Summary",
    "TrainingError",
    "accuracy",
    "bound_steps",
    "calibrate",
    "data",
    "export",
    "fit",
    "float_state",
    "freeze_ranges",
    "hub",
    "load_packed",
    "models",
    "pack",
    "quantize",
    "quantizers",
    "recipes",
    "report",
    "settle_biases",
    "summarize",
]
__version__ = "0.1.0"
