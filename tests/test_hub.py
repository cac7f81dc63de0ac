"""The Hub, played by a folder: what goes up comes down, and only then is huggingface_hub needed."""

import inspect
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits as fb

huggingface_hub = pytest.importorskip("huggingface_hub")
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)

        def file_exists(self, repo_id, name):
            return (tmp_path / repo_id / name).exists()

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
            (tmp_path / repo_id / path_in_repo).write_bytes(content)
            return f"hub/{repo_id}/commit"

    def download(repo_id, name, *, revision, token):
        shutil.copy(tmp_path / repo_id / name, tmp_path / "cached.safetensors")
        return str(tmp_path / "cached.safetensors")

    # The real ones take what the played ones take.
    real = huggingface_hub.HfApi
    for name in ("create_repo", "file_exists", "upload_file"):
        taken = inspect.signature(getattr(Api, name)).parameters.keys()
        assert taken - {"name"} <= inspect.signature(getattr(real, name)).parameters.keys()
    assert {"repo_id", "filename", "revision", "token"} <= inspect.signature(
        huggingface_hub.hf_hub_download
    ).parameters.keys()
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))


def student():
    quantized = fb.quantize(network(), weights=2, activations=2)
    fb.calibrate(quantized, [IMAGES])
    return quantized.eval()


def test_what_goes_up_comes_down(hub):
    own = student()
    assert fb.hub.push(own, "me/small", example=IMAGES) == "hub/me/small/commit"
    loaded = fb.hub.load("me/small", network())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), own(IMAGES))
    assert 'fb.hub.load("me/small", model=...)' in (hub / "me/small/README.md").read_text()


def test_a_card_that_is_there_stays(hub):
    (hub / "me/small").mkdir(parents=True)
    (hub / "me/small/README.md").write_text("mine")
    fb.hub.push(student(), "me/small")
    assert (hub / "me/small/README.md").read_text() == "mine"


def test_a_damaged_download_is_refused(hub):
    fb.hub.push(student(), "me/small")
    path = hub / "me/small/student-packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        fb.hub.load("me/small", network())


def test_without_huggingface_hub_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for wanted in (lambda: fb.hub.push(student(), "me/small"), lambda: fb.hub.load("me/small")):
        with pytest.raises(ImportError, match="pip install"):
            wanted()
