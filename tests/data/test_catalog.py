"""Sets by name: where they are looked for, what they hold, and what is said where they are not."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.data import SOURCES, Dataset, Normalisation, catalog, find, load, places, roots

PUBLISHED = {"cifar10": (50_000, 3, 32, 10), "cifar100": (50_000, 3, 32, 100), "fashion-mnist": (60_000, 1, 28, 10)}
# The README beside the shared data states these of N x H x W x C bytes of the test images.
SHA256 = {
    "cifar10": "31fb9e9628079d950e2fe77d314a1eb12d268bdc5f5446b42039c3f809d99d96",
    "cifar100": "94a0aac5b40d9d28779a4ec4e5cd63aab833736aa10c400b2e1d2055271d8761",
}


def load_or_skip(name: str, root: Path) -> Dataset:
    if not next(row for row in find(root) if row.name == name).found:
        pytest.skip(f"no {name} in {root}")
    return load(name, root)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets(name, shared_data):
    data = load_or_skip(name, shared_data)
    num_train, channels, size, num_classes = PUBLISHED[name]
    assert data.train.images.shape == (num_train, channels, size, size)
    assert data.test.images.shape == (10_000, channels, size, size)
    assert (data.channels, data.image_size, data.num_classes) == (channels, size, num_classes)
    for split in (data.train, data.test):
        assert split.labels.bincount().tolist() == [split.num_samples // num_classes] * num_classes
    measured = Normalisation.measure(data.train.images)
    assert measured.mean == pytest.approx(data.normalisation.mean, abs=1e-4)
    assert measured.std == pytest.approx(data.normalisation.std, abs=1e-4)
    if name in SHA256:
        pixels = data.test.images.permute(0, 2, 3, 1).contiguous().numpy()
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == SHA256[name]


def test_flowers17(shared_data):
    data = load_or_skip("flowers17", shared_data)
    assert data.train.images.shape == (680, 3, 128, 128)
    assert data.test.images.shape == (340, 3, 128, 128)
    assert data.num_classes == 17
    assert data.train.labels.bincount().tolist() == [40] * 17
    assert data.test.labels.bincount().tolist() == [20] * 17


def test_the_standard_form_gives_the_same_images(shared_data, tmp_path, monkeypatch):
    data = load_or_skip("cifar10", shared_data)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(5):
        part = slice(10_000 * number, 10_000 * (number + 1))
        write_batch(folder / f"data_batch_{number + 1}", data.train.images[part], data.train.labels[part])
    write_batch(folder / "test_batch", data.test.images, data.test.labels)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.classes)}))
    standard = load("cifar10", tmp_path)
    assert torch.equal(standard.train.images, data.train.images)
    assert torch.equal(standard.test.labels, data.test.labels)
    assert standard.classes == data.classes
    monkeypatch.setenv("FEWBITS_DATA", str(tmp_path))
    assert next(row for row in find() if row.name == "cifar10").where == str(folder)
    write_batch(folder / "test_batch", data.test.images[:9_999], data.test.labels[:9_999])
    with pytest.raises(ValueError, match=r"images must be 10,000, got 9,999; the copy is incomplete"):
        load("cifar10", tmp_path)
    write_batch(folder / "test_batch", data.test.images, data.test.labels.index_fill(0, torch.tensor([77]), 11))
    with pytest.raises(
        ValueError, match=r"cifar-10-batches-py \(test\): label 77 is 11; labels must be between 0 and 9"
    ):
        load("cifar10", tmp_path)


def write_batch(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    batch = {"data": images.numpy().reshape(len(images), -1), "labels": labels.tolist()}
    path.write_bytes(pickle.dumps(batch, protocol=4))


def test_find_needs_no_data(tmp_path):
    rows = find(tmp_path)
    assert [row.name for row in rows] == list(SOURCES)
    assert [row.name for row in rows if row.found] == ["digits"]
    assert all(row.get for row in rows if not row.found)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "flowers17"])
def test_a_missing_set(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} was not found; looked in .*{tmp_path.name}\. (Unpack|Put)"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar", "did you mean cifar10"), ("imagenet-21k", "folder:PATH, got 'imagenet-21k'")]
)
def test_an_unknown_name(name, hint):
    with pytest.raises(ValueError, match=hint):
        load(name)


def test_roots(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWBITS_DATA", raising=False)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = roots()
    assert found[0] == Path.cwd().parent / "shared" / "data"
    assert found[-1] == tmp_path / "cache" / "data"
    monkeypatch.setenv("FEWBITS_DATA", str(tmp_path / "named"))
    assert roots() == (tmp_path / "named",)
    assert roots(tmp_path) == (tmp_path,)
    monkeypatch.delenv("FEWBITS_CACHE")
    assert places.cache_dir() == Path.home() / ".cache" / "fewbits"


class FakeTorchvision:
    """Stands for torchvision where there is no network: its CIFAR10 writes what the real one unpacks, or fails."""

    def __init__(self, works: bool):
        self.datasets = self
        self.works = works

    def CIFAR10(self, root: str, train: bool, download: bool) -> None:
        assert download
        if not self.works:
            raise OSError("no network")
        folder = Path(root) / "cifar-10-batches-py"
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
        labels = [index % 10 for index in range(10_000)]
        batch = pickle.dumps({"data": np.zeros((10_000, 3072), np.uint8), "labels": labels})
        for name in names:
            (folder / name).write_bytes(batch)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))


def test_download(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "import_torchvision", lambda: FakeTorchvision(works=True))
    assert load("cifar10", tmp_path, download=True).train.num_samples == 50_000


def test_a_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "import_torchvision", lambda: FakeTorchvision(works=False))
    with pytest.raises(ValueError, match=r"could not be downloaded to .*no network.*Unpack cifar-10-python"):
        load("cifar10", tmp_path, download=True)
    with pytest.raises(ValueError, match="flowers17 cannot be downloaded"):
        load("flowers17", tmp_path, download=True)


def test_a_download_without_torchvision(tmp_path, monkeypatch):
    def absent():
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(catalog, "import_torchvision", absent)
    with pytest.raises(ValueError, match=r"pip install .*; or else: Unpack"):
        load("cifar10", tmp_path, download=True)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        load("digits")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("file,label\nx.webp,0\n", "must have the columns file, label, class and split"),
        ("file,label,class,split\nx.webp,17,rose,train\n", "x.webp is not a readable image"),
        ("file,label,class,split\n", "training images must be 680, got 0"),
    ],
)
def test_damaged_flowers(tmp_path, table, text):
    (tmp_path / "flowers17").mkdir()
    (tmp_path / "flowers17" / "split.csv").write_text(table)
    with pytest.raises(ValueError, match=text):
        load("flowers17", tmp_path)
