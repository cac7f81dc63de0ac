"""The embedded set: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI Optical Recognition, test part)."""

import torch

from fewbits.data.augment import Augment
from fewbits.data.checks import check_labels
from fewbits.data.dataset import Dataset, pick
from fewbits.data.normalisation import Normalisation
from fewbits.data.split import TensorSplit

NUM_TRAIN, NUM_TEST = 1438, 359
NORMALISATION = Normalisation((0.3050,), (0.3757,))  # of the training images; a test recomputes it


def load_digits() -> Dataset:
    """Every class's images split 80 to 20, always the same way; 0..16 becomes 0..255.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as read  # slow to import: only when the set is asked for
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn; pip install scikit-learn") from error
    bunch = read()
    images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = check_labels(torch.from_numpy(bunch.target), 10, "scikit-learn digits")
    held = pick(labels, [round(count / 5) for count in labels.bincount().tolist()], seed=0)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    return Dataset(
        name="digits",
        train=TensorSplit(images[kept], labels[kept]),
        test=TensorSplit(images[held], labels[held]),
        classes=tuple("0123456789"),
        channels=1,
        image_size=8,
        normalisation=NORMALISATION,
        augment=Augment(pad=1),
    )
