"""The Hub, played by a folder: what goes up comes down, and only then is huggingface_hub needed."""

import inspect
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fewbits as fb
import fewbits.deploy.packed as packed

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


@pytest.fixture
def mixin_hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """What the mixin itself calls: one commit up; config and file down."""
    from huggingface_hub import hub_mixin

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, *, repo_id, private, exist_ok):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **rest):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}/commit"

    def download(repo_id, filename, **where):
        assert where["revision"] == "main"
        path = tmp_path / repo_id / filename
        if not path.exists():
            answer = SimpleNamespace(headers={}, request=None)
            raise huggingface_hub.errors.HfHubHTTPError(f"no {filename}", response=answer)
        return str(path)

    for name in ("create_repo", "upload_folder"):
        taken = inspect.signature(getattr(Api, name)).parameters.keys() - {"rest"}
        assert taken <= inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters.keys()
    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    # The class imports what it downloads with when it is made.
    fb.hub._packed_model.cache_clear()
    yield tmp_path
    fb.hub._packed_model.cache_clear()


def test_the_usual_mixin_in_a_folder(tmp_path):
    own = student()
    fb.hub.PackedModel(own).save_pretrained(tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "README.md",
        "config.json",
        "student-packed.safetensors",
    ]
    assert json.loads((tmp_path / "small/config.json").read_text())["plan"]["weights"] == 2
    loaded = fb.hub.PackedModel.from_pretrained(tmp_path / "small", model=network())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), own(IMAGES))
    with pytest.raises(ValueError, match="pass the float architecture"):
        fb.hub.PackedModel.from_pretrained(tmp_path / "small")


def test_the_usual_mixin_on_the_hub(mixin_hub):
    own = student()
    model = fb.hub.PackedModel(own)
    assert model.push_to_hub("me/small", model_card_kwargs={"repo_id": "me/small"}) == "hub/me/small/commit"
    card = (mixin_hub / "me/small/README.md").read_text()
    assert 'PackedModel.from_pretrained("me/small")' in card
    assert "library_name: fewbits" in card
    loaded = fb.hub.PackedModel.from_pretrained("me/small", revision="main", model=network())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), own(IMAGES))
    # What push uploads has no config.json.
    (mixin_hub / "me/small/config.json").unlink()
    assert fb.hub.PackedModel.from_pretrained("me/small", revision="main", model=network())


def test_a_loaded_network_that_says_its_architecture_says_it_again(tmp_path):
    described = {"model": "resnet20", "blocks": None, "data": {"num_classes": 10, "channels": 3, "image_size": 32}}
    own = student()
    own.__dict__[packed.HELD] = described
    header = packed._described(packed._frozen(own), None)
    assert {key: header[key] for key in described} == described


def test_the_mixin_has_one_class_that_can_be_pickled(tmp_path):
    assert fb.hub.PackedModel is fb.hub.PackedModel
    assert pickle.loads(pickle.dumps(fb.hub.PackedModel)) is fb.hub.PackedModel
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fb.hub.nothing


def test_without_huggingface_hub_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fb.hub._packed_model.cache_clear()
    for wanted in (
        lambda: fb.hub.push(student(), "me/small"),
        lambda: fb.hub.load("me/small"),
        lambda: fb.hub.PackedModel,
    ):
        with pytest.raises(ImportError, match="pip install"):
            wanted()
