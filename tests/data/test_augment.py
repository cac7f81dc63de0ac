"""Crops and flips against a slow loop over samples, and that they depend on the sample alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewbits.data.augment import NONE, Augment, crop_and_flip
from fewbits.data.draws import draw_integers, draw_uniform, sample_keys, sample_order

MASK = (1 << 64) - 1


def slow_mix(x: int) -> int:
    """SplitMix64 in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_draw(seed: int, epoch: int, index: int, stream: int, bound: int) -> int:
    key = slow_mix(slow_mix(slow_mix(seed & MASK) ^ (epoch & MASK)) ^ index)
    return ((slow_mix((key + stream) & MASK) >> 33) * bound) >> 31


def slow_crop_and_flip(image_CHW: Tensor, index: int, augment: Augment, seed: int, epoch: int) -> Tensor:
    pad = augment.pad
    channels, height, width = image_CHW.shape
    top = slow_draw(seed, epoch, index, 0, 2 * pad + 1)
    left = slow_draw(seed, epoch, index, 1, 2 * pad + 1)
    flip = augment.flip and slow_draw(seed, epoch, index, 2, 2) == 1
    out = torch.zeros_like(image_CHW)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                from_y, from_x = y + top - pad, x + left - pad
                if 0 <= from_y < height and 0 <= from_x < width:
                    out[channel, y, width - 1 - x if flip else x] = image_CHW[channel, from_y, from_x]
    return out


@given(
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 1000),
    indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=4),
    pad=st.integers(0, 3),
    flip=st.booleans(),
    as_float=st.booleans(),
)
def test_equals_a_slow_loop(seed, epoch, indices, pad, flip, as_float):
    images = torch.randint(1, 256, (len(indices), 2, 4, 5), dtype=torch.uint8)
    images = images.float() / 255 if as_float else images
    augment = Augment(pad, flip)
    before = images.clone()
    out = crop_and_flip(images, torch.tensor(indices), augment, seed=seed, epoch=epoch)
    slow = [slow_crop_and_flip(image, i, augment, seed, epoch) for image, i in zip(images, indices, strict=True)]
    assert torch.equal(out, torch.stack(slow))
    assert torch.equal(images, before)
    assert out.dtype == images.dtype


def test_depends_on_the_sample_and_not_on_its_batch():
    images, indices = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(100, 164)
    whole = crop_and_flip(images, indices, Augment(2, True), seed=1, epoch=2)
    order = torch.randperm(64)
    assert torch.equal(crop_and_flip(images[order], indices[order], Augment(2, True), seed=1, epoch=2), whole[order])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(crop_and_flip(images, indices, Augment(2, True), **other), whole)


def test_nothing_to_do_keeps_the_images():
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    assert crop_and_flip(images, torch.arange(3), NONE, seed=0, epoch=0) is images


@pytest.mark.parametrize("bound", [2, 3, 9])
def test_draws_are_even(bound):
    counts = draw_integers(sample_keys(0, 0, torch.arange(90_000)), 1, bound).bincount(minlength=bound)
    expected = 90_000 / bound
    assert (counts - expected).abs().max() < 5 * expected**0.5  # five standard deviations


def test_streams_are_independent_and_uniform():
    keys = sample_keys(3, 4, torch.arange(20_000))
    draws = torch.stack([draw_uniform(keys, stream) for stream in range(7)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert (draws.mean(1) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(draws) - torch.eye(7)).abs().max() < 0.04


def test_order_is_a_permutation_that_seed_and_epoch_choose():
    order = sample_order(100, seed=1, epoch=2)
    assert order.sort().values.tolist() == list(range(100))
    assert torch.equal(order, sample_order(100, seed=1, epoch=2))
    assert not torch.equal(order, sample_order(100, seed=2, epoch=1))
    state = torch.get_rng_state()
    sample_order(100, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "text"), [({"pad": -1}, "pad"), ({"min_area": 0}, "min_area"), ({"min_area": 2}, "min_area")]
)
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        Augment(**options)


def test_bad_bound():
    with pytest.raises(ValueError, match="bound must be between"):
        draw_integers(torch.tensor([0]), 0, 0)
