"""Two gloo processes, started by torchrun, give what one process gives with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_worker import timeless, train

import fewbits
from fewbits.training import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fewbits.__file__).parents[1])}

EQUAL: dict[str, tuple[dict[str, Any], float]] = {
    "float": ({"recipe": "float", "epochs": 2, "clip_grad": 1.0}, 1e-6),
    "float-accumulate": ({"recipe": "float", "epochs": 1, "accumulate": 2, "ema": 0.9, "device": "auto"}, 1e-6),
    # Where codes are rounded, the last bit of a sum tips a code over after a few steps; before that the sums agree.
    "plain": ({"recipe": "plain", "epochs": 2 / 6}, 1e-6),
    "plain-accumulate": ({"recipe": "plain", "epochs": 2 / 6, "accumulate": 2}, 1e-6),
    "qfd": ({"recipe": "qfd", "epochs": 3 / 6}, 1e-5),
    "float-shard": ({"recipe": "float", "epochs": 2, "clip_grad": 1.0, "shard": True}, 1e-6),
    "plain-shard": ({"recipe": "plain", "epochs": 2 / 6, "shard": True, "accumulate": 2}, 1e-6),
    "l2-sp-shard": ({"recipe": "l2-sp", "epochs": 1, "shard": True, "weight_decay": 0.01}, 1e-6),
    "resumed-shard": ({"recipe": "float", "epochs": 1, "shard": True, "lr": 0.02}, 1e-6),
    "qfd-shard": ({"recipe": "qfd", "epochs": 3 / 6, "shard": True, "optimizer": "adamw", "lr": 0.001}, 1e-5),
}
"""Runs without batch norm, with augmentation: settings, and how far the students may be apart."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "processes": (
        {"processes": 3},
        "ValueError: processes=3 were asked for, but 2 take part; start with 'torchrun --nproc-per-node 3",
    ),
    "batch_size": (
        {"batch_size": 15},
        "ValueError: batch_size must be a multiple of processes x accumulate, got 15, 2 and 1",
    ),
    "accumulate": (
        {"batch_size": 18, "accumulate": 6},
        "ValueError: batch_size must be a multiple of processes x accumulate, got 18, 2 and 6",
    ),
}


def in_two_processes(*configs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The runs of ``configs``, one after the other: what each of the two processes says of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run([*command, json.dumps(configs)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return list(zip(*([entry for entry in said if entry["rank"] == rank] for rank in (0, 1)), strict=True))


def equal(name: str) -> dict[str, Any]:
    resume = {"resume": True} if name.startswith("resumed") else {}
    return {**EQUAL[name][0], "shape": {"norm": False}, "checkpoint_seconds": 0, **resume}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Everything that two processes run here, in one start of torchrun: the folder, and what they said by name."""
    root = tmp_path_factory.mktemp("distributed")
    train("plain", root / "there", epochs=1)
    configs: dict[str, dict[str, Any]] = {
        **{name: {"recipe": "plain", "output": str(root / name), **REFUSED[name][0]} for name in REFUSED},
        "stopped": {"output": str(root / "resumed-shard"), "stop_after": 3, "processes": 2, **equal("resumed-shard")},
        **{name: {"output": str(root / name), "processes": 2, **equal(name)} for name in EQUAL},
        "there": {"recipe": "plain", "output": str(root / "there"), "epochs": 1},
    }
    return root, dict(zip(configs, in_two_processes(*configs.values()), strict=True))


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(name: str, runs: Any, tmp_path: Path):
    root, said = runs
    train(output=tmp_path, **equal(name))
    for file in tmp_path.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(root / name / file.name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert float((tensor.float() - theirs[key].float()).abs().max()) < EQUAL[name][1], key
    # Written once, by the first process; and means over all processes.
    one, two = read_metrics(tmp_path), read_metrics(root / name)
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for ours, theirs in zip(one, two, strict=True):
        for key in timeless(ours):
            expected = pytest.approx(ours[key], abs=1e-4) if isinstance(ours[key], float) else ours[key]
            assert theirs[key] == expected, key
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (root / name).iterdir())
    assert [entry["accuracy"] for entry in said[name]] == [two[-1]["accuracy"]] * 2
    for entry in said[name]:
        is_shared = EQUAL[name][0].get("shard", False)
        assert entry["shares"] == (pytest.approx([0.5] * len(entry["shares"]), abs=0.1) if is_shared else [])
        assert bool(entry["shares"]) == is_shared


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_do_not_fit(name: str, runs: Any):
    root, said = runs
    for entry in said[name]:
        assert entry["error"].startswith(REFUSED[name][1])
    assert not (root / name).exists()


def test_all_processes_stopped_and_went_on(runs: Any):
    assert [entry.get("stopped") for entry in runs[1]["stopped"]] == [True, True]


def test_every_process_refuses_a_run_that_is_there(runs: Any):
    for entry in runs[1]["there"]:
        assert "already holds a run; pass --resume" in entry["error"]


def test_one_process_is_fewer_than_two():
    with pytest.raises(ValueError, match="processes=2 were asked for, but 1 take part; start with 'torchrun"):
        train("plain", processes=2)


def test_two_processes_resume_what_two_began(tmp_path: Path):
    """With batch norm, and a test split whose last batch leaves nothing for the second process."""
    config = {"recipe": "plain", "output": str(tmp_path), "epochs": 2, "num_test": 1, "resume": True}
    config |= {"shape": {"dropout": 0.1}}
    # Both runs are over at the same moment, so that the second process, too, finds the student there.
    first, finished = in_two_processes({**config, "slow_save": True}, config)
    assert first == finished
    assert "error" not in first[0]
    assert first[0]["accuracy"] == first[1]["accuracy"]
    student, metrics = (tmp_path / "student.safetensors").read_bytes(), read_metrics(tmp_path)
    (tmp_path / "student.safetensors").unlink()  # as if killed just before the end
    assert in_two_processes(config) == [first]
    assert (tmp_path / "student.safetensors").read_bytes() == student
    assert [timeless(record) for record in read_metrics(tmp_path)] == [timeless(record) for record in metrics]
