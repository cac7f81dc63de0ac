"""Dynamic ranges: exported as they are, or frozen under another name."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from fewbits.convert import Rule, plan_of, quantizers_of
from fewbits.deploy import export, freeze_ranges
from fewbits.quantizers.minmax import MinMax

from .networks import Residual, images, student

BITS = [2, 4, 5, 8]


def logits(path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})[0]))


@pytest.mark.parametrize("bits", BITS)
def test_dynamic_ranges_are_exported_dynamic(bits: int, tmp_path: Path):
    """The file computes the range of whatever batch comes: its logits are PyTorch's at every batch size."""
    model, x = student(Residual(), bits, bits, "minmax"), images(24)
    found = export(model, tmp_path / "student.onnx", example=x, normalisation=None, minimum_equal=0.0)
    for size in (1, 3, 24):
        with torch.no_grad():
            wanted = model(x[:size])
        torch.testing.assert_close(logits(found.path, x[:size]), wanted, rtol=1e-3, atol=1e-3)
    alone = torch.cat([logits(found.path, image[None]) for image in x])
    assert not torch.allclose(alone, logits(found.path, x), atol=1e-3)  # so the batch does matter
    assert found.dynamic == ("conv1.input_quantizer", "conv2.input_quantizer")
    rows = {row.name: row for row in found.layers}
    for name in ("conv1", "conv2"):
        assert rows[name].kernel == "float"
        assert "found anew in every batch" in rows[name].reason
    file = onnx.load(found.path)
    assert {"ReduceMin", "ReduceMax"} <= {node.op_type for node in file.graph.node}
    assert "dynamic" in {entry.key: entry.value for entry in file.metadata_props}["ranges"]


@pytest.mark.parametrize("bits", BITS)
def test_frozen_ranges_run_on_integers(bits: int, tmp_path: Path):
    model, x = student(Residual(), bits, bits, "minmax"), images(24)
    frozen = freeze_ranges(model, [x])
    found = export(frozen, tmp_path / "student.onnx", example=x, normalisation=None, minimum_equal=0.0)
    assert found.dynamic == ()
    assert [row.kernel for row in found.layers] == ["QLinearConv"] * 3 + ["QGemm"]
    assert min(row.equal for row in found.codes) >= 0.999
    alone = torch.cat([logits(found.path, image[None]) for image in x])
    torch.testing.assert_close(alone, logits(found.path, x), rtol=1e-3, atol=1e-3)
    assert "ranges" not in {entry.key for entry in onnx.load(found.path).metadata_props}


def test_ranges_are_means_over_the_batches():
    model, batches = student(Residual(), 4, 4, "minmax"), [images(8), 2 * images(8)]
    seen: list[Tensor] = []
    model.conv2.input_quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    frozen = freeze_ranges(model, batches).conv2.input_quantizer
    assert len(seen) == 2
    lowest = sum(x.min().item() for x in seen) / 2
    highest = sum(x.max().item() for x in seen) / 2
    assert lowest == 0.0  # behind a ReLU
    assert frozen.zero_point == 0
    assert frozen.step.item() * 15 == pytest.approx(highest, rel=1e-6)
    weight = model.conv2.weight
    other = freeze_ranges(model, batches).conv2.weight_quantizer
    assert other.step.item() * 15 == pytest.approx((weight.max() - weight.min()).item(), rel=1e-6)


def test_the_name_changes_with_the_method():
    model = student(Residual(), 4, 4, "lsq", rules=(Rule("conv1", quantizer="minmax"),))
    frozen = freeze_ranges(model, [images(4)])
    assert plan_of(frozen).rules == (Rule("conv1", quantizer="minmax-frozen"),)
    assert plan_of(frozen).quantizer == "lsq"
    assert plan_of(freeze_ranges(student(Residual(), 4, 4, "minmax"), [images(4)])).quantizer == "minmax-frozen"
    assert frozen.conv1.input_quantizer.spec.method == "minmax-frozen"
    assert "minmax-frozen, 4 bits" in repr(frozen.conv1)


def test_the_student_is_left_as_it_was():
    model, x = student(Residual(), 4, 4, "minmax").train(), images(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze_ranges(model, [x])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(isinstance(quantizer, MinMax) for _, quantizer in quantizers_of(model)) == 4
    assert not any(quantizer._forward_pre_hooks for _, quantizer in quantizers_of(model))


def test_a_closed_gate_stays_closed():
    model, x = student(Residual(), 4, 4, "minmax"), images(8)
    model.conv1.input_quantizer.enabled.fill_(False)
    frozen = freeze_ranges(model, [x])
    assert not frozen.conv1.input_quantizer.enabled
    assert frozen.conv2.input_quantizer.enabled


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="no min-max quantizer, so its ranges are fixed already"):
        freeze_ranges(student(Residual(), 4, 4), [images(4)])
    with pytest.raises(ValueError, match=r"a frozen range needs 2 bits or more .* has 1"):
        freeze_ranges(student(Residual(), 1, 1, "minmax"), [images(4)])
    with pytest.raises(ValueError, match="never ran; batches must hold at least one batch"):
        freeze_ranges(student(Residual(), 4, 4, "minmax"), [])
