"""Calibration: the grid with the least squared error on real values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fewbits.quantizers import QuantSpec, build
from fewbits.quantizers.start import MAX_SAMPLES, best_affine, best_range, best_step, sample

FINE = 1000


def weights() -> Tensor:
    return torch.randn(64, 16, 3, 3) * 0.05


def activations() -> Tensor:
    return torch.randn(4, 16, 16, 16).relu()


def error_of_grid(x: Tensor, step: float, low: int, high: int, offset: float = 0.0) -> float:
    codes = ((x - offset) / step).round().clamp(low, high)
    return float((codes * step + offset - x).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_lsq_beats_the_start_of_the_paper(bits: int, role: str):
    x = weights() if role == "weight" else activations()
    errors = {}
    for start in ("data", "paper"):
        quantizer = build(QuantSpec("lsq", bits, role, start=start), 64, 0)
        quantizer.calibrate(x)
        errors[start] = (quantizer(x) - x).square().mean().item()
    assert errors["data"] < errors["paper"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_ewgs_beats_the_start_of_the_paper(bits: int, role: str):
    x = weights() if role == "weight" else activations()
    errors = {}
    for start in ("data", "paper"):
        quantizer = build(QuantSpec("ewgs", bits, role, start=start), 64, 0)
        quantizer.calibrate(x)
        lower, upper = (quantizer.get_parameter(name).item() for name in ("lower", "upper"))
        errors[start] = error_of_grid(x, (upper - lower) / (2**bits - 1), 0, 2**bits - 1, lower)
    assert errors["data"] < errors["paper"]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pact_beats_the_start_of_the_paper(bits: int):
    x, errors = activations(), {}
    for start in ("data", "paper"):
        quantizer = build(QuantSpec("pact", bits, "activation", start=start), 16, 1)
        quantizer.calibrate(x)
        errors[start] = (quantizer(x) - x).square().mean().item()
    assert errors["data"] < errors["paper"]


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-4, 3), (-8, 7), (-127, 127), (0, 1), (0, 3), (0, 15), (0, 255)])
def test_step_is_near_that_of_a_finer_search(low: int, high: int):
    x = weights().flatten()[:4000] if low else activations().flatten()[:4000]
    ours = error_of_grid(x, float(best_step(x[None], low, high)[0]), low, high)
    largest = float(x.abs().max())
    finest = min(
        error_of_grid(x, largest * fraction / FINE / high, low, high)
        for fraction in range(1, FINE + 1, 1 + high // 100)
    )
    assert ours <= finest * 1.02


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("data", ["silu", "leaky relu", "normal", "shifted"])
def test_affine_grid_is_near_that_of_a_finer_search(bits: int, data: str):
    x = torch.randn(2000)
    x = {"silu": F.silu(2 * x), "leaky relu": F.leaky_relu(x, 0.1), "normal": x, "shifted": x + 1}[data]
    n = 2**bits - 1
    step, zero_point = best_affine(x, n)
    ours = error_of_grid(x, float(step), -zero_point, n - zero_point)
    spread = float(x.max() - x.min())
    finest = min(
        error_of_grid(x, spread * fraction / 150 / n, -zero, n - zero)
        for fraction in range(10, 151)
        for zero in range(0, n + 1, 1 + n // 30)
    )
    assert ours <= finest * 1.05


@pytest.mark.parametrize("num_steps", [1, 3, 15, 255])
@pytest.mark.parametrize("symmetric", [True, False])
def test_range_is_near_that_of_a_finer_search(num_steps: int, symmetric: bool):
    x = weights().flatten()[:4000] if symmetric else activations().flatten()[:4000]
    upper = best_range(x, 0.0, num_steps, symmetric)
    lowest = -upper if symmetric else 0.0
    ours = error_of_grid(x, (upper - lowest) / num_steps, 0, num_steps, lowest)
    most = float(x.abs().max())
    finest = math.inf
    for fraction in range(1, FINE + 1):
        top = most * fraction / FINE
        bottom = -top if symmetric else 0.0
        finest = min(finest, error_of_grid(x, (top - bottom) / num_steps, 0, num_steps, bottom))
    assert ours <= finest * 1.02


def test_each_channel_has_its_own_step():
    x = torch.randn(3, 50) * torch.tensor([[1.0], [10.0], [0.1]])
    together = best_step(x, -2, 1)
    assert torch.equal(together, torch.cat([best_step(row[None], -2, 1) for row in x]))


@given(st.floats(0.0625, 16, width=32), st.integers(1, 8))
def test_step_follows_the_size_of_the_data(factor: float, bits: int):
    x = torch.linspace(0, 1, 50).square()[None]
    torch.testing.assert_close(
        best_step(x * factor, 0, 2**bits - 1), best_step(x, 0, 2**bits - 1) * factor, rtol=0.02, atol=0
    )


@pytest.mark.parametrize("num", [10, MAX_SAMPLES, MAX_SAMPLES + 1, 3 * MAX_SAMPLES + 7])
def test_sample_keeps_the_extremes_and_all_columns(num: int):
    x = torch.randn(num)
    taken = sample(x)
    assert len(taken) <= MAX_SAMPLES + 2
    assert taken.min() == x.min()
    assert taken.max() == x.max()
    if num > MAX_SAMPLES:
        columns = (torch.arange(num) % 64).float()
        assert len(sample(columns).unique()) == 64
    else:
        assert torch.equal(taken, x)


def test_a_huge_value_does_not_spoil_the_search():
    """Squared errors above 1e38 overflow: the step must follow the data all the same."""
    for x in (torch.full((1, 50), 1e30), torch.linspace(0, 1e30, 50)[None]):
        assert 1e28 < float(best_step(x, 0, 15)[0]) < 1.1e30
    step, _ = best_affine(torch.linspace(-1e30, 1e30, 51), 15)
    assert 1e28 < float(step) < 1e30
    assert 1e29 < best_range(torch.linspace(0, 1e30, 50), 0.0, 15, symmetric=False) < 1e31
