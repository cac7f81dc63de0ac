"""The README's Python runs as it stands; only the size of the job is cut down."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewbits as fb

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_of_the_readme_runs(number, shared_data, tmp_path, monkeypatch):
    whole_load, whole_fit = fb.data.load, fb.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWBITS_DATA", str(shared_data))
    monkeypatch.setattr(fb.data, "load", lambda name: smaller(whole_load(name)))
    monkeypatch.setattr(
        fb, "fit", lambda *args, **rest: whole_fit(*args, **{**rest, "epochs": 1, "batch_size": 32, "compile": False})
    )
    scope: dict[str, object] = {}
    for block in BLOCKS[: number + 1]:
        exec(compile(block, f"README block {number}", "exec"), scope)
    assert (tmp_path / "student.onnx").exists()


def smaller(data):
    """A few hundred images."""
    return replace(data.per_class(16), test=data.test.subset(torch.arange(300)))


def test_there_is_python_in_the_readme():
    assert len(BLOCKS) >= 2
