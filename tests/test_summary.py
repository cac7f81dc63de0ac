import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits.calibration import calibrate
from fewbits.convert import Rule, quantize
from fewbits.models.resnet_cifar import resnet20
from fewbits.quantizers import METHODS, Quantizer
from fewbits.summary import Summary, summarize

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(summary: Summary):
    return {row.name: row for row in summary.rows}


class Odd(nn.Conv2d):
    pass


class Everything(nn.Module):
    """Gates, attention, tied and hidden weights, what a table of named layers overlooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.odd = Odd(8, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 4, 3, groups=2, padding=1, bias=False)
        self.gate = nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bare = nn.Linear(4, 4, bias=False)
        self.twice = nn.Linear(4, 4)
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, bias=False)
        self.unused = nn.Linear(7, 7)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        x = self.grouped(self.depthwise(self.odd(self.conv(x))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        tokens = x.flatten(2).transpose(1, 2) * self.gamma * 0.5
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = F.linear(tokens, self.bare.weight)
        tokens = self.twice(self.twice(tokens))
        tokens = torch.einsum("nij,njd->nid", tokens @ tokens.transpose(1, 2), tokens)
        return self.head(tokens.mean(1))


@pytest.fixture(scope="module")
def everything() -> Summary:
    return summarize(Everything(), X)


@pytest.mark.parametrize(
    ("name", "kind", "macs"),
    [
        ("conv", "conv 3x3", 8 * 64 * 27),
        ("odd", "conv 1x1", 8 * 64 * 8),
        ("depthwise", "depthwise 3x3", 8 * 36 * 9),
        ("grouped", "conv 3x3, 2 groups", 4 * 36 * 4 * 9),
        ("gate", "conv 1x1", 4 * 4),
        ("bare", "linear", 36 * 16),
        ("twice", "linear", 2 * 36 * 16),
        ("attention.out_proj", "linear", 36 * 16),
        ("unused", "linear", 0),
        ("head", "linear", 4 * 5),
    ],
)
def test_macs_of_each_way_to_multiply(everything: Summary, name: str, kind: str, macs: int):
    row = rows(everything)[name]
    assert (row.kind, row.macs, row.bit_operations) == (kind, macs, macs * 1024)


def test_other_modules_and_products(everything: Summary):
    others = {row.kind: row for row in everything.others}
    assert others["ConvTranspose2d"].macs == 3 * 64 * 2 * 9
    assert others["MultiheadAttention"].macs == 3 * 36 * 16
    assert "hides" in others["MultiheadAttention"].reason
    assert others["Everything"].parameters == 4
    products = {(p.operation, p.name): (p.calls, p.macs) for p in everything.products}
    assert products == {
        ("mul", ""): (1, 4 * 36),
        ("scaled_dot_product_attention", "attention"): (1, 2 * 36 * 36 * 4),
        ("bmm", ""): (2, 2 * 36 * 36 * 4),
    }


def test_totals_are_the_sums(everything: Summary):
    model = Everything()
    totals = everything.totals
    assert totals.parameters == sum(p.numel() for p in model.parameters())
    assert totals.float_bytes == totals.size_bytes == 4 * totals.parameters
    assert totals.macs == sum(r.macs for r in (*everything.rows, *everything.others, *everything.products))
    assert totals.bit_operations == totals.float_bit_operations == 1024 * totals.macs
    assert totals.size_ratio == totals.bit_operations_ratio == 1


def test_macs_agree_with_pytorchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    net = resnet20(10).eval()
    image = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    assert 2 * summarize(net, image).totals.macs == counter.get_total_flops()


def test_reasons_of_layers_that_stay_float():
    net = quantize(Everything(), 2, 2, residual=None, ends=32, keep=["depthwise"], rules=[Rule("gate", 32, 32)])
    reasons = {row.name: row.reason for row in summarize(net, X).floats}
    assert reasons["odd"] == "subclass of nn.Conv2d named Odd"
    assert reasons["depthwise"] == "kept by the plan"
    assert reasons["gate"] == "32 bits asked for"
    assert reasons["attention.out_proj"] == "hidden inside nn.MultiheadAttention"
    # Which comes last is known where the model can be traced; this one can.
    assert reasons["conv"] == reasons["head"] == "first or last layer"
    assert set(reasons) == {"odd", "depthwise", "gate", "attention.out_proj", "conv", "head"}


def test_a_quantized_weight_that_is_used_without_its_layer_counts_as_float():
    row = rows(summarize(quantize(Everything(), 2, 2, residual=None), X))["bare"]
    assert row.weight is not None
    assert row.bit_operations == row.macs * 1024
    assert "without calling it" in row.reason


def test_layers_that_never_ran_come_last_and_say_so(everything: Summary):
    assert rows(everything)["unused"].reason.endswith("did not run on the example")
    assert not rows(everything)["unused"].output_shape


def test_bits_bytes_and_shapes_of_quantized_layers():
    net = quantize(resnet20(10), weights=3, activations=2, granularity="channel")
    calibrate(net, [torch.randn(8, 3, 32, 32)])
    summary = summarize(net, torch.zeros(2, 3, 32, 32))
    assert [row.name for row in summary.rows][:2] == ["conv1", "layer1.0.conv1"]
    row = rows(summary)["layer2.0.conv1"]
    assert row.weight is not None
    assert row.activation is not None
    assert (row.weight.bits, row.activation.bits, row.activation.signed) == (3, 2, False)
    assert (row.input_shape, row.output_shape) == ((16, 32, 32), (32, 16, 16))
    assert row.size_bytes == -(-3 * 32 * 16 * 9 // 8) + 4 * 32 + 4
    assert row.bit_operations == row.macs * 6
    quantizer = net.get_submodule("layer2.0.conv1").weight_quantizer
    assert isinstance(quantizer, Quantizer)
    step = quantizer.get_parameter("step").detach()
    assert row.weight.step == (float(step.min()), float(step.max()))
    assert row.weight.range == pytest.approx((-4 * float(step.max()), 3 * float(step.max())))
    first = rows(summary)["conv1"].activation
    assert first is not None
    assert first.signed
    assert first.state == "calibrated"


def test_streams_are_listed():
    net = quantize(resnet20(10), 2, 2)
    streams = {(row.name, row.side): row for row in summarize(net, torch.zeros(1, 3, 32, 32)).streams}
    assert streams["layer1.0.relu2", "output"].grid.bits == 8
    assert streams["layer1.0.relu2", "output"].grid.state == "not calibrated"
    assert streams["layer1.0.relu2", "output"].shape == (16, 32, 32)
    assert len(streams) == sum(name.endswith("_stream") for name, _ in net.named_modules())


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str):
    bits = METHODS[method].bits[0]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    net = quantize(net, bits, bits, quantizer=method)
    calibrate(net, [X])
    row = rows(summarize(net, X))["2"]
    assert row.weight is not None
    assert row.activation is not None
    for grid in (row.weight, row.activation):
        assert (grid.method, grid.bits, grid.state) == (method, bits, "calibrated")
        assert grid.range is not None
        assert grid.step is not None
        num_steps = (grid.range[1] - grid.range[0]) / grid.step[1]
        assert num_steps == pytest.approx(2**bits - 1, rel=1e-4)


def test_a_closed_gate_counts_as_float():
    net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3)), 2, 2, residual=None)
    layer = net[0]  # type: ignore[index]
    layer.input_quantizer.enabled.fill_(False)
    row = summarize(net, X).rows[0]
    assert row.activation is not None
    assert row.activation.state == "off"
    assert row.bit_operations == row.macs * 8 * 32


def test_shared_modules_and_tied_weights_count_once_in_bytes():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    tied = nn.Conv2d(3, 3, 3, padding=1)
    tied.weight = layer.weight
    net = nn.Sequential(layer, layer, tied)
    summary = summarize(net, X)
    assert [(r.name, r.calls, r.macs) for r in summary.rows] == [("0", 2, 2 * 64 * 81), ("2", 1, 64 * 81)]
    assert summary.totals.parameters == sum(p.numel() for p in net.parameters())
    assert "shares its parameters with 0" in summary.rows[1].reason
    assert "runs 2 times" in str(summary)


def test_mode_and_state_are_untouched():
    net = quantize(resnet20(10), 2, 2)
    net.train()
    net.get_submodule("layer1").eval()
    modes = [m.training for m in net.modules()]
    before = copy.deepcopy(net.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    summarize(net, torch.randn(2, 3, 32, 32))
    assert [m.training for m in net.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_mode_and_hooks_are_put_back_after_an_error():
    net = nn.Sequential(nn.Conv2d(5, 8, 3))
    with pytest.raises(ValueError, match=r"Sequential does not run on an example of shape \(1, 3, 8, 8\)"):
        summarize(net, X)
    assert net.training
    assert not net._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("example", [torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8), [1]])
def test_examples_that_are_no_images(example: object):
    with pytest.raises(ValueError, match="example must be images N x C x H x W"):
        summarize(nn.Conv2d(3, 8, 3), example)  # type: ignore[arg-type]


def test_transformer_layers_are_looked_into():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), _Tokens(), layer).eval()
    summary = summarize(net, X)
    assert rows(summary)["3.linear1"].macs == 4 * 8 * 16
    assert rows(summary)["3.linear1"].input_shape == (4, 8)
    assert [p.name for p in summary.products] == ["3.self_attn"]


class _Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_text_table_and_json(everything: Summary):
    text = str(everything)
    assert len({line.index("layer") for line in text.splitlines() if line.startswith("layer")}) == 1
    assert all(row.name in text for row in everything.rows)
    assert "product of two activations" in text
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(everything.table())
    assert "Everything, for one image" in console.export_text()
    data = everything.to_data()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["totals"]["macs"] == everything.totals.macs


def test_names_are_not_read_as_markup():
    net = nn.Sequential()
    net.add_module("[red]x", nn.Conv2d(3, 8, 3))
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(summarize(net, X).table())
    assert "[red]x" in console.export_text()
