"""What a run says of its own speed, and the profile that it leaves on request."""

import gzip
import json
import time
from pathlib import Path

import pytest
from training_worker import train

from fewbits.training import read_metrics
from fewbits.training.pace import Pace


def test_waiting_is_told_from_working():
    def slow():
        while True:
            time.sleep(0.02)
            yield None

    pace, batches = Pace(batch_size=8), slow()
    for _ in range(3):
        pace.take(batches)
        time.sleep(0.02)
        pace.step()
        time.sleep(0.1)  # an evaluation
        pace.resume()
    found = pace.report()
    assert 0.3 < found["pace/waiting"] < 0.7
    assert 50 < found["pace/images_per_second"] < 200  # 8 in 40 ms; with the evaluations 57 at most
    assert found["pace/peak_memory"] > 50e6
    assert pace.report()["pace/images_per_second"] == 0  # means since the last report


def test_a_run_reports_its_pace(tmp_path: Path):
    train(output=tmp_path, epochs=1)
    shown = [record for record in read_metrics(tmp_path) if record["event"] == "train"]
    assert all(0 <= record["pace/waiting"] < 1 and record["pace/images_per_second"] > 0 for record in shown)


def test_a_profile_is_left_on_request(tmp_path: Path):
    train(output=tmp_path / "plain", epochs=1)
    train(output=tmp_path / "profiled", epochs=1, profile=True)
    assert not (tmp_path / "plain" / "profile.txt").exists()
    assert "convolution" in (tmp_path / "profiled" / "profile.txt").read_text()
    with gzip.open(tmp_path / "profiled" / "profile.json.gz") as file:
        assert json.load(file)["traceEvents"]
    for name in ("student.safetensors",):  # looking on changes nothing
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "profiled" / name).read_bytes()
    with pytest.raises(ValueError, match="pass output"):
        train(profile=True)
