"""Sets from tensors, held-out parts and small parts."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.data import Dataset, TensorSplit, load


def images(num: int, size: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (num, 1, size, size), dtype=torch.uint8)


def dataset(counts: list[int]) -> Dataset:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Dataset.from_tensors("mine", train=(pixels, labels), test=(images(2), torch.tensor([0, 1])))


def test_from_tensors_describes_the_set():
    data = dataset([3, 4])
    assert (data.num_classes, data.channels, data.image_size, data.classes) == (2, 1, 4, ("0", "1"))
    assert (data.train.num_samples, data.test.num_samples) == (7, 2)


def test_numpy_arrays_are_taken_too():
    pixels, labels = images(4).numpy().copy(), np.array([0, 1, 0, 1], dtype=np.uint16)
    pixels.setflags(write=False)
    flipped = pixels[..., ::-1]  # a view that torch refuses
    data = Dataset.from_tensors("mine", train=(flipped, labels), test=(pixels / 255, labels.tolist()))
    assert torch.equal(data.train.images, torch.tensor(flipped.copy()))
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.test.images.dtype == torch.float32
    pixels.setflags(write=True)
    before = data.train.images.clone()
    pixels[:] = 0
    assert torch.equal(data.train.images, before)


def test_channels_that_come_last_are_named():
    last = (np.zeros((4, 8, 8, 3), dtype=np.uint8), [0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"got shape \(4, 8, 8, 3\); bring the channels forward, axes 0, 3, 1, 2"):
        Dataset.from_tensors("mine", train=last, test=last)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (images(2), "mine train: must be a pair of images and labels, got Tensor"),
        ((images(2),), "mine train: must be a pair"),
        ((images(2), ["cat", "dog"]), "mine train: labels must be a tensor or a NumPy array, got list"),
        ((None, torch.tensor([0, 1])), "mine train: images must be a tensor or a NumPy array, got NoneType"),
    ],
)
def test_splits_of_something_else(train: Any, message: str):
    with pytest.raises(TypeError, match=message):
        Dataset.from_tensors("mine", train=train, test=(images(2), torch.tensor([0, 1])))


@given(counts=st.lists(st.integers(4, 9), min_size=2, max_size=5), num=st.integers(1, 8), seed=st.integers(0, 99))
def test_hold_out_is_balanced_and_leaves_the_rest(counts, num, seed):
    data = dataset(counts)
    held = data.hold_out(num, seed)
    per_class = held.test.labels.bincount(minlength=len(counts))
    assert held.test.num_samples == num
    assert per_class.max() - per_class.min() <= 1
    pixels = torch.cat([held.train.images, held.test.images])[:, 0, 0, 0]
    assert pixels.sort().values.tolist() == list(range(sum(counts)))
    assert torch.equal(held.test.labels, data.hold_out(num, seed).test.labels)


@given(num=st.integers(1, 4), seed=st.integers(0, 99))
def test_per_class(num, seed):
    data = dataset([4, 6, 5]).per_class(num, seed)
    assert data.train.labels.bincount().tolist() == [num] * 3
    assert data.test.num_samples == 2


def test_other_seeds_draw_other_images():
    data = dataset([50, 50])
    assert not torch.equal(data.per_class(5, 0).train.images, data.per_class(5, 1).train.images)


@pytest.mark.parametrize("num", [0, 7, 8])
def test_hold_out_of_too_many(num):
    with pytest.raises(ValueError, match="num must be between 1 and 6"):
        dataset([3, 4]).hold_out(num)


def test_hold_out_leaves_every_class_an_image():
    with pytest.raises(ValueError, match="class 0 has 2 training images, 3 are needed"):
        dataset([2, 9]).hold_out(4)


def test_per_class_of_too_many():
    with pytest.raises(ValueError, match="class 0 has 3 training images, 4 are needed"):
        dataset([3, 4]).per_class(4)
    with pytest.raises(ValueError, match="at least 1"):
        dataset([3, 4]).per_class(0)


def with_pixel(value: float, index: int = 2) -> torch.Tensor:
    pixels = torch.rand(4, 1, 4, 4)
    pixels[index, 0, 1, 1] = value
    return pixels


LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ((with_pixel(math.nan), LABELS), "mine train: image 2 holds NaN or infinity"),
        ((with_pixel(math.inf), LABELS), "mine train: image 2 holds NaN or infinity"),
        ((with_pixel(-2.0), LABELS), "image 2 has pixels from -2 to .*must be in 0..1"),
        ((images(4).int(), LABELS), "must be uint8, or floats"),
        ((images(4)[0], LABELS), "must be square"),
        ((images(4)[..., :3], LABELS), "must be square"),
        ((images(4), LABELS[:3]), "equally many"),
        ((images(0), LABELS[:0]), "at least one"),
        ((images(4), LABELS.float()), "labels must be integers"),
        ((images(4), torch.tensor([0, 1, 7, 1])), "label 2 is 7; labels must be between 0 and 1"),
        ((images(4), torch.tensor([0, -1, 0, 1])), "label 1 is -1"),
        ((images(4), torch.zeros(4, dtype=torch.int64)), "at least two classes"),
        ((images(4, size=6), LABELS), "one shape"),
    ],
)
def test_bad_tensors(train, text):
    with pytest.raises(ValueError, match=text):
        Dataset.from_tensors("mine", train=train, test=(images(4), LABELS), classes=("a", "b"))


def test_one_class_without_names():
    one = (images(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least two classes"):
        Dataset.from_tensors("mine", train=one, test=one)


def test_digits():
    data = load("digits")
    assert (data.train.num_samples, data.test.num_samples) == (1438, 359)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 8)
    assert type(data.normalisation).measure(data.train.images) == data.normalisation
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    share = data.test.labels.bincount() / (data.test.labels.bincount() + data.train.labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert data.test.labels[:8].tolist() == load("digits").test.labels[:8].tolist()


def test_digits_resized():
    data = load("digits", image_size=16)
    assert data.image_size == 16
    assert next(data.test.batches(batch_size=2, normalisation=data.normalisation))[0].shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="image_size"):
        load("digits", image_size=0)


def test_pixels_are_test_images_before_normalisation():
    digits = load("digits")
    images = digits.pixels(5)
    assert images.shape == (5, 1, 8, 8)
    assert torch.equal(
        digits.normalisation.apply(images),
        next(digits.test.batches(batch_size=5, normalisation=digits.normalisation))[0],
    )


def scaled(data: Dataset, factor: float) -> torch.Tensor:
    assert isinstance(data.test, TensorSplit)
    return data.test.images.float() * factor


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: TensorSplit(scaled(d, 1.0), d.test.labels), "float images must be in 0..1"),
        (lambda d: TensorSplit(scaled(d, math.nan), d.test.labels), "image 0 holds NaN or infinity"),
        (lambda d: TensorSplit(d.test.images, d.test.labels[:-1]), "a label for each image, got 359 images and 358"),
        (lambda d: TensorSplit(d.test.images, d.test.labels.float()), "labels must be integers of shape"),
        (lambda d: TensorSplit(d.test.images, d.test.labels + 1), r"digits test: label \d+ is 10; labels must be"),
        (lambda d: TensorSplit(d.test.images.repeat(1, 3, 1, 1), d.test.labels), "must be 1 x 8 x 8, got 3 x 8 x 8"),
        (lambda d: TensorSplit(d.test.images, d.test.labels, 16), "digits test: images must be 1 x 8 x 8"),
    ],
)
def test_replaced_splits_are_checked(make: Any, said: str):
    """Found: dataclasses.replace went round what from_tensors checks."""
    data = load("digits")
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(data, test=make(data))


def test_what_is_no_split_and_no_name():
    with pytest.raises(TypeError, match="digits train must be a Split, got list"):
        dataclasses.replace(load("digits"), train=[])
    with pytest.raises(TypeError, match=r"name must be one of digits, .* or folder:PATH, got None"):
        load(None)  # type: ignore[arg-type]
