"""Image folders: how they are laid out, read by worker processes, and what is said of bad ones."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.data import Augment, FolderSplit, Normalisation, load

IDENTITY = Normalisation.identity(3)
SIZE = 16


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, classes: tuple[str, ...] = ("cat", "dog"), num: int = 10) -> None:
    for label, name in enumerate(classes):
        for index in range(num):
            write_image(root / name / f"{index}.png", seed=100 * label + index, size=(30 + index, 40))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_classes(tmp_path / "set" / "train")
    write_classes(tmp_path / "set" / "test", num=3)
    return tmp_path / "set"


def read(split: FolderSplit, num_workers: int = 0, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    split = FolderSplit(split.paths, split.labels, split.image_size, num_workers)
    batches = list(split.batches(**{"batch_size": 8, "normalisation": IDENTITY, **options}))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_train_and_test(folder):
    data = load(f"folder:{folder}", image_size=SIZE)
    assert (data.classes, data.channels, data.image_size) == (("cat", "dog"), 3, SIZE)
    assert (data.train.num_samples, data.test.num_samples) == (20, 6)
    images, labels = read(data.test)
    assert images.shape == (6, 3, SIZE, SIZE)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.min() >= 0
    assert images.max() <= 1
    assert load(str(folder), image_size=SIZE).train.num_samples == 20


def test_the_evaluation_view(folder):
    data = load(f"folder:{folder}", image_size=SIZE)
    with Image.open(folder / "test" / "cat" / "0.png") as image:
        wide = image.resize((18, 24), Image.Resampling.BILINEAR)  # 30 x 40, shorter side to 16 * 256 / 224 = 18
    expected = np.asarray(wide)[4:20, 1:17].transpose(2, 0, 1)
    assert torch.equal(read(data.test)[0][0], torch.from_numpy(expected.copy()).float() / 255)


@pytest.mark.parametrize("augment", [None, Augment(flip=True, min_area=0.25), Augment(pad=3, flip=True)])
def test_workers_ranks_and_resuming_change_nothing(folder, augment):
    split = load(f"folder:{folder}", image_size=SIZE).train
    options = {"augment": augment, "shuffle": True, "seed": 5, "epoch": 6}
    images, labels = read(split, **options)
    state = torch.get_rng_state()
    in_workers = read(split, num_workers=2, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(in_workers[0], images)
    assert torch.equal(in_workers[1], labels)
    assert torch.equal(read(split, start_batch=1, **options)[0], images[8:])
    first = [next(split.batches(batch_size=8, normalisation=IDENTITY, rank=r, num_ranks=2, **options)) for r in (0, 1)]
    assert torch.equal(torch.cat([part for part, _ in first]), images[:8])
    if augment is not None:
        assert not torch.equal(read(split, **{**options, "epoch": 7, "shuffle": False})[0], read(split, epoch=6)[0])


def test_more_ranks_than_samples(folder):
    split = load(f"folder:{folder}", image_size=SIZE).test
    shares = [read(split, batch_size=5, rank=rank, num_ranks=4)[0] for rank in range(4)]
    assert [len(share) for share in shares] == [3, 1, 1, 1]
    assert shares[3].shape[1:] == (3, SIZE, SIZE)


def test_subset(folder):
    split = load(f"folder:{folder}", image_size=SIZE).train.subset(torch.tensor([15, 2]))
    assert split.labels.tolist() == [1, 0]
    assert [path.parent.name for path in split.paths] == ["dog", "cat"]


def test_held_out_part(folder):
    data = load(f"folder:{folder}", image_size=SIZE).hold_out(4)
    assert (data.train.num_samples, data.test.num_samples) == (16, 4)
    assert not set(data.train.paths) & set(data.test.paths)


def test_class_folders_alone_are_split(tmp_path, caplog):
    write_classes(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = load(f"folder:{tmp_path}")
    assert "4 of its images are held out" in caplog.text
    assert data.image_size == 224
    assert (data.train.labels.bincount().tolist(), data.test.labels.bincount().tolist()) == ([8, 8], [2, 2])
    assert not set(data.train.paths) & set(data.test.paths)
    assert load(f"folder:{tmp_path}").test.paths == data.test.paths


def test_capitals_hidden_files_and_other_files(tmp_path, caplog):
    write_classes(tmp_path / "Train")
    write_classes(tmp_path / "VAL", num=2)
    write_image(tmp_path / "Train" / "cat" / "X.PNG", seed=1)
    write_image(tmp_path / "Train" / "cat" / "deeper" / "y.JPeG", seed=1)
    (tmp_path / "Train" / "cat" / ".DS_Store").write_text("")
    (tmp_path / "Train" / "cat" / "notes.txt").write_text("")
    (tmp_path / "Train" / ".hidden").mkdir()
    data = load(f"folder:{tmp_path}", image_size=SIZE)
    assert (data.train.num_samples, data.test.num_samples) == (22, 4)
    assert "1 files that are not images are left out" in caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    for name in ("a", "b"):
        for index in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            options = {"transparency": bytes([0, 255])} if mode == "P" else {}
            Image.new(mode, (20, 20), 1 if mode in "P1L" else None).save(
                tmp_path / name / f"{index}.{suffix}", **options
            )
    assert read(load(f"folder:{tmp_path}", image_size=SIZE).train)[0].shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named(folder, num_workers):
    bad = folder / "train" / "dog" / "4.png"
    bad.write_bytes(bad.read_bytes()[:200])
    split = load(f"folder:{folder}", image_size=SIZE).train
    with pytest.raises(ValueError, match=r"^\S+4\.png is not a readable image \(.*\); repair it or take it away$"):
        read(split, num_workers)
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"4\.png is not a readable image"):
        read(split, num_workers)


def test_bad_folders(tmp_path):
    def fails(text: str, path: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=text):
            load(f"folder:{path}")

    fails("is not a folder", tmp_path / "nowhere")
    fails("is empty")
    (tmp_path / "cat").mkdir()
    fails("cat holds no image")
    write_classes(tmp_path, ("cat",))
    fails("has the one class 'cat'")
    write_classes(tmp_path, ("dog",), num=1)
    fails("class 1 has 1 training images, 2 are needed")


def test_bad_divisions(tmp_path):
    def fails(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            load(f"folder:{tmp_path}")

    write_classes(tmp_path / "train", num=2)
    fails(r"has train but no test \(or val\); add it, or give folder:.*train")
    write_classes(tmp_path / "test", ("cat", "bird"), num=2)
    fails(r"only in the first: \['dog'\], only in the second: \['bird'\]")
    (tmp_path / "test" / "bird").rename(tmp_path / "test" / "Dog")
    fails("differ in capitals only")
    (tmp_path / "test" / "Dog").rename(tmp_path / "test" / "dog")
    load(f"folder:{tmp_path}")
    (tmp_path / "Test").mkdir()
    fails("has Test and test; keep one of them")


def test_bad_size(folder):
    with pytest.raises(ValueError, match="image_size"):
        load(f"folder:{folder}", image_size=0)
