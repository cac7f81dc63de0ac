"""Checkpoints: whole or not there, read without running anything, and clear about what is wrong with them."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from training_worker import network, same_run, train

from fewbits.training import checkpoint as checkpoint_module
from fewbits.training import load_checkpoint, save_checkpoint
from fewbits.training.checkpoint import (
    FILE,
    Checkpoint,
    load_networks,
    load_optimizer_state,
    optimizer_state,
    read_tensors,
    save_tensors,
    write_file,
)

POSITION = {"phase": 0, "step": 3, "total_step": 3}


def some_checkpoint() -> Checkpoint:
    checkpoint = Checkpoint(values={"position": POSITION, "optimizer": {"0.flag": None, "1.rate": 0.5}})
    checkpoint.add("networks", {"a.b/c": torch.randn(3, 2), "on": torch.tensor(True), "n": torch.tensor(7)})
    checkpoint.add("empty", {})
    return checkpoint


def test_what_is_saved_comes_back(tmp_path: Path):
    saved = some_checkpoint()
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.values == saved.values
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    assert set(loaded.part("networks")) == {"a.b/c", "on", "n"}
    assert loaded.part("empty") == {}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_no_checkpoint_is_none(tmp_path: Path):
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_parts_do_not_mix():
    checkpoint = Checkpoint()
    checkpoint.add("ema", {"w": torch.zeros(1)})
    checkpoint.add("ema2", {"w": torch.ones(1)})
    assert checkpoint.part("ema")["w"] == 0
    assert checkpoint.part("ema2")["w"] == 1


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path):
    target = tmp_path / "ran"
    for content in (pickle.dumps(Bomb(target)), pickle.dumps({"state_dict": Bomb(target)}, protocol=0)):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=r"state.safetensors is damaged or no safetensors file .* start afresh"):
            load_checkpoint(tmp_path)
    torch.save({"state_dict": Bomb(target)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path)
    assert not target.exists()


@given(st.data())
def test_a_truncated_checkpoint_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, some_checkpoint())
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"state.safetensors is damaged"):
        load_checkpoint(folder)


@given(st.binary(max_size=64))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"state.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "is not a fewbits checkpoint"),
        ("{not json", "is damaged"),
        ("[1]", "is damaged"),
        ("3", "is damaged"),
        (json.dumps({"position": POSITION, "optimizer": {}}), "another checkpoint format than 1"),
        (json.dumps({"format": 2, "position": POSITION, "optimizer": {}}), "another checkpoint format than 1"),
    ],
)
def test_headers_that_are_not_ours(header: str | None, message: str, tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / FILE, metadata={"fewbits": header} if header else None)
    with pytest.raises(ValueError, match=rf"state\.safetensors .*{message}|state\.safetensors {message}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"position": POSITION},
        {"position": {**POSITION, "surprise": 1}, "optimizer": {}},
        {"position": {**POSITION, "phase": 7}, "optimizer": {}},
        {"position": {**POSITION, "phase": -1}, "optimizer": {}},
        {"position": {**POSITION, "total_step": "3"}, "optimizer": {}},
        {"position": POSITION, "optimizer": [1]},
        {"position": POSITION, "optimizer": {"x.momentum_buffer": None}},
        {"position": POSITION, "optimizer": {"99.momentum_buffer": None}},
        {"position": 5, "optimizer": {}},
    ],
)
def test_a_run_does_not_start_from_a_checkpoint_that_makes_no_sense(values: dict[str, Any], tmp_path: Path):
    train("plain", tmp_path, epochs=1)
    (tmp_path / "student.safetensors").unlink()
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint is not None
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(checkpoint.tensors, values))
    with pytest.raises(ValueError, match=r"checkpoint"):
        train("plain", tmp_path, epochs=1, resume=True)


def test_a_checkpoint_of_other_networks_names_keys_and_shapes(tmp_path: Path):
    train("plain", tmp_path, epochs=1)
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)other networks: .*size mismatch for student.conv1.weight.*\[6, 1, 3, 3\]"
    ):
        train("plain", tmp_path, epochs=1, resume=True, shape={"width": 7})


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_write_that_fails_leaves_the_previous_file(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_file(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(OSError, match=r"could not save file \(No space left on device\); the previous one is") as e:
            write_file(tmp_path / "file", b"new")
    assert e.value.errno == errno.ENOSPC
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_on_a_full_disk_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train("qfd", tmp_path / "whole", checkpoint_seconds=0)
    original, seen = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            no_space()
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"could not save state.safetensors .*make room, then --resume"):
            train("qfd", tmp_path / "full", checkpoint_seconds=0)
    assert not list((tmp_path / "full").rglob("*.part"))
    assert load_checkpoint(tmp_path / "full" / "checkpoint") is not None
    train("qfd", tmp_path / "full", checkpoint_seconds=0, resume=True)
    same_run(tmp_path / "whole", tmp_path / "full")


def test_a_file_that_may_not_grow(tmp_path: Path):
    """The kernel itself refuses: a limit on the size of files, as on a full disk, in the middle of a write."""
    save_checkpoint(tmp_path, some_checkpoint())
    before = (tmp_path / FILE).read_bytes()
    code = (
        "import sys, torch; from pathlib import Path; from fewbits.training import save_checkpoint\n"
        "from fewbits.training.checkpoint import Checkpoint\n"
        "save_checkpoint(Path(sys.argv[1]), Checkpoint({'x': torch.zeros(100_000)}))\n"
    )
    command = ["bash", "-c", 'ulimit -f 64; exec "$0" "$@"', sys.executable, "-c", code, str(tmp_path)]
    source = str(Path(checkpoint_module.__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}, timeout=120
    )
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "could not save state.safetensors (File too large); the previous one is untouched" in done.stderr
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_tied_weights_and_views_are_written_whole(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = {**model.state_dict(), "view": torch.arange(12.0).view(3, 4).t()[1:]}
    save_tensors(tmp_path / "tied.safetensors", state)
    loaded = load_file(tmp_path / "tied.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    del loaded["view"]
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other[1].weight = other[0].weight
    load_networks(other, loaded)
    assert other[1].weight is other[0].weight
    assert torch.equal(other[0].weight, model[0].weight)


def test_equal_tensors_give_equal_bytes_in_any_memory_format(tmp_path: Path):
    x = torch.randn(2, 3, 4, 4)
    save_tensors(tmp_path / "one", {"x": x, "y": x[0]})
    save_tensors(tmp_path / "two", {"y": x[0], "x": x.contiguous(memory_format=torch.channels_last)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_with_the_same_bits(kind: str):
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network(norm=False)
        model.conv2.bias.requires_grad_(False)
        parameters = list(model.parameters())
        if kind == "adamw":
            return model, torch.optim.AdamW(parameters, lr=0.01)
        return model, torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, range(6))
    half, optimizer = make()
    steps(half, optimizer, range(3))
    tensors, values = optimizer_state(optimizer)
    values = json.loads(json.dumps(values))
    other, fresh = make()
    other.load_state_dict(half.state_dict())
    load_optimizer_state(fresh, {name: t.clone() for name, t in tensors.items()}, values)
    steps(other, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_a_file_that_is_replaced_meanwhile_is_read_as_one(tmp_path: Path):
    """Found: the header of one checkpoint went with the tensors of the next, which was smaller."""
    for size, name in ((4, "small"), (4000, "large")):
        save_tensors(tmp_path / name, {"x": torch.full((size,), float(size))}, {"size": str(size)})
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for name in ("small", "large"):
                shutil.copy(tmp_path / name, tmp_path / "new")
                os.replace(tmp_path / "new", tmp_path / "file")

    shutil.copy(tmp_path / "small", tmp_path / "file")
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(1000):
            tensors, metadata = read_tensors(tmp_path / "file")
            assert tensors["x"].tolist() == [float(metadata["size"])] * int(metadata["size"])
    finally:
        stop.set()
        thread.join()
