import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fewbits.layers import QUANTIZED, QuantConv2d, QuantLayer, QuantLinear
from fewbits.quantizers import METHODS, QuantSpec
from fewbits.quantizers.again import QuantizingAgain
from fewbits.quantizers.ewgs import EWGSWeight

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "1x1": nn.Conv2d(4, 6, 1),
    "stride": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0)),
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "same": nn.Conv2d(4, 6, (1, 3), padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
}
LINEARS = {"linear": nn.Linear(4, 6), "linear without bias": nn.Linear(4, 6, bias=False)}
LAYERS: dict[str, nn.Conv2d | nn.Linear] = {**CONVOLUTIONS, **LINEARS}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    LAYERS[name].reset_parameters()  # from the test's own seed
    x = torch.randn(2, 5, 4) if name in LINEARS else torch.randn(2, 4, 8, 8)
    return copy.deepcopy(LAYERS[name]), x.relu()


def specs(method: str, bits: int) -> tuple[QuantSpec, QuantSpec]:
    return QuantSpec(method, bits, "weight"), QuantSpec(method, bits, "activation")


def quantize(layer: nn.Module, method: str = "lsq", bits: int = 4) -> QuantLayer:
    return QUANTIZED[type(layer)].from_float(layer, *specs(method, bits))


def calibrated(layer: nn.Module, x: Tensor, method: str = "lsq", bits: int = 4) -> QuantLayer:
    quantized = quantize(layer, method, bits)
    quantized.calibrate_weight()
    assert quantized.input_quantizer is not None
    quantized.input_quantizer.calibrate(x)
    return quantized


@every_layer
def test_without_quantizers_it_is_the_float_layer_bit_for_bit(name: str):
    layer, x = layer_and_input(name)
    wanted = layer(x)
    quantized = QUANTIZED[type(layer)].from_float(layer, None, None)
    assert torch.equal(quantized(x), wanted)
    assert quantized.state_dict().keys() == LAYERS[name].state_dict().keys()


@every_layer
def test_closed_gates_give_the_float_layer_bit_for_bit(name: str):
    layer, x = layer_and_input(name)
    wanted = layer(x)
    quantized = calibrated(layer, x)
    assert not torch.equal(quantized(x), wanted)
    for quantizer in (quantized.weight_quantizer, quantized.input_quantizer):
        assert quantizer is not None
        quantizer.enabled.fill_(False)
    assert torch.equal(quantized(x), wanted)


@every_layer
def test_it_is_the_float_layer_on_quantized_tensors(name: str):
    """With the options as they were; the input is quantized before it is padded."""
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x)
    assert quantized.weight_quantizer is not None
    assert quantized.input_quantizer is not None
    reference = copy.deepcopy(LAYERS[name])
    with torch.no_grad():
        reference.weight.copy_(quantized.weight_quantizer(quantized.weight))
    assert torch.equal(quantized(x), reference(quantized.input_quantizer(x)))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_options_are_kept(name: str):
    layer, _ = layer_and_input(name)
    before = {key: getattr(layer, key) for key in nn.Conv2d.__constants__ if key != "in_channels"}
    quantized = quantize(layer)
    assert isinstance(quantized, QuantConv2d)
    assert {key: getattr(quantized, key) for key in before} == before


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_layer(name: str, method: str):
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x, method, max(METHODS[method].bits[:2]))
    quantized.match_output(x)
    quantized(x.requires_grad_()).square().mean().backward()
    for key, parameter in quantized.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key
    assert x.grad is not None
    assert bool(quantized.weight.grad.any())


@every_layer
def test_steps_per_output_channel(name: str):
    layer, x = layer_and_input(name)
    spec = QuantSpec("lsq", 2, "weight", "channel")
    quantized = QUANTIZED[type(layer)].from_float(layer, spec, None)
    quantized.calibrate_weight()
    assert quantized.weight_quantizer is not None
    codes = quantized.weight_quantizer.encode(quantized.weight)
    assert codes.scale.numel() == quantized.weight.shape[0]
    assert all(len(channel.unique()) <= 4 for channel in codes.decode().flatten(1))
    quantized(x)


def test_zero_padding_stays_zero_without_a_zero_level():
    """EWGS and min-max grids may have no level at zero; the padding is not theirs."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    quantized = QuantConv2d.from_float(layer, None, QuantSpec("minmax", 2, "activation"))
    x = torch.tensor([[[[1.0, 4.0]]]])
    assert quantized(x).tolist() == [[[[5.0, 5.0]]]]


def test_the_object_stays_the_same():
    layer = nn.Conv2d(4, 6, 3)
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    quantized = quantize(layer)
    assert quantized is layer
    assert quantized.weight is weight
    quantized(torch.randn(1, 4, 5, 5))
    assert seen == [layer]


def test_shared_modules_stay_shared():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    quantize(layer)
    assert isinstance(model[0], QuantLinear)
    assert model[0] is model[2]
    assert len({id(p) for p in model.parameters()}) == 4  # weight, bias and two steps


def test_tied_weights_stay_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    quantize(first)
    quantize(second)
    assert first.weight is second.weight


def test_copies_are_independent():
    layer, x = layer_and_input("plain")
    quantized = calibrated(layer, x)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(x), quantized(x))
    nn.init.constant_(twin.input_quantizer.step, 7.0)
    assert not torch.equal(twin(x), quantized(x))


@every_layer
def test_a_float_state_dict_loads_as_it_is(name: str):
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x)
    keys = quantized.load_state_dict(LAYERS[name].state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all("quantizer." in key for key in keys.missing_keys)


@every_layer
@pytest.mark.parametrize("bits", [1, 4])
def test_match_output_of_ewgs(name: str, bits: int):
    """s = mean|out_fp| / mean|out_q|, without the bias: the quantized layer has the float layer's size."""
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x, "ewgs", bits)
    quantizer = quantized.weight_quantizer
    assert isinstance(quantizer, EWGSWeight)
    assert quantizer.output_scale.item() == 1.0
    quantized.match_output(x)

    reference = copy.deepcopy(LAYERS[name])
    if reference.bias is not None:
        nn.init.zeros_(reference.bias)
        nn.init.zeros_(quantized.bias)
    wanted = reference(x).abs().mean().item()
    assert quantized(x).abs().mean().item() == pytest.approx(wanted, rel=1e-4)
    assert quantizer.output_scale.item() > 0


def test_match_output_of_a_silent_layer_is_one():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    quantized = calibrated(layer, torch.rand(2, 4), "ewgs", 4)
    quantized.match_output(torch.zeros(2, 4))
    assert quantized.weight_quantizer.output_scale.item() == 1.0


def test_match_output_leaves_other_methods_alone():
    layer, x = layer_and_input("plain")
    quantized = calibrated(layer, x)
    before = copy.deepcopy(quantized.state_dict())
    quantized.match_output(x)
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())


def test_the_scale_on_the_weights_is_the_paper_s_scale_on_the_output():
    """Same numbers and same gradient of s: a convolution is linear."""
    layer, x = layer_and_input("no bias")
    quantized = calibrated(layer, x, "ewgs", 2)
    quantizer = quantized.weight_quantizer
    assert isinstance(quantizer, EWGSWeight)
    assert quantized.input_quantizer is not None
    nn.init.constant_(quantizer.output_scale, 1.75)
    g = torch.randn_like(quantized(x))
    y = quantized(x)
    y.backward(g)
    got = quantizer.output_scale.grad
    assert got is not None

    scale = torch.tensor(1.75, requires_grad=True)
    nn.init.ones_(quantizer.output_scale)
    y_paper = F.conv2d(quantized.input_quantizer(x), quantizer(quantized.weight)).detach() * scale.abs()
    y_paper.backward(g)
    torch.testing.assert_close(y, y_paper)
    torch.testing.assert_close(got, scale.grad)


@every_layer
def test_autocast(name: str):
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    for key, parameter in quantized.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all()), key


def kept_and_gradients(layer: QuantLayer, x: Tensor, again: bool) -> tuple[bool, list[Tensor]]:
    """Whether the quantized input outlives the forward pass; output and all gradients."""
    layer.zero_grad()
    given = x.clone(memory_format=torch.preserve_format).requires_grad_()
    quantized: list[StorageWeakRef] = []
    assert layer.input_quantizer is not None
    forward = layer.input_quantizer.forward

    def noted(value: Tensor) -> Tensor:
        output = forward(value)
        quantized.append(StorageWeakRef(output.untyped_storage()))
        return output

    layer.input_quantizer.forward = noted
    with QuantizingAgain() if again else nullcontext():
        y = layer(given)
    del layer.input_quantizer.forward
    is_kept = not quantized[0].expired()
    y.square().sum().backward()
    return is_kept, [y.detach(), *(p.grad for p in (given, *layer.parameters()) if p.grad is not None)]


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_quantizing_again_changes_no_bit_and_keeps_less(name: str, method: str):
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x, method, 1 if METHODS[method].bits == (1,) else 4)
    if x.ndim == 4 and name != "1x1":
        x = x.to(memory_format=torch.channels_last)
    # What is padded by itself is another tensor than the quantized one.
    is_padded = getattr(quantized, "padding_mode", "zeros") != "zeros" or name == "same"
    is_kept, expected = kept_and_gradients(quantized, x, again=False)
    assert is_kept or is_padded
    is_kept, given = kept_and_gradients(quantized, x, again=True)
    assert is_kept == (method == "react") or is_padded  # it keeps a shifted copy of its input, not the input
    for one, two in zip(given, expected, strict=True):
        assert torch.equal(one, two)


@every_layer
def test_quantizing_again_changes_no_bit_in_half_precision(name: str):
    layer, x = layer_and_input(name)
    quantized = calibrated(layer, x, "lsq", 4)
    with torch.autocast("cpu", torch.bfloat16):
        for values in (x, x.bfloat16()):
            (_, expected), (_, given) = (kept_and_gradients(quantized, values, again=on) for on in (False, True))
            for one, two in zip(given, expected, strict=True):
                assert torch.equal(one, two)
