"""Settled networks: what PyTorch adds behind a convolution is what an integer kernel adds."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbits as fb
from fewbits.convert import quantize
from fewbits.deploy import export, freeze_ranges
from fewbits.integers import largest_factors, settle_biases, whole
from fewbits.layers import QuantConv2d

from .deploy.networks import Block, Plain, Residual, Twice, images, student


def units(layer: QuantConv2d) -> Tensor:
    """Input step times weight step of each output channel, as Jacob et al. define the unit of a bias."""
    assert layer.weight_quantizer is not None
    assert layer.input_quantizer is not None
    _, scale = whole(layer.weight_quantizer, layer.weight_quantizer.encode(layer.weight))
    step = layer.input_quantizer.encode(torch.zeros(())).scale.double()
    return (torch.as_tensor(scale) * step).expand(layer.out_channels)


def in_units(layer: QuantConv2d, norm: nn.BatchNorm2d | None) -> Tensor:
    """The shift behind ``layer``, as the batch norm's own formula has it at zero, in units of the integer sum."""
    if norm is None:
        assert layer.bias is not None
        return layer.bias.detach().double() / units(layer)
    zero = torch.zeros(1, layer.out_channels, 1, 1, dtype=torch.float64)
    if layer.bias is not None:
        zero = zero + layer.bias.double().view(1, -1, 1, 1)
    numbers = [tensor.detach().double() for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    shift = F.batch_norm(zero, *numbers, eps=norm.eps).flatten()
    at_zero = shift * (numbers[1] + norm.eps).sqrt() / numbers[2]
    return at_zero.detach() / units(layer)


def far(layer: QuantConv2d, norm: nn.BatchNorm2d | None) -> Tensor:
    """How far each shift is from the nearest fraction that the layer's weights have room for."""
    integers, _ = whole(layer.weight_quantizer, layer.weight_quantizer.encode(layer.weight))
    zero = layer.input_quantizer.encode(torch.zeros(()))
    room = largest_factors(integers, zero.high - zero.low)
    shifts = in_units(layer, norm)
    return torch.stack(
        [min((s * k - (s * k).round()).abs() for k in range(1, r + 1)) for s, r in zip(shifts, room, strict=True)]
    )


@pytest.mark.parametrize("seed", range(3))
def test_shifts_at_8_bits_move_onto_the_grid_by_half_a_unit_at_most(seed: int):
    torch.manual_seed(seed)
    model = student(Residual(), 8, 8)
    pairs = [(model.stem, model.bn), (model.conv1, model.bn1), (model.conv2, model.bn2)]
    before = [in_units(*pair) for pair in pairs]
    assert max(float(far(*pair).max()) for pair in pairs) > 0.1
    assert settle_biases(model, images(2)) == 3
    for pair, old in zip(pairs, before, strict=True):
        new = in_units(*pair)
        # Batch norm keeps its numbers in float32.
        assert float((new - old).abs().max()) <= 0.5 + 2e-2
        assert float(far(*pair).max()) < 2e-2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shifts_at_few_bits_are_fractions_that_the_weights_have_room_for(bits: int):
    model = student(Plain(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), bits, bits)
    conv, norm = model.body[0], model.body[1]
    old = in_units(conv, norm)
    settle_biases(model, images(2))
    new = in_units(conv, norm)
    assert float(far(conv, norm).max()) < 2e-3
    assert float((new - old).abs().max()) < 0.1  # not half a unit: there is room for factors


def test_a_second_time_moves_nothing():
    model = student(Residual(), 8, 4)
    settle_biases(model, images(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settle_biases(model, images(2))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_only_means_and_biases_change():
    model = student(Plain(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)), 8, 8)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settle_biases(model, images(2))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"stem.bias", "body.0.bias", "body.3.running_mean"}
    assert model.training
    assert model.body[3].training
    assert not model.body[3]._forward_pre_hooks


def test_a_channel_that_never_changes_keeps_its_value():
    """Its batch norm has seen no variance and scales by hundreds: half a unit would be many output steps."""
    model = student(Plain(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()), 8, 8)
    norm = model.body[1]
    with torch.no_grad():
        norm.running_var[:3], norm.eps = 0.0, 1e-12
    before = norm.running_mean.clone()
    settle_biases(model, images(2))
    assert torch.equal(norm.running_mean[:3], before[:3])
    assert not torch.equal(norm.running_mean[3:], before[3:])


def test_channels_scaled_to_nothing_stay_finite():
    model = student(Plain(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 4, 4)
    with torch.no_grad():
        model.body[1].weight[:4] = torch.tensor([0.0, 1e-30, -1e-12, 0.0])
        model.body[1].bias[3] = 0.0
    settle_biases(model, images(2))
    assert bool(torch.isfinite(model.body[1].running_mean).all())


def test_a_norm_behind_two_layers_is_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            x = self.norm(self.left(x)) + self.norm(self.right(x))
            return self.head(x.mean((2, 3)))

    model = student(Shared(), 8, 8, residual=None)
    before = model.norm.running_mean.clone()
    assert settle_biases(model, images(2)) == 1
    assert torch.equal(model.norm.running_mean, before)


class Bare(nn.Module):
    """A convolution that a sum reads as well as its batch norm, which is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.sum, self.head = nn.Identity(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x).relu())
        return self.head(self.sum(self.act(self.norm(input=y)) + y).mean((2, 3)))


def test_behind_a_stream_quantizer_the_bias_counts_and_not_the_norm():
    model = student(Bare(), 8, 8)
    mean = model.norm.running_mean.clone()
    assert float(far(model.conv, None).max()) > 0.1
    settle_biases(model, images(2))
    assert torch.equal(model.norm.running_mean, mean)
    assert float(far(model.conv, None).max()) < 2e-2


def test_a_norm_that_is_called_by_keyword_is_seen():
    model = student(Bare(), 8, 8, residual=None)
    bias = model.conv.bias.clone()
    settle_biases(model, images(2))
    assert torch.equal(model.conv.bias, bias)
    assert float(far(model.conv, model.norm).max()) < 2e-2


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (1, 3, 0, 0)])
def test_no_images(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"images must be a batch of images, N x C x H x W, got \("):
        settle_biases(student(Residual(), 8, 8), torch.zeros(shape))


def test_a_student_that_was_never_calibrated():
    with pytest.raises(ValueError, match="student was never calibrated"):
        settle_biases(quantize(Residual(), 8, 8), images(2))


def test_a_layer_that_runs_twice_is_settled_once():
    model = student(Plain(Twice()), 8, 8)
    old = in_units(model.body[0].conv, model.body[0].bn)
    settle_biases(model, images(2))
    assert float((in_units(model.body[0].conv, model.body[0].bn) - old).abs().max()) <= 0.51


def test_what_has_no_grid_is_left_alone():
    for method, bits in (("minmax", 4), ("dorefa", 8), ("ewgs", 4)):
        model = student(Residual(), bits, bits, method, ends=32)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert settle_biases(model, images(2)) == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert settle_biases(Residual(), images(2)) == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_every_code_of_a_settled_network_is_the_engines(method: str, bits: int, tmp_path: Path):
    depthwise = [nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    model = student(Plain(Block(), *depthwise, Block(), nn.Conv2d(8, 8, 1), nn.ReLU()), bits, bits, method)
    settle_biases(model, images(2))
    found = export(model, tmp_path / "student.onnx", example=images(128), normalisation=None)
    assert min(row.equal for row in found.codes) > 0.99999
    assert found.equal_predictions == 1.0


@pytest.mark.usefixtures("shared_data")
def test_a_settled_stem_is_read_once(tmp_path: Path):
    """Where a rounded bias would give other codes the stem reads its channels several times over."""
    data = fb.data.load("cifar10")
    weights, _ = fb.models.pretrained("resnet20", "cifar10")
    model = fb.models.build("resnet20", num_classes=10)
    model.load_state_dict(weights)
    model = quantize(model, 2, 2)
    fb.calibrate(model, [data.pixels(64)])

    def copies(path: Path) -> int:
        export(model, path, example=data.pixels(64), normalisation=None)
        return sum(node.op_type == "Concat" for node in onnx.load(path).graph.node)

    assert copies(tmp_path / "before.onnx") == 1
    settle_biases(model, data.pixels(2))
    assert copies(tmp_path / "after.onnx") == 0


def test_training_ends_settled():
    data = fb.data.load("digits")
    model = quantize(fb.models.build("resnet20", num_classes=10, channels=1), 4, 4)
    result = fb.fit(model, recipe=fb.recipes.Plain(), data=data, epochs=0.1, progress=False, ema=0.9)
    for network in (result.student, result.ema):
        assert network is not None
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        settle_biases(network, next(iter(data.test.batches(batch_size=2, normalisation=result.normalisation)))[0])
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)
    assert not np.isnan(result.accuracy)


def test_freezing_ranges_settles_too():
    model, x = student(Residual(), 4, 4, "minmax"), images(24)
    frozen = freeze_ranges(model, [x])
    assert float(far(frozen.conv1, frozen.bn1).max()) < 2e-2
    assert not torch.equal(frozen.bn1.running_mean, model.bn1.running_mean)
