import dataclasses

import pytest
import torch

from fewbits.quantizers import METHODS, Codes, QuantSpec, build, check_bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_that_are_allowed(bits: int):
    assert check_bits(bits) == bits
    assert QuantSpec("lsq", bits, "weight").bits == bits


@pytest.mark.parametrize(
    ("bits", "error"), [(0, ValueError), (9, ValueError), (-1, ValueError), (32, ValueError)]
    + [(bad, TypeError) for bad in ("four", "4", True, False, 4.0, None)],
)  # fmt: skip
def test_bits_that_are_not(bits: object, error: type[Exception]):
    with pytest.raises(error, match=r"(between 1 and 8|from 1 to 8), got " + repr(bits)):
        QuantSpec("lsq", bits, "weight")


def test_too_many_bits_say_the_way_out():
    with pytest.raises(ValueError, match="full precision"):
        check_bits(32)
    with pytest.raises(TypeError, match="feature_bits must be"):
        check_bits("two", "feature_bits")


@pytest.mark.parametrize(("field", "bad"), [("role", "bias"), ("granularity", "row"), ("start", "random")])
def test_specification_lists_its_choices(field: str, bad: str):
    with pytest.raises(ValueError, match=f"{field} must be one of .*, got '{bad}'"):
        QuantSpec(**{"method": "lsq", "bits": 4, "role": "weight", field: bad})


def test_activations_have_one_scale():
    with pytest.raises(ValueError, match="granularity must be 'tensor' for an activation"):
        QuantSpec("lsq", 4, "activation", "channel")


def test_specification_is_a_value():
    spec = QuantSpec("lsq", 4, "weight")
    assert spec == QuantSpec(**dataclasses.asdict(spec))
    assert len({spec, QuantSpec("lsq", 4, "weight")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 2


def test_unknown_method_lists_the_choices():
    with pytest.raises(ValueError, match="method must be one of " + ", ".join(METHODS) + ", got 'lqs'"):
        build(QuantSpec("lqs", 4, "weight"), 4, 0)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.bits == (1,)])
def test_binary_methods_have_one_bit(method: str):
    with pytest.raises(ValueError, match=r"works on 1 bit, got bits=2; use lsq"):
        build(QuantSpec(method, 2, "weight"), 4, 0)
    with pytest.raises(ValueError, match=r"bits must be 1 for .*, got 2; use lsq"):
        build(QuantSpec(method, 1, "weight"), 4, 0).set_bits(2)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lsq"])
def test_only_lsq_has_a_step_per_channel(method: str):
    with pytest.raises(ValueError, match="granularity 'channel' is there for method lsq"):
        build(QuantSpec(method, METHODS[method].bits[0], "weight", "channel"), 4, 0)


def test_codes_decode():
    codes = Codes(torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor(0.5), torch.tensor(-1.0), 0, 3)
    assert codes.decode().tolist() == [-1.0, -0.5, 0.5]
