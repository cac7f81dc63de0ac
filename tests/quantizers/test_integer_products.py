"""Products of whole numbers against those of float64, which holds every sum exactly."""

import pytest
import torch
from torch.nn import functional as F

from fewbits.quantizers.integer_products import INTEGER_CONVOLUTION, INTEGER_LINEAR, is_available, takes

pytestmark = pytest.mark.skipif(not is_available(), reason="this processor does not multiply bytes")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [(9, 3, 1, 1, 1), (9, 3, 2, 1, 1), (8, 1, 2, 0, 1), (16, 7, 2, 3, 1)],
)
def test_only_the_result_is_rounded(bits, zero_point, per_channel, size, kernel, stride, padding, dilation):
    torch.manual_seed(bits)
    codes = torch.randint(2**bits, (3, 20, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    low, high = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    weight, bias = torch.randn(24, 20, kernel, kernel), torch.randn(24)
    step = torch.rand(24, 1, 1, 1).add(0.5) if per_channel else torch.tensor(0.3)
    bounds = torch.tensor(float(low)), torch.tensor(float(high))
    place = [stride] * 2, [padding] * 2, [dilation] * 2
    y = INTEGER_CONVOLUTION(
        codes, torch.tensor(0.1), torch.tensor(-float(zero_point)), weight, step, *bounds, bias, *place
    )
    values = codes.double() - zero_point
    whole = F.conv2d(values, (weight / step).round().clamp(low, high).double(), None, *place)
    wanted = whole * (torch.tensor(0.1).double() * step.double().view(1, -1, 1, 1)) + bias.double().view(1, -1, 1, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.float32
    # Of two products and a sum in float32.
    torch.testing.assert_close(y.double(), wanted, rtol=3e-7, atol=3e-7 * float(wanted.abs().max()))


def test_a_step_of_zero_is_the_smallest_one():
    codes = torch.ones(1, 4, 3, 3, dtype=torch.uint8).to(memory_format=torch.channels_last)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    given = (torch.ones(4, 4, 1, 1), one, -one, one, None, [1, 1], [0, 0], [1, 1])
    assert INTEGER_CONVOLUTION(codes, zero, zero, *given).max() == pytest.approx(4e-8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("per_channel", [False, True])
def test_matrices(bits, zero_point, per_channel):
    torch.manual_seed(bits)
    codes = torch.randint(2**bits, (70, 33), dtype=torch.uint8)
    low, high = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    weight, bias = torch.randn(10, 33), torch.randn(10)
    step = torch.rand(10, 1).add(0.5) if per_channel else torch.tensor(0.3)
    bounds = torch.tensor(float(low)), torch.tensor(float(high))
    y = INTEGER_LINEAR(codes, torch.tensor(0.1), torch.tensor(-float(zero_point)), weight, step, *bounds, bias)
    whole = (codes.double() - zero_point) @ (weight / step).round().clamp(low, high).double().T
    wanted = whole * (torch.tensor(0.1).double() * step.double().view(1, -1)) + bias.double()
    torch.testing.assert_close(y.double(), wanted, rtol=3e-7, atol=3e-7 * float(wanted.abs().max()))


def test_other_defaults_of_the_process():
    is_available.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert is_available()
    finally:
        torch.set_default_dtype(before)


def test_a_bias_with_holes():
    codes = torch.ones(70, 4, dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    bias = torch.arange(16.0)[::2]
    y = INTEGER_LINEAR(codes, one, zero, torch.zeros(8, 4), one, -one, one, bias)
    assert torch.equal(y, bias.expand(70, 8))


SQUARE = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


@pytest.mark.parametrize(
    ("size", "kernel", "place", "is_taken"),
    [
        ((2, 16, 8, 8), (8, 16, 3, 3), {}, True),
        ((2, 16, 3, 3), (8, 16, 3, 3), {"stride": [2, 2]}, True),
        ((2, 16, 16, 2), (8, 16, 3, 3), {"stride": [2, 2]}, False),  # wrong values
        ((2, 16, 3, 9), (8, 16, 3, 3), {"stride": [2, 2], "padding": [0, 0]}, False),
        ((1, 16, 8, 8), (8, 16, 1, 1), {}, False),  # windows in the padding alone
        ((1, 128, 32, 31), (64, 128, 7, 7), {"padding": [3, 3], "dilation": [3, 3]}, False),  # memory
        ((1, 8, 13, 32), (8, 8, 3, 1), {"padding": [1, 0]}, False),  # wrong values
        ((1, 8192, 8, 8), (8, 8192, 3, 3), {}, False),  # 32 bits
    ],
)
def test_shapes_that_onednn_gets_wrong_are_left_to_others(size, kernel, place, is_taken):
    assert takes(size, kernel, **SQUARE | place) == is_taken
