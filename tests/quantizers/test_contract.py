"""What every quantizer promises. A new method is tested by being in ``METHODS``."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from fewbits.quantizers import METHODS, Quantizer, QuantSpec, build

ROLES = ("weight", "activation")
CASES = [
    pytest.param(QuantSpec(name, bits, role), id=f"{name}-{role}-{bits}")
    for name, method in METHODS.items()
    for role in ROLES
    for bits in method.bits
] + [pytest.param(QuantSpec("lsq", bits, "weight", "channel"), id=f"lsq-channel-{bits}") for bits in range(1, 9)]
SOME = [case for case in CASES if case.values[0].bits in (1, 3, 8)]
WIDE = [case for case in CASES if case.values[0].bits == 4]
# Grids that lie over the values themselves and stay where they are; the others map to another range or follow the data.
FIXED = [
    case
    for case in CASES
    if case.values[0].method in ("lsq", "sign")
    or (case.values[0].method, case.values[0].role) == ("pact", "activation")
]

every_case = pytest.mark.parametrize("spec", CASES)
some_cases = pytest.mark.parametrize("spec", SOME)
wide_cases = pytest.mark.parametrize("spec", WIDE)

SHAPES = {"weight": (4, 3, 3, 3), "activation": (2, 4, 3, 3)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(spec: QuantSpec, num_channels: int = 4) -> Quantizer:
    return build(spec, num_channels, 0 if spec.role == "weight" else 1)


def real(spec: QuantSpec) -> Tensor:
    """Values as a network has them: Gaussian weights; activations behind a ReLU where the method wants that."""
    x = torch.randn(SHAPES[spec.role])
    if spec.role == "weight":
        return x * 0.2
    return x if make(spec).signed else x.relu()


def calibrated(spec: QuantSpec) -> tuple[Quantizer, Tensor]:
    quantizer, x = make(spec), real(spec)
    quantizer.calibrate(x)
    return quantizer, x


def edges(spec: QuantSpec) -> dict[str, Tensor]:
    shape = SHAPES[spec.role]
    mixed = torch.randn(shape)
    return {
        "zeros": torch.zeros(shape),
        "constant": torch.full(shape, 0.7),
        "negative constant": torch.full(shape, -0.7),
        "one element": torch.full((1, 1, 1, 1), 0.7),
        "1e30": torch.full(shape, 1e30),
        "-1e30": torch.full(shape, -1e30),
        "up to 1e30": mixed.relu() * 1e30,
        "both ways to 1e30": mixed * 1e30,
        "one outlier": torch.where(torch.arange(mixed.numel()).view(shape) == 5, 1e30, mixed.abs()),
        "1e-30": torch.full(shape, 1e-30),
        "around 1e-30": mixed * 1e-30,
        "bf16": mixed.abs().bfloat16(),
    }


def parameters_of(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items() if name != "calibrated"}


def assert_same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def check(quantizer: Quantizer, x: Tensor) -> None:
    """The promises that hold for every input."""
    x = x.clone().requires_grad_()
    y, codes = quantizer(x), quantizer.encode(x)

    assert y.dtype == torch.float32
    assert y.shape == x.shape
    assert torch.equal(codes.decode(), y)
    assert not codes.decode().requires_grad
    assert codes.integers.dtype == torch.int32
    assert codes.low <= int(codes.integers.min())
    assert int(codes.integers.max()) <= codes.high
    assert bool((codes.scale > 0).all())
    assert bool(torch.isfinite(codes.scale).all())
    groups = y.reshape(y.shape[0], -1) if codes.scale.numel() > 1 else y.reshape(1, -1)
    assert max(len(group.unique()) for group in groups) <= 2**quantizer.bits
    assert bool(torch.isfinite(y).all())

    y.backward(torch.randn_like(y))
    for name, tensor in [("x", x), *quantizer.named_parameters()]:
        assert tensor.grad is not None, name
        assert bool(torch.isfinite(tensor.grad).all()), name
    assert x.grad is not None
    assert x.grad.dtype == x.dtype


@DTYPES
@every_case
def test_forward_is_what_the_codes_decode_to(spec: QuantSpec, dtype: torch.dtype):
    quantizer, x = calibrated(spec)
    check(quantizer, x.to(dtype))
    check(quantizer, (3 * x).to(dtype))  # with values that are clipped


@every_case
def test_uncalibrated_quantizers_work_too(spec: QuantSpec):
    check(make(spec), real(spec))


@some_cases
def test_edges(spec: QuantSpec):
    for x in edges(spec).values():
        one = x.numel() == 1
        quantizer = make(spec, 1 if one else 4)
        quantizer.calibrate(real(spec)[:1, :1] if one else real(spec))
        check(quantizer, x)  # a range from other data
        if quantizer.signed or not bool((x < 0).any()):
            quantizer.calibrate(x)
            check(quantizer, x)  # a range from these data
            assert all(bool(torch.isfinite(p).all()) for p in quantizer.state_dict().values())


@pytest.mark.parametrize("spec", FIXED)
def test_quantizing_twice_changes_nothing(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@some_cases
def test_gate(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    quantized, state = quantizer(x), copy.deepcopy(quantizer.state_dict())

    quantizer.enabled.fill_(False)
    x = (2 * x).requires_grad_()  # above 1 somewhere
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(y, quantizer.bypass(x))
    assert x.grad is not None
    match spec.method, spec.role:
        case "dorefa", "activation":
            assert torch.equal(y, x.clamp(0, 1))
        case "pact", "activation":
            assert torch.equal(y, x.clamp(0, quantizer.alpha.item()))
        case _:
            assert torch.equal(y, x)
            assert torch.equal(x.grad, torch.ones_like(x))
            assert all(p.grad is not None and not p.grad.any() for p in quantizer.parameters())

    quantizer.enabled.fill_(True)
    assert torch.equal(quantizer(x.detach() / 2), quantized)
    assert_same_state(state, quantizer.state_dict())


@wide_cases
def test_set_bits(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    x = x * torch.linspace(0.5, 1.5, x.numel()).view_as(x)
    before, state = quantizer(x), parameters_of(quantizer)
    assert len(quantizer.encode(x).integers.unique()) > 4

    quantizer.set_bits(2)
    assert quantizer.bits == 2
    assert not quantizer.calibrated  # a changed width has to be calibrated anew
    assert len(quantizer.encode(x).integers.unique()) <= 4
    check(quantizer, x)

    quantizer.set_bits(spec.bits)
    assert quantizer.spec == spec
    assert torch.equal(quantizer(x), before)
    assert_same_state(state, parameters_of(quantizer))


@some_cases
def test_same_bits_keep_the_calibration(spec: QuantSpec):
    quantizer, _ = calibrated(spec)
    quantizer.set_bits(spec.bits)
    assert quantizer.calibrated


@some_cases
@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "four", True, None])
def test_set_bits_refuses(spec: QuantSpec, bits: object):
    quantizer = make(spec)
    with pytest.raises((ValueError, TypeError), match=r"bits must be .*1 (and|to) 8, got"):
        quantizer.set_bits(bits)
    assert quantizer.spec == spec


@some_cases
def test_state_dict_round_trip(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(1.25).add_(0.01)
    quantizer.enabled.fill_(False)
    fresh = make(spec)
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.calibrated
    assert not fresh.enabled
    for each in (quantizer, fresh):
        each.enabled.fill_(True)
    assert torch.equal(fresh(x), quantizer(x))


@some_cases
def test_autocast_computes_in_float32(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    outside = quantizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(x)
        codes = quantizer.encode(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(codes.decode(), outside)


@some_cases
def test_calibration_is_repeatable_and_leaves_its_data_alone(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    before, state = x.clone(), parameters_of(quantizer)
    quantizer.calibrate(x)
    assert torch.equal(x, before)
    assert_same_state(state, parameters_of(quantizer))
    assert all(p.requires_grad and p.is_leaf for p in quantizer.parameters())


@some_cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_calibration_refuses_what_is_not_finite(spec: QuantSpec, bad: float):
    quantizer, x = make(spec), real(spec)
    x.view(-1)[3] = bad
    with pytest.raises(ValueError, match=f"1 of {x.numel()} values that are NaN or infinite"):
        quantizer.calibrate(x)
    assert not quantizer.calibrated


@some_cases
def test_calibration_refuses_nothing_at_all(spec: QuantSpec):
    quantizer = make(spec)
    with pytest.raises(ValueError, match="empty"):
        quantizer.calibrate(torch.zeros(0, 4, 3, 3))
    assert not quantizer.calibrated


@some_cases
def test_signed_data(spec: QuantSpec):
    quantizer, x = make(spec), torch.randn(SHAPES[spec.role])
    if quantizer.signed:
        quantizer.calibrate(x)
        return
    assert (spec.method, spec.role) in {("dorefa", "activation"), ("pact", "activation")}
    with pytest.raises(ValueError, match=r"goes down to -\d.*use method lsq or ewgs .* or put a ReLU"):
        quantizer.calibrate(x)
    assert not quantizer.calibrated


@some_cases
def test_learned_ranges_driven_negative_stay_positive(spec: QuantSpec):
    quantizer, x = calibrated(spec)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(-3.0)
    check(quantizer, x)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(("method", "role"), [("lsq", "weight"), ("lsq", "activation"), ("pact", "activation")])
def test_learned_ranges_driven_negative_recover(method: str, role: str, bits: int):
    """Descent on the squared error finds its way back. (EWGS cannot: clipped values move neither end.)"""
    spec = QuantSpec(method, bits, role)
    quantizer, x = calibrated(spec)
    (learned,) = quantizer.parameters()
    with torch.no_grad():
        learned.fill_(-0.05)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (quantizer(x) - x).square().sum()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert learned.item() > 1e-3
    assert errors[-1] < 0.8 * errors[0]


@some_cases
def test_prints_its_specification(spec: QuantSpec):
    text = repr(make(spec))
    assert re.search(rf"{spec.method}, {spec.bits} bits?", text), text


def test_every_method_names_its_paper_and_holds_no_surprises():
    for method in METHODS.values():
        for kind in (method.weight, method.activation):
            assert issubclass(kind, Quantizer)
            assert kind.paper
            quantizer = kind(QuantSpec("lsq", 1, "weight"), 4, 0)
            assert kind.needs_data or not any(True for n, _ in quantizer.named_parameters() if n != "shift")
            assert set(kind.decayed) <= {name for name, _ in quantizer.named_parameters()}


def test_deepcopy_shares_nothing():
    quantizer, x = calibrated(QuantSpec("ewgs", 2, "weight"))
    twin = copy.deepcopy(nn.Sequential(quantizer))
    with torch.no_grad():
        twin[0].output_scale.fill_(7.0)
    assert not torch.equal(twin(x), quantizer(x))
