"""CIFAR and Fashion-MNIST files in every form, whole and damaged."""

import gzip
import lzma
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewbits.data import cifar, fashion_mnist
from fewbits.data.cifar import CIFAR10_FORMS, CIFAR100_FORMS, load_plain_pickle, read_names
from fewbits.data.places import cached_array

SHEETS, PICKLES, BINARY = CIFAR10_FORMS
_, PICKLES_100, BINARY_100 = CIFAR100_FORMS
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(num: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (num, 3, 32, 32), dtype=np.uint8)


def write_sheets(folder: Path, images: np.ndarray, labels: np.ndarray, split: str = "train") -> None:
    (folder / split).mkdir(parents=True)
    for number in range(len(images) // 100):
        sheet = np.zeros((320, 320, 3), np.uint8)
        for i in range(100):
            y, x = 32 * (i // 10), 32 * (i % 10)
            sheet[y : y + 32, x : x + 32] = images[100 * number + i].transpose(1, 2, 0)
        Image.fromarray(sheet).save(folder / split / f"{number:03}.webp", lossless=True)
    np.save(folder / f"{split}_labels.npy", labels)


def test_sheets_and_their_cache(tmp_path, own_cache, monkeypatch):
    images, labels = pixels(200), RANDOM.integers(0, 10, 200).astype(np.uint8)
    write_sheets(tmp_path / "cifar10", images, labels)
    read = cifar.read_sheets(SHEETS, tmp_path / "cifar10", "train")
    assert np.array_equal(read[0], images)
    assert np.array_equal(read[1], labels)
    assert [file.suffix for file in (own_cache / "decoded").iterdir()] == [".npy"]

    def no_decoding(files):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(cifar, "_decode_sheets", no_decoding)
        assert np.array_equal(cifar.read_sheets(SHEETS, tmp_path / "cifar10", "train")[0], images)
    (tmp_path / "cifar10" / "train" / "001.webp").write_bytes(
        (tmp_path / "cifar10" / "train" / "000.webp").read_bytes()
    )
    changed = cifar.read_sheets(SHEETS, tmp_path / "cifar10", "train")[0]
    assert np.array_equal(changed[100:], images[:100])


def test_a_damaged_sheet_is_named(tmp_path):
    write_sheets(tmp_path, pixels(100), np.zeros(100, np.uint8))
    sheet = tmp_path / "train" / "000.webp"
    sheet.write_bytes(sheet.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"000\.webp cannot be decoded"):
        cifar.read_sheets(SHEETS, tmp_path, "train")
    Image.new("RGB", (64, 32)).save(sheet, "WEBP")
    with pytest.raises(ValueError, match="must be 320 x 320 pixels, got 64 x 32"):
        cifar.read_sheets(SHEETS, tmp_path, "train")


def test_damaged_labels_are_named(tmp_path):
    write_sheets(tmp_path, pixels(100), np.zeros(100, np.uint8))
    (tmp_path / "train_labels.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"train_labels\.npy is not a readable"):
        cifar.read_sheets(SHEETS, tmp_path, "train")


def test_a_cut_cache_is_decoded_again(tmp_path, own_cache):
    array, source = np.arange(1000, dtype=np.uint8), tmp_path / "source"
    source.write_bytes(b"bytes")
    cached_array("x", [source], lambda: array)
    (file,) = (own_cache / "decoded").iterdir()
    file.write_bytes(file.read_bytes()[:500])
    assert np.array_equal(cached_array("x", [source], lambda: array), array)
    assert np.array_equal(np.load(file), array)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "file"))
    array = np.arange(3, dtype=np.uint8)
    assert cached_array("x", [tmp_path / "file"], lambda: array) is array


def test_a_full_disk_leaves_no_half_file(tmp_path, own_cache, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "source").write_bytes(b"")
    monkeypatch.setattr(np, "save", full)
    cached_array("x", [tmp_path / "source"], lambda: np.zeros(3, np.uint8))
    assert list((own_cache / "decoded").iterdir()) == []


def python2_pickle(value: object) -> bytes:
    """A pickle as the published files have it: protocol 0 or 2, with integers for a dtype's flags."""
    return (
        pickle.dumps(value, protocol=0).replace(b"I00\nI01\ntp", b"I0\nI1\ntp").replace(b"numpy._core", b"numpy.core")
    )


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("key_type", [str, bytes])
def test_pickles(tmp_path, protocol, key_type):
    images, labels = pixels(50), list(RANDOM.integers(0, 10, 50).tolist())
    key = str if key_type is str else str.encode
    for number in range(5):
        part = slice(10 * number, 10 * number + 10)
        batch = {key("data"): images[part].reshape(10, -1), key("labels"): labels[part], key("batch_label"): key("x")}
        data = python2_pickle(batch) if protocol == 0 else pickle.dumps(batch, protocol=protocol)
        (tmp_path / f"data_batch_{number + 1}").write_bytes(data)
    read = cifar.read_pickles(PICKLES, tmp_path, "train")
    assert np.array_equal(read[0], images)
    assert read[1].tolist() == labels


def test_binary(tmp_path):
    images, labels = pixels(20), RANDOM.integers(0, 10, (20, 1)).astype(np.uint8)
    (tmp_path / "test_batch.bin").write_bytes(np.hstack([labels, images.reshape(20, -1)]).tobytes())
    read = cifar.read_binary(BINARY, tmp_path, "test")
    assert np.array_equal(read[0], images)
    assert np.array_equal(read[1], labels[:, 0])
    fine = np.hstack([labels // 2, labels, images.reshape(20, -1)])
    (tmp_path / "test.bin").write_bytes(fine.tobytes())
    assert np.array_equal(cifar.read_binary(BINARY_100, tmp_path, "test")[1], labels[:, 0])
    (tmp_path / "test.bin").write_bytes(fine.tobytes()[:-1])
    with pytest.raises(ValueError, match=r"test\.bin must hold records of 3074 bytes"):
        cifar.read_binary(BINARY_100, tmp_path, "test")


def test_class_names(tmp_path):
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", "dog"]}))
    assert read_names(PICKLES, tmp_path) == ("cat", "dog")
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n\n")
    assert read_names(BINARY, tmp_path) == ("cat", "dog")
    with pytest.raises(ValueError, match="meta is missing"):
        read_names(PICKLES_100, tmp_path)


class Malicious:
    def __init__(self, call: tuple):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("call", [(os.mkdir, ("pwned",)), (eval, ("1",)), (getattr, ("x", "upper")), (np.load, ("x",))])
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, call, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"data": Malicious(call)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"test_batch is not a readable CIFAR file .*it asks for .* no use for"):
        cifar.read_pickles(PICKLES, tmp_path, "test")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"data": np.zeros((2, 3072), np.uint8)}, "no entry 'labels'"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "'data' must be uint8"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]}, "list of integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 300]}, "label 1 is 300"),
        ([1, 2], "no entry 'data'"),
    ],
)
def test_other_pickles(tmp_path, batch, text):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match=text):
        cifar.read_pickles(PICKLES, tmp_path, "test")


def test_a_cut_pickle(tmp_path):
    whole = pickle.dumps({"data": pixels(2).reshape(2, -1), "labels": [0, 1]}, protocol=2)
    (tmp_path / "x").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="fetch it again"):
        load_plain_pickle(tmp_path / "x")


def test_a_missing_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match="data_batch_1 is missing"):
        cifar.read_pickles(PICKLES, tmp_path, "train")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_idx_files(tmp_path, suffix, pack):
    images, labels = RANDOM.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8)
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    with pytest.raises(ValueError, match="lacks the labels of the test split"):
        fashion_mnist.read_split(tmp_path, "test")
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    read = fashion_mnist.read_split(tmp_path, "test")
    assert np.array_equal(read[0][:, 0], images)
    assert np.array_equal(read[1], labels)


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a", idx(np.zeros((2, 2, 2), np.uint8))[:-1], r"must hold \(2, 2, 2\) values, got 7"),
        ("a", b"", "not an idx file"),
        ("a", idx(np.zeros((2, 2), np.uint8)), "not an idx file"),
        ("a", bytes((0, 0, 8, 3)) + b"\xff" * 12, "must hold"),
        ("a.gz", b"no archive", "cannot be unpacked"),
        ("a.gz", gzip.compress(idx(np.zeros((9, 9, 9), np.uint8)))[:-9], "cannot be unpacked"),
        ("a.xz", lzma.compress(idx(np.zeros((9, 9, 9), np.uint8)))[:-9], "cannot be unpacked"),
    ],
)
def test_damaged_idx_files(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=text):
        fashion_mnist.read_idx(tmp_path / name, num_dims=3)
