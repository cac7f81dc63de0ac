"""Double shortcuts and their branches, against explicit loops and the counts of the methods page."""

import copy
import importlib.util
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits.blocks import BiRealBlock, FloatConv2d, binary_blocks, bireal, make_branch, rewrite
from fewbits.calibration import calibrate
from fewbits.convert import Rule, float_state, quantize
from fewbits.layers import QuantConv2d
from fewbits.models import build
from fewbits.models.resnet_cifar import CifarResNet, PadShortcut
from fewbits.summary import summarize

BRANCHES = ("bottleneck", "squeeze", "grouped")


def network(projection: bool = False, widths: tuple[int, ...] = (4, 8)) -> CifarResNet:
    """Two stages of one block, batch norms away from their start."""
    made = CifarResNet((1,) * len(widths), widths, projection=projection, num_classes=3, architecture="tiny")
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    return made.eval()


def block_of(model: nn.Module, stage: int) -> BiRealBlock:
    return cast(BiRealBlock, model.get_submodule(f"layer{stage}.0"))


def images(num: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(num, channels, size, size)


def binary_convolution(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """alpha_o * sum of sign(w) sign(x), one number at a time; sign(0) = +1, zeros padded behind the sign."""
    stride = conv.stride[0]
    num, _, height, width = x.shape
    out = torch.zeros(num, conv.out_channels, -(-height // stride), -(-width // stride))
    for n in range(num):
        for o in range(conv.out_channels):
            alpha = float(conv.weight[o].abs().mean())
            for i in range(out.shape[2]):
                for j in range(out.shape[3]):
                    total = 0.0
                    for c in range(conv.in_channels):
                        for di in range(3):
                            for dj in range(3):
                                row, column = i * stride + di - 1, j * stride + dj - 1
                                if 0 <= row < height and 0 <= column < width:
                                    sign_x = 1.0 if x[n, c, row, column] >= 0 else -1.0
                                    total += sign_x * (1.0 if conv.weight[o, c, di, dj] >= 0 else -1.0)
                    out[n, o, i, j] = alpha * total
    return out


def normalised(x: Tensor, bn: nn.Module) -> Tensor:
    assert isinstance(bn, nn.BatchNorm2d)
    mean, var, gain, bias = (
        cast(Tensor, t).view(1, -1, 1, 1) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + bn.eps).sqrt() * gain + bias


@pytest.mark.parametrize("activation", ["none", "prelu"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_block_by_explicit_loops(activation: Any, stage: int):
    student = quantize(bireal(network(), activation), 1, 1, quantizer="bireal")
    block = block_of(student, stage).eval()
    x = torch.randn(1, block.conv1.in_channels, 4, 4)
    x[0, 0] = 0.0  # sign(0) is +1
    for act in (block.act1, block.act2):
        if isinstance(act, nn.PReLU):
            act.weight.data.uniform_(0.1, 0.9)

    def activated(y: Tensor, act: nn.Module) -> Tensor:
        if not isinstance(act, nn.PReLU):
            return y
        return torch.where(y > 0, y, y * act.weight.view(1, -1, 1, 1))

    with torch.no_grad():
        shortcut = x
        if stage == 2:
            pooled = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
            kernel = block.shortcut.get_submodule("conv").get_parameter("weight")[:, :, 0, 0]
            shortcut = normalised(torch.einsum("oc,nchw->nohw", kernel, pooled), block.shortcut.get_submodule("bn"))
        y = activated(normalised(binary_convolution(x, block.conv1), block.bn1) + shortcut, block.act1)
        wanted = activated(normalised(binary_convolution(y, block.conv2), block.bn2) + y, block.act2)
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-4)


def test_weights_move_over_and_the_original_stays():
    float_net = network()
    before = copy.deepcopy(float_net.state_dict())
    made = bireal(float_net, "prelu")
    own = made.state_dict()
    assert not binary_blocks(float_net)
    assert len(binary_blocks(made)) == 2
    assert all(torch.equal(own[name], value) for name, value in before.items())
    assert set(own) - set(before) == {
        name for name in own if ".act" in name or name.startswith(("relu.", "layer2.0.shortcut."))
    }


def test_no_sign_sees_what_a_relu_left():
    """Behind the stem's ReLU each sign is +1: the block would see a constant."""
    student = quantize(bireal(network(), "none"), 1, 1)
    seen: list[Tensor] = []
    for block in binary_blocks(student):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(images())
    assert all((x < 0).float().mean() > 0.05 for x in seen)
    assert not any(isinstance(module, nn.ReLU) for module in student.modules())


def test_option_a_keeps_its_channels():
    """The shortcut starts as the zero-padding did, the average of four pixels in place of the first."""
    x = torch.randn(2, 4, 6, 6)
    block = block_of(bireal(network()), 2)
    block.shortcut.eval()
    pooled = F.avg_pool2d(x, 2)
    wanted = PadShortcut(4, 8, 1)(pooled)
    torch.testing.assert_close(block.shortcut(x), wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(block.shortcut.get_submodule("conv"), FloatConv2d)


def test_shortcuts_of_eight_bits():
    float_net = network()
    rule = Rule("*.shortcut.conv", 8, 8, "lsq")
    student = quantize(bireal(float_net, "prelu", float_shortcut=False), 1, 1, rules=[rule])
    conv = student.get_submodule("layer2.0.shortcut.conv")
    assert isinstance(conv, QuantConv2d)
    assert (conv.weight_quantizer.bits, conv.input_quantizer.bits) == (8, 8)
    assert float_state(student).keys() == bireal(float_net, "prelu").state_dict().keys()
    calibrate(student, [images(16)])
    torch.testing.assert_close(conv.weight_quantizer(conv.weight), conv.weight, rtol=0, atol=1 / 127)


def test_a_projection_keeps_its_weights():
    float_net = network(projection=True)
    shortcut = block_of(bireal(float_net), 2).shortcut.eval()
    x = torch.randn(2, 4, 6, 6)
    old = float_net.get_submodule("layer2.0.shortcut")
    wanted = old.get_submodule("bn")(F.conv2d(F.avg_pool2d(x, 2), old.get_submodule("conv").get_parameter("weight")))
    torch.testing.assert_close(shortcut(x), wanted)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("branch", [None, *BRANCHES])
@pytest.mark.parametrize("size", [8, 9])
def test_before_and_after_quantize_make_the_same_network(branch: Any, size: int, projection: bool):
    """An odd map is rounded up on both sides of the addition."""
    float_net = network(projection)
    torch.manual_seed(3)
    before = quantize(bireal(float_net, "prelu", branch), 1, 1, quantizer="bireal")
    torch.manual_seed(3)
    after = quantize(float_net, 1, 1, quantizer="bireal")
    convs = {name: module for name, module in after.named_modules() if isinstance(module, QuantConv2d)}
    rewrite(after, "prelu", branch)
    assert {n: q.spec for n, q in _quantizers(before).items()} == {n: q.spec for n, q in _quantizers(after).items()}
    assert after.get_submodule("layer1.0.conv1") is convs["layer1.0.conv1"]
    x = images(size=size)
    calibrate(before, [x])
    calibrate(after, [x])
    assert before.state_dict().keys() == after.state_dict().keys()
    assert torch.equal(before.eval()(x), after.eval()(x))
    assert float_state(before).keys() == bireal(float_net, "prelu", branch).state_dict().keys()


def _quantizers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if n.endswith("_quantizer")}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_branch_starts_as_zero_and_learns(branch: Any, stride: int):
    made = make_branch(branch, 8, 16, stride)
    x = torch.randn(4, 8, 7, 7) + 2 * torch.randn(4, 8, 1, 1)
    y = made(x) + torch.zeros(4, 16, -(-7 // stride), -(-7 // stride))
    assert torch.count_nonzero(y) == 0
    (y * torch.randn_like(y)).sum().backward()
    last = made[-1].weight  # type: ignore[index]
    assert torch.count_nonzero(last.grad) > 0


@pytest.mark.parametrize(
    ("branch", "reduction", "extra"),
    [
        ("bottleneck", None, 1_227_008),
        ("bottleneck", 8, 453_952),
        ("squeeze", None, 147_200),
        ("squeeze", 32, 73_600),
        ("grouped", None, 110_848),
    ],
)
def test_what_a_branch_costs_on_resnet18(branch: Any, reduction: int | None, extra: int):
    """Section 6 of the methods page: 1.227, 0.454, 0.147, 0.074 and 0.111 million, batch norms not counted."""
    model = build("resnet18", num_classes=1000)
    plain, made = bireal(model), bireal(model, "none", branch, reduction)
    kernels = [p for name, p in made.named_parameters() if ".branch" in name and p.ndim == 4]
    assert sum(p.numel() for p in kernels) == extra
    # The page counts ImageNet's 7x7 stem: 9,408 parameters, ours 1,728.
    num_plain = sum(p.numel() for p in plain.parameters()) + 9_408 - 1_728
    num_binary = sum(c.weight.numel() for b in binary_blocks(plain) for c in (b.conv1, b.conv2))
    assert num_binary == 10_985_472
    assert num_plain - num_binary == pytest.approx(0.704e6, rel=1e-3)
    bits = num_binary + 32 * (num_plain - num_binary)
    shares = {1_227_008: (0.105, 1.17), 453_952: (0.039, 0.43), 147_200: (0.013, 0.14), 73_600: (0.006, 0.07)}
    of_parameters, of_bits = shares.get(extra, (0.0095, 0.106))
    assert extra / num_plain == pytest.approx(of_parameters, abs=6e-4)
    assert 32 * extra / bits == pytest.approx(of_bits, abs=0.01)


def test_branches_and_down_sampling_stay_float_and_are_listed():
    student = quantize(bireal(network(), "prelu", "bottleneck"), 1, 1, quantizer="bireal")
    rows = {row.name: row for row in summarize(student, images(1)).rows}
    inside = [n for n in rows if ".branch" in n or ".shortcut" in n]
    assert len(inside) == 4 * 3 + 1
    assert all(rows[n].is_float and "FloatConv2d" in rows[n].reason for n in inside)
    for name in ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"):
        assert rows[name].weight is not None
        assert rows[name].weight.bits == 1
    assert {n for n in rows if not rows[n].is_float} - set(inside) == set(rows) - set(inside)


def test_signs_stay_on_while_the_rest_is_calibrated():
    """Found: the classifier's step started 40,000 times too large, and training stood still at chance."""
    student = quantize(bireal(build("resnet20", num_classes=10)), 1, 1, quantizer="bireal")
    x = images(16, 16)
    states = {n: t.clone() for n, t in student.state_dict().items() if "running" in n or "tracked" in n}
    calibrate(student, [x])
    assert all(torch.equal(student.state_dict()[n], t) for n, t in states.items())
    seen: list[Tensor] = []
    student.get_submodule("linear").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student.train()(x)
    quantizer: Any = student.get_submodule("linear.input_quantizer")
    covered = 256 * quantizer.step.item()
    assert 0.3 < covered / (seen[0].max() - seen[0].min()).item() < 3


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='pip install "fewbits[timm]"')
def test_timm_resnets():
    model = build("timm:resnet18", num_classes=5)
    made = bireal(model, "prelu", "squeeze").eval()
    assert len(binary_blocks(made)) == 8
    assert not any(isinstance(m, nn.ReLU) for n, m in made.named_modules() if ".branch" not in n)
    assert quantize(made, 1, 1, quantizer="bireal")(images(2, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="no residual block of two 3x3 convolutions"):
        bireal(build("timm:resnet50", num_classes=5))


def test_widened_networks():
    assert build("resnet20-w1.5", num_classes=10).get_submodule("linear").in_features == 96
    assert build("resnet18-w0.5", num_classes=10).get_submodule("conv1").out_channels == 32
    same = build("resnet20-w1", num_classes=10)
    assert sum(p.numel() for p in same.parameters()) == 269_722
    binary = quantize(bireal(build("resnet20-w1.25", num_classes=10)), 1, 1)
    assert binary(images(2, 32)).shape == (2, 10)
    for name in ("resnet20-w0", "resnet20-w99"):
        with pytest.raises(ValueError, match="must lie above 0 and be at most 16"):
            build(name, num_classes=10)
    with pytest.raises(ValueError, match="model must be one of"):
        build("vgg-small-w2", num_classes=10)


# Bad input


def test_what_cannot_be_rewritten():
    with pytest.raises(ValueError, match="VGGSmall has no residual block"):
        bireal(build("vgg-small", num_classes=10))
    with pytest.raises(ValueError, match=r"residual=None.*quantize\(bireal\(model\)"):
        rewrite(quantize(network(), 4, 4))
    with pytest.raises(ValueError, match="activation must be one of none, prelu, got 'relu'"):
        bireal(network(), cast(Any, "relu"))
    with pytest.raises(ValueError, match="branch must be one of bottleneck, squeeze, grouped, got 'se'"):
        bireal(network(), "none", cast(Any, "se"))
    with pytest.raises(ValueError, match="reduction must be at least 1"):
        make_branch("bottleneck", 8, 8, reduction=0)
    with pytest.raises(ValueError, match="reduction must be at least 1, and is there for bottleneck and squeeze"):
        make_branch("grouped", 8, 8, reduction=4)


def test_blocks_that_are_there_already():
    made = bireal(network(), "prelu")
    blocks = binary_blocks(made)
    rewrite(made, branch="squeeze")
    assert binary_blocks(made) == blocks
    assert all(block.branch1 is not None and block.branch2 is not None for block in blocks)
    with pytest.raises(ValueError, match="have a branch already"):
        rewrite(made, branch="squeeze")
    with pytest.raises(ValueError, match="activation='none': the blocks are there already, with 'prelu'"):
        rewrite(made, "none")


def test_streams_are_quantized_around_double_shortcuts():
    student = quantize(bireal(network(), "none"), 2, 2)
    assert any("stream" in name for name, _ in student.named_modules())
    calibrate(student, [images()])
    assert torch.isfinite(student(images())).all()
