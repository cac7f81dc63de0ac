"""Batches: the same whatever the number of processes, and from wherever they are taken up again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.data import Augment, Normalisation, TensorSplit
from fewbits.data.split import plan_batches

NORMALISATION = Normalisation((0.4, 0.5), (0.2, 0.3))


def split_of(num: int, size: int = 6) -> TensorSplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 2, size, size), dtype=torch.uint8, generator=generator)
    return TensorSplit(images, torch.arange(num))


@given(num=st.integers(1, 40), batch_size=st.integers(1, 12), num_ranks=st.integers(1, 5), shuffle=st.booleans())
def test_the_ranks_together_read_the_single_process_batches(num, batch_size, num_ranks, shuffle):
    split = split_of(num)
    options = {
        "batch_size": batch_size,
        "normalisation": NORMALISATION,
        "augment": Augment(1, True),
        "shuffle": shuffle,
        "seed": 3,
        "epoch": 4,
    }
    whole = list(split.batches(**options))
    ranks = [list(split.batches(**options, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for k, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([batches[k][0] for batches in ranks]), images)
        assert torch.equal(torch.cat([batches[k][1] for batches in ranks]), labels)
        sizes = [len(batches[k][1]) for batches in ranks]
        assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == list(range(num))


@given(num=st.integers(4, 40), batch_size=st.integers(1, 4), start=st.integers(0, 12), drop_last=st.booleans())
def test_a_late_start_reads_the_rest(num, batch_size, start, drop_last):
    split = split_of(num)
    options = {"batch_size": batch_size, "normalisation": NORMALISATION, "shuffle": True, "drop_last": drop_last}
    rest = list(split.batches(**options, augment=Augment(2, True), start_batch=start))
    whole = list(split.batches(**options, augment=Augment(2, True)))[start:]
    assert len(rest) == len(whole)
    for (images, labels), (images_whole, labels_whole) in zip(rest, whole, strict=True):
        assert torch.equal(images, images_whole)
        assert torch.equal(labels, labels_whole)


def test_values_are_normalised_pixels_in_order():
    split = split_of(5)
    images, labels = next(split.batches(batch_size=5, normalisation=NORMALISATION))
    mean, std = torch.tensor([0.4, 0.5]).view(2, 1, 1), torch.tensor([0.2, 0.3]).view(2, 1, 1)
    assert torch.equal(images, (split.images.float() / 255 - mean) / std)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_padding_is_black_before_normalisation():
    split = TensorSplit(torch.full((64, 2, 4, 4), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    images, _ = next(split.batches(batch_size=64, normalisation=NORMALISATION, augment=Augment(pad=2)))
    black = NORMALISATION.apply(torch.zeros(1, 2, 1, 1)).flatten()
    assert torch.equal(images.amin((0, 2, 3)), black)


def test_uint8_and_float_images_agree():
    split = split_of(8)
    floats = TensorSplit(split.images.float() / 255, split.labels)
    options = {"batch_size": 8, "normalisation": NORMALISATION, "augment": Augment(1, True)}
    before = floats.images.clone()
    assert torch.equal(next(split.batches(**options))[0], next(floats.batches(**options))[0])
    assert torch.equal(floats.images, before)


def test_subset_keeps_the_order_of_its_indices():
    subset = split_of(6).subset(torch.tensor([4, 1]))
    assert subset.labels.tolist() == [4, 1]
    assert torch.equal(subset.images, split_of(6).images[[4, 1]])


def test_resizing():
    split = TensorSplit(split_of(3).images, split_of(3).labels, image_size=12)
    images, _ = next(split.batches(batch_size=3, normalisation=NORMALISATION))
    assert images.shape == (3, 2, 12, 12)
    shares = [next(split.batches(batch_size=3, normalisation=NORMALISATION, rank=r, num_ranks=4))[0] for r in range(4)]
    assert torch.equal(torch.cat(shares), images)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2, "rank": 2, "num_ranks": 2}, "rank must be between"),
        ({"batch_size": 2, "rank": -1}, "rank must be between"),
        ({"batch_size": 2, "num_ranks": 0}, "rank must be between"),
        ({"batch_size": 2, "start_batch": -1}, "start_batch"),
        ({"batch_size": 3, "num_ranks": 2, "drop_last": True}, "multiple of the 2 processes"),
        ({"batch_size": 11, "drop_last": True}, "at most the number of samples, 10"),
    ],
)
def test_bad_arguments_fail_at_the_call(options, text):
    with pytest.raises(ValueError, match=text):
        split_of(10).batches(normalisation=NORMALISATION, **options)
    with pytest.raises(ValueError, match=text):
        plan_batches(10, **options)


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="min_area works on image folders only"):
        split_of(2).batches(batch_size=2, normalisation=NORMALISATION, augment=Augment(min_area=0.5))


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [((0.1, 0.2), (1.0,), "one number a channel"), ((), (), "one number"), ((0.1,), (0.0,), "positive")],
)
def test_bad_normalisation(mean, std, text):
    with pytest.raises(ValueError, match=text):
        Normalisation(mean, std)


def test_normalisation_of_other_channels():
    with pytest.raises(ValueError, match="must have 2 channels"):
        NORMALISATION.apply(torch.zeros(1, 3, 2, 2))


def test_normalisation_measured_and_none():
    images = torch.randint(0, 256, (50, 2, 8, 8), dtype=torch.uint8)
    normalised = Normalisation.measure(images).apply(images.float() / 255)
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-3
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert Normalisation.measure(torch.zeros(2, 1, 4, 4)).std == (1.0,)
    assert torch.equal(Normalisation.identity(2).apply(images.float()), images.float())
