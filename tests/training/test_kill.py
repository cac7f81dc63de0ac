"""``kill -9`` at any moment: the resumed run ends with the bits of one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_worker import same_run, train

import fewbits
from fewbits.training import load_checkpoint

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(fewbits.__file__).parents[1]),
}


def start(**config: Any) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    command = [sys.executable, str(WORKER), json.dumps([{**config, "checkpoint_seconds": 0}])]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen[str], folder: Path, *, step: int = 0, held: bool = False) -> None:
    """Wait for the checkpoint of ``step``, or for a write that is held in its middle, and kill the process."""
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, f"the run ended before it could be killed: {process.communicate()[1]}"
            if held and (folder / "checkpoint/held").exists():
                return
            checkpoint = None if held else load_checkpoint(folder / "checkpoint")
            if checkpoint and checkpoint.values["position"]["total_step"] >= step:
                return
            time.sleep(0.005)
        raise AssertionError("the run did not get there in time")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


EPOCHS = 15  # 90 steps, so that the process is still at work when the test has seen a checkpoint


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        pytest.param({"recipe": "plain", "ema": 0.9, "shape": {"dropout": 0.3}}, (5, 30), id="sgd-ema-dropout"),
        pytest.param({"recipe": "plain", "optimizer": "adamw", "lr": 0.01, "accumulate": 2}, (20,), id="adamw"),
        pytest.param({"recipe": "qfd", "ema": 0.9}, (3, 35), id="qfd-both-phases"),
    ],
)
def test_killed_runs_end_with_the_same_bits(config: dict[str, Any], steps: tuple[int, ...], tmp_path: Path):
    train(output=tmp_path / "whole", **{"epochs": EPOCHS, **config})
    for step in steps:
        kill_at(
            start(output=str(tmp_path / "killed"), resume=True, epochs=EPOCHS, **config), tmp_path / "killed", step=step
        )
        assert not (tmp_path / "killed/student.safetensors").exists()
    train(output=tmp_path / "killed", resume=True, **{"epochs": EPOCHS, **config})
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("write", [1, 7])
def test_killed_while_a_checkpoint_is_written(write: int, tmp_path: Path):
    """The first one of all, and one that would replace another."""
    folder = tmp_path / "killed"
    kill_at(start(recipe="qfd", output=str(folder), hold_write=write), folder, held=True)
    assert list(folder.rglob("*.part"))  # half of it
    (folder / "checkpoint/held").unlink()
    checkpoint = load_checkpoint(folder / "checkpoint")
    if write == 1:
        assert checkpoint is None
    else:
        assert checkpoint is not None
        assert checkpoint.values["position"]["total_step"] == write - 1
    train("qfd", output=folder, resume=True)
    train("qfd", output=tmp_path / "whole")
    same_run(tmp_path / "whole", folder)
    assert not list(folder.rglob("*.part"))
