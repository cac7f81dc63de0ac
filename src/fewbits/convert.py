"""From a float network to a quantized one: the plan and ``quantize``."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from torch import Tensor, nn

from .checks import check_network
from .layers import QUANTIZED
from .names import unknown_name
from .quantizers import METHODS, Quantizer, QuantSpec, build, check_bits
from .quantizers.base import Granularity, Start
from .streams import Trace, attach, trace

FLOAT_BITS = 32
"""What a plan calls full precision, and the bits of a value in it."""


@dataclass(frozen=True)
class Rule:
    """Bits for the layers whose qualified name matches ``pattern`` (``*`` and ``?`` as in file names).

    ``None`` keeps the plan's own setting; 32 is full precision.
    """

    pattern: str
    weights: int | None = None
    activations: int | None = None
    quantizer: str | None = None


@dataclass(frozen=True)
class Plan:
    """Which layer is quantized how. Frozen data: saved with every run.

    Args:
        weights: bits of weights, 1 to 8, or 32 for full precision.
        activations: bits of layer inputs, likewise.
        quantizer: a key of ``fewbits.quantizers.METHODS``.
        granularity: one weight scale per ``"tensor"`` or per output ``"channel"``.
        ends: first and last layer: bits of LSQ (8 by default, whatever the quantizer), 32 for full precision, or
            ``"paper"``: as the quantizer's paper has it.
        residual: bits of the quantizers on what enters and leaves additions, concatenations and pooling; ``None`` is
            the papers' float shortcut.
        keep: patterns of layers that stay in full precision.
        rules: exceptions, the first match counts; they win over ``ends``.
        start: see ``QuantSpec``.
    """

    weights: int = 4
    activations: int = 4
    quantizer: str = "lsq"
    granularity: Granularity = "tensor"
    ends: int | Literal["paper"] = 8
    residual: int | None = 8
    keep: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    start: Start = "data"

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            _check_width(getattr(self, name), name)
        if self.ends != "paper":
            _check_width(self.ends, "ends")
        if self.residual is not None:
            check_bits(self.residual, "residual")
        if self.quantizer not in METHODS:
            raise ValueError(unknown_name("quantizer", self.quantizer, METHODS))

    @classmethod
    def of(
        cls,
        weights: int,
        activations: int,
        quantizer: str | None = None,
        residual: int | Literal["auto"] | None = "auto",
        **rest: Any,
    ) -> Plan:
        """A plan with the defaults that depend on the bits.

        The quantizer is lsq, or sign at 1/1; the residual is 8 above one bit and none for binary networks.
        """
        binary = weights == 1 and activations == 1
        quantizer = quantizer or ("sign" if binary else "lsq")
        if residual == "auto":
            residual = None if binary else 8
        return cls(weights, activations, quantizer, residual=residual, **rest)


# What the papers do with the first and the last layer (methods page of each): LSQ 8 bits, the others full precision.
_PAPER_ENDS = {"lsq": 8}


def _check_width(bits: object, name: str) -> None:
    if bits != FLOAT_BITS or isinstance(bits, bool):
        check_bits(bits, name)


@dataclass(frozen=True)
class LayerSpecs:
    """What happens to one layer, and why it stays float if it does."""

    weight: QuantSpec | None
    activation: QuantSpec | None
    reason: str = ""


def quantize(
    model: nn.Module,
    weights: int = 4,
    activations: int = 4,
    *,
    quantizer: str | None = None,
    residual: int | Literal["auto"] | None = "auto",
    keep: Sequence[str] = (),
    rules: Sequence[Rule] = (),
    ends: int | Literal["paper"] = 8,
    granularity: Granularity = "tensor",
    plan: Plan | None = None,
) -> nn.Module:
    """Return a copy of ``model`` whose convolutions and linear layers are quantized; the original is untouched.

    Ranges are not set yet: ``calibrate`` does it from real batches, and an objective or ``fit`` calls it.

    Args:
        model: any ``nn.Module`` with ``nn.Conv2d`` or ``nn.Linear`` layers.
        weights: bits of weights, 1 to 8, or 32.
        activations: bits of layer inputs, 1 to 8, or 32.
        quantizer: see ``Plan``; by default lsq, or sign at 1/1.
        residual: see ``Plan``; by default 8, or None at 1/1.
        keep: patterns of qualified names that stay in full precision.
        rules: exceptions by qualified name.
        ends: first and last layer, see ``Plan``.
        granularity: of weight scales.
        plan: everything above in one value; the other arguments are then not read.

    Raises:
        TypeError: ``model`` is no network.
        ValueError: nothing to quantize, a pattern without a match, bits out of range, a forward that cannot be traced
            while ``residual`` is set, or a model that is quantized already.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> student = quantize(net, weights=2, activations=2)
    >>> student[2].weight_quantizer
    LSQWeight(lsq, 2 bits, tensor)
    """
    check_network("model", model)
    plan = plan or Plan.of(
        weights,
        activations,
        quantizer,
        residual,
        keep=(keep,) if isinstance(keep, str) else tuple(keep),
        rules=tuple(rules),
        ends=ends,
        granularity=granularity,
    )
    if any(isinstance(m, Quantizer) for m in model.modules()):
        raise ValueError("model is quantized already; pass the float network, or change bits with set_bits")
    specs, seen = assign(model, plan)
    student = copy.deepcopy(model)
    for name, layer in specs.items():
        if layer.weight or layer.activation:
            module = student.get_submodule(name)
            QUANTIZED[type(module)].from_float(module, layer.weight, layer.activation)
    for module in student.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval mode without gradients it would read its layers' float weights and call none of them.
            module.activation_relu_or_gelu = 0
    if plan.residual is not None and seen is not None:
        spec = QuantSpec("lsq", plan.residual, "activation", start=plan.start, fixed=True)
        for place in seen.places:
            attach(student.get_submodule(place.module), place.side, build(spec, 1, 1))
        if seen.unreachable:
            warnings.warn(
                f"residual={plan.residual}: values inside {', '.join(seen.unreachable)} are reached by no module and "
                "stay float; give their activation a module of its own (nn.ReLU) to quantize them",
                stacklevel=2,
            )
    student.register_load_state_dict_post_hook(_accept_float_state)
    student.__dict__["fewbits_plan"] = plan
    return student


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that ``model`` was quantized by, or None for a float network."""
    return cast("Plan | None", model.__dict__.get("fewbits_plan"))


def assign(model: nn.Module, plan: Plan) -> tuple[dict[str, LayerSpecs], Trace | None]:
    """Which layer of the float ``model`` gets which specification, in the order in which layers run.

    Returns:
        Specifications by qualified name, layers that stay float included; and what the trace saw, if there was one.
    """
    # Exactly these types: a subclass may compute something else.
    names = [n for n, m in model.named_modules() if type(m) in QUANTIZED and not _is_hidden(model, n)]
    if not names:
        raise ValueError(
            f"model {type(model).__name__} has no nn.Conv2d and no nn.Linear that could be quantized; "
            "subclasses of them are left alone"
        )
    seen: Trace | None = None
    try:
        seen = trace(model, tuple(QUANTIZED))
    except ValueError:
        if plan.residual is not None:
            raise
    if seen is not None:
        names.sort(key=lambda n: seen.order.index(n) if n in seen.order else len(seen.order))
    _check_patterns(plan, names)
    run = [n for n in names if seen is None or n in seen.order] or names  # what never runs is no end
    return {name: _specs(name, {run[0], run[-1]}, plan) for name in names}, seen


def _is_hidden(model: nn.Module, name: str) -> bool:
    """nn.MultiheadAttention reads its out_proj's weight without calling it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _specs(name: str, ends_of_network: set[str], plan: Plan) -> LayerSpecs:
    if any(matches(name, pattern) for pattern in plan.keep):
        return LayerSpecs(None, None, "kept by the plan")
    weights, activations, method, fixed = plan.weights, plan.activations, plan.quantizer, True
    rule = next((r for r in plan.rules if matches(name, r.pattern)), None)
    if rule is not None:
        weights = plan.weights if rule.weights is None else rule.weights
        activations = plan.activations if rule.activations is None else rule.activations
        method = rule.quantizer or plan.quantizer
    elif name in ends_of_network:
        ends = _PAPER_ENDS.get(plan.quantizer, FLOAT_BITS) if plan.ends == "paper" else plan.ends
        if ends == FLOAT_BITS:
            return LayerSpecs(None, None, "first or last layer")
        method = "lsq"
        # Full precision was asked for one side of the whole network: the ends follow.
        weights = FLOAT_BITS if weights == FLOAT_BITS else ends
        activations = FLOAT_BITS if activations == FLOAT_BITS else ends
    else:
        fixed = False
    granularity = plan.granularity if method == "lsq" else "tensor"
    return LayerSpecs(
        None if weights == FLOAT_BITS else QuantSpec(method, weights, "weight", granularity, plan.start, fixed),
        None
        if activations == FLOAT_BITS
        else QuantSpec(method, activations, "activation", start=plan.start, fixed=fixed),
        "32 bits asked for" if weights == activations == FLOAT_BITS else "",
    )


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names the layer or something that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _check_patterns(plan: Plan, names: list[str]) -> None:
    for argument, patterns in (("keep", plan.keep), ("rules", tuple(r.pattern for r in plan.rules))):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3) or names[:3]
                raise ValueError(f"{argument} pattern {pattern!r} matches no layer; layers are {', '.join(close)}, ...")


def quantizer_keys(model: nn.Module) -> set[str]:
    """The ``state_dict`` keys that belong to quantizers."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer))
    return {key for key in model.state_dict() if key.startswith(prefixes)} if prefixes else set()


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` without quantizers: it loads into the float network."""
    drop = quantizer_keys(model)
    return {key: value for key, value in model.state_dict().items() if key not in drop}


def _accept_float_state(model: nn.Module, result: Any) -> None:
    """A float state has no quantizer key at all and loads as it is; one with only some of them is an error."""
    own = quantizer_keys(model)
    if own <= set(result.missing_keys):
        result.missing_keys[:] = [key for key in result.missing_keys if key not in own]


def check_calibrated(student: nn.Module) -> None:
    """Raises ValueError where a quantizer that takes its range from data has seen none."""
    never = [name for name, q in quantizers_of(student) if q.needs_data and not bool(q.calibrated)]
    if never:
        raise ValueError(f"student was never calibrated ({', '.join(never[:3])}, ...): call calibrate or fit first")


def quantizers_of(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers with their qualified names."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
