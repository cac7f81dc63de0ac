"""Residual streams, judged by numbers: what enters and leaves additions lies on a grid of at most 256 levels."""

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewbits.calibration import calibrate
from fewbits.convert import Plan, quantize, quantizers_of
from fewbits.layers import QUANTIZED, QuantLayer
from fewbits.models import build
from fewbits.precision import Precision, set_precision
from fewbits.quantizers import Quantizer
from fewbits.streams import INPUT_STREAM, OUTPUT_STREAM, Place, trace

LEVELS = 256
ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
CONCATENATIONS = {torch.cat, torch.concat}


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


class Watch(TorchFunctionMode):
    """Records, outside quantizers, how many values the operands of additions, concatenations and poolings take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, list[int]]] = []  # module, operation, distinct values of each operand
        self.depth = 0
        self.stack: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name, isinstance(module, Quantizer)), prepend=True)
            module.register_forward_hook(self._leave(isinstance(module, Quantizer)), always_call=True)

    def _enter(self, name: str, quantizer: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.depth += quantizer
            self.stack.append(name)

        return hook

    def _leave(self, quantizer: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.depth -= quantizer
            self.stack.pop()

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth == 0 and (operation := self._operation(func)):
            values = [v for v in chain(args, kwargs.values()) if isinstance(v, Tensor)]
            if operation == "concatenation":
                values = list(args[0])
            batch = values[0].shape[0]
            # A bias, a position embedding and an attention mask are parameters, no streams.
            if all(v.ndim > 1 and v.shape[0] == batch for v in values) and (len(values) > 1 or operation == "pooling"):
                self.seen.append((self.stack[-1], operation, [len(v.unique()) for v in values]))
        return func(*args, **kwargs)

    def _operation(self, func: Any) -> str:
        if func in ADDITIONS:
            return "addition"
        if func in CONCATENATIONS:
            return "concatenation"
        name = getattr(func, "__name__", "")
        return "pooling" if re.search(r"(avg|max)_pool|^mean$", name) else ""

    def bad(self) -> list[tuple[str, str, list[int]]]:
        return [entry for entry in self.seen if max(entry[2]) > LEVELS]

    def count(self, operation: str) -> int:
        return sum(entry[1] == operation for entry in self.seen)


def skip_without_timm() -> None:
    # Not importorskip: a torchvision that does not match has to be prepared for first, which build() does.
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip('timm is not installed: pip install "fewbits[timm]"')


@contextmanager
def said() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught]


def watched(model: nn.Module, images: Tensor, plan: Plan | None = None) -> tuple[nn.Module, Watch, list[str]]:
    """A calibrated student after one watched pass, and what quantize warned of."""
    model.eval()
    with said() as messages:
        student = quantize(model, plan=plan or Plan(start="paper"))
    calibrate(student, [images])
    watch = Watch(student)
    with torch.no_grad(), watch:
        student(images)
    return student, watch, messages


def streams(model: nn.Module) -> list[str]:
    return [name for name, _ in quantizers_of(model) if name.endswith((INPUT_STREAM, OUTPUT_STREAM))]


def closed_equals_float(student: nn.Module, model: nn.Module, images: Tensor) -> bool:
    set_precision(student, Precision(weights=False, activations=False))
    with torch.no_grad():
        return torch.equal(student(images), model(images))


def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


# Networks as people write them.


class KuangliuBlock(nn.Module):
    """Functional ReLUs, an addition in place, an empty Sequential as identity shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = conv(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class KuangliuNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(KuangliuBlock(8, 8), KuangliuBlock(8, 8))
        self.layer2 = nn.Sequential(KuangliuBlock(8, 16, 2), KuangliuBlock(16, 16))
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.avg_pool2d(self.layer2(self.layer1(out)), 4)
        return self.linear(out.view(out.size(0), -1))


class TorchvisionBlock(nn.Module):
    """One ``self.relu`` used twice."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(TorchvisionBlock(8, 8), TorchvisionBlock(8, 8))
        self.layer2 = nn.Sequential(TorchvisionBlock(8, 16, 2), TorchvisionBlock(16, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class DenseBlock(nn.ModuleDict):
    """Runs whatever it holds, as torchvision's and timm's do."""

    def __init__(self, channels: int, growth: int, num_layers: int) -> None:
        super().__init__()
        for index in range(num_layers):
            width = channels + index * growth
            self[f"layer{index}"] = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv(width, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def dense_net() -> nn.Module:
    return nn.Sequential(
        conv(3, 8),
        DenseBlock(8, 4, 3),
        nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2)),
        DenseBlock(8, 4, 2),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


class ShuffleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shuffle_net() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), ShuffleBlock(), ShuffleBlock(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 4)
    )


class SumIntoSequential(nn.Module):
    """Nothing but a Sequential takes the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 8), conv(3, 8)
        self.head = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.add(self.one(x), other=self.two(x)))


class SumIntoConvolution(nn.Module):
    """The sum is read by a quantized layer alone, behind a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.fc = conv(3, 8), conv(8, 8), conv(8, 4), nn.Linear(4 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.fc(F.relu(self.three(F.relu(x + self.two(x)))).flatten(1))


class Flat(nn.Module):
    """A second addition whose operand is a functional sum: no module gives or takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.fc = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = F.relu(x + self.two(x))
        x = F.relu(x + self.three(x))
        return self.fc(x.mean((2, 3)))


class PreNormBlock(nn.Module):
    """A norm reads the first sum, and the second addition reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix, self.norm2, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        if x.mean() > -1:
            x = x + self.two(x)
        return self.fc(x.mean((2, 3)))


WRITTEN: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "kuangliu": (KuangliuNet, {"addition": 4, "pooling": 1}),
    "torchvision": (TorchvisionNet, {"addition": 4, "pooling": 2}),
    "densenet": (dense_net, {"concatenation": 5, "pooling": 2}),
    "shufflenet": (shuffle_net, {"concatenation": 2, "pooling": 1}),
    "sum into Sequential": (SumIntoSequential, {"addition": 1, "pooling": 1}),
    "sum into convolution": (SumIntoConvolution, {"addition": 1}),
}
NAMED = {
    "resnet20": {"addition": 9, "pooling": 1},
    "resnet18": {"addition": 8, "pooling": 1},
    "vgg-small": {"pooling": 4},
    "timm:resnet18": {"addition": 8, "pooling": 2},
    "timm:mobilenetv2_100": {"addition": 10, "pooling": 1},
}
SLOW = {"timm:densenet121": {"concatenation": 58, "pooling": 5}}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_operand_lies_on_a_grid(name: str):
    make, wanted = WRITTEN[name]
    model, images = make(), torch.randn(4, 3, 8 if name != "torchvision" else 16, 8 if name != "torchvision" else 16)
    student, watch, messages = watched(model, images)
    assert messages == []
    assert watch.bad() == []
    for operation, count in wanted.items():
        assert watch.count(operation) == count, watch.seen
    assert closed_equals_float(student, model, images)


@pytest.mark.parametrize("name", [*NAMED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_operand_lies_on_a_grid_in_named_networks(name: str):
    if name.startswith("timm:"):
        skip_without_timm()
    model, images = build(name, num_classes=4), torch.randn(2, 3, 32, 32)
    student, watch, messages = watched(model, images)
    assert messages == []
    assert watch.bad() == []
    for operation, count in (NAMED | SLOW)[name].items():
        assert watch.count(operation) == count, watch.seen
    check_layer_inputs(student)
    assert closed_equals_float(student, model, images)


def check_layer_inputs(student: nn.Module) -> None:
    """What layers read lies on their own grid: at 4 bits the ends have 256 levels and all others 16."""
    layers = {name: m for name, m in student.named_modules() if isinstance(m, QuantLayer)}
    levels: dict[str, int] = {}
    for name, layer in layers.items():
        assert layer.input_quantizer is not None
        layer.input_quantizer.register_forward_hook(
            lambda m, args, output, name=name: levels.update({name: len(output.unique())})
        )
    with torch.no_grad():
        student(torch.randn(2, 3, 32, 32))
    bits = {name: layer.input_quantizer.bits for name, layer in layers.items()}
    assert sorted(bits.values()) == [4] * (len(bits) - 2) + [8, 8]
    assert all(levels[name] <= 2 ** bits[name] for name in bits)


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [("timm:vit_tiny_patch16_224", 32, 12), ("timm:swin_tiny_patch4_window7_224", 64, 12)],
)
def test_transformers_say_what_stays_float(name: str, size: int, blocks: int):
    """Each block adds twice; a norm and the second addition share the first sum, which no hook reaches.

    Found: a quantizer at the norm's input looked like cover, while the addition went on reading floats.
    """
    skip_without_timm()
    model, images = build(name, num_classes=4, image_size=size), torch.randn(2, 3, size, size)
    student, watch, messages = watched(model, images)
    assert len(messages) == 1
    assert watch.count("addition") == 2 * blocks
    for place, operation, counts in watch.bad():
        assert operation == "addition"
        assert re.search(rf"[ ,]{re.escape(place)}[ ,]", messages[0])
        assert counts[1] <= LEVELS  # the branch lies on a grid; the sum that the block carries on does not
    assert len(watch.bad()) == blocks
    assert not any(name.endswith(f"norm2.{INPUT_STREAM}") for name in streams(student))
    assert closed_equals_float(student, model, images)


def test_option_a_shortcuts_stay_on_the_grid_that_they_come_with():
    """They only slice and pad with zeros: a stem, and for each block its branch and its result."""
    student = quantize(build("resnet20", num_classes=10))
    assert not any("shortcut" in name for name in streams(student))
    assert len(streams(student)) == 1 + 2 * 9


def test_places_of_a_torchvision_block():
    """relu runs twice: its hook would meet both values, so the block's own output is taken."""
    seen = trace(TorchvisionNet(), tuple(QUANTIZED))
    assert seen.places == (
        Place("relu", "output"),
        Place("layer1.0.bn2", "output"),
        Place("layer1.0", "output"),
        Place("layer1.1.bn2", "output"),
        Place("layer1.1", "output"),
        Place("layer2.0.bn2", "output"),
        Place("layer2.0.downsample.1", "output"),
        Place("layer2.0", "output"),
        Place("layer2.1.bn2", "output"),
        Place("layer2.1", "output"),
    )
    assert seen.unreachable == ()


@pytest.mark.parametrize("make", [dense_net, SumIntoSequential, KuangliuNet], ids=["dense", "sum", "kuangliu"])
def test_containers_hold_no_quantizer(make: Callable[[], nn.Module]):
    """Found: Sequential and ModuleDict run what they hold, so that a stream's quantizer ran as one more layer."""
    student = quantize(make())
    for module in student.modules():
        if isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList):
            assert not any(isinstance(child, Quantizer) for child in module.children())


def test_a_sum_that_only_quantized_layers_read_needs_no_quantizer_and_no_warning():
    student = quantize(SumIntoConvolution())
    assert streams(student) == [f"one.{OUTPUT_STREAM}", f"two.{OUTPUT_STREAM}"]


class Gated(nn.Module):
    """Convolutions whose results are read by a SiLU, by a gate, by two layers, by a norm and by nobody's quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()
        self.expand, self.gate = nn.Conv2d(8, 8, 1), nn.Sigmoid()
        self.shared, self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.plain, self.last = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = x * self.gate(self.expand(x))
        x = F.relu(self.shared(x))
        x = self.norm(self.one(x)) * self.two(x)
        return self.last(F.relu6(self.plain(x)))


def test_what_a_convolution_gives_to_no_quantized_layer_is_quantized():
    """But for rectifiers, which the next layer's quantizer takes in, and for the network's own result."""
    seen = trace(Gated(), tuple(QUANTIZED))
    wanted = {"bn": "SiLU", "expand": "the gate", "shared": "two layers", "one": "a norm", "two": "a product"}
    assert {place.module: place.side for place in seen.places} == dict.fromkeys(wanted, "output")
    assert seen.unreachable == ()


class ClippedMean(nn.Module):
    """A mean of what a function clips."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.bn(self.conv(x))).mean((2, 3)))


def test_in_front_of_a_rectifier_that_no_hook_reaches():
    assert streams(quantize(ClippedMean())) == [f"bn.{OUTPUT_STREAM}"]


def test_unreachable_sums_are_named():
    with pytest.warns(UserWarning, match="values inside the model itself are reached by no module"):
        quantize(Flat())
    model = nn.Sequential(nn.Linear(8, 8), PreNormBlock(), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="values inside 1 are reached by no module"):
        quantize(model)


def test_a_tuple_s_entry_is_no_place():
    """Found with attention whose output is unpacked: the hook would meet the tuple."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            mixed, _ = self.attention(x, x, x)
            return self.head((x + mixed).mean(1))

    with pytest.warns(UserWarning, match="values inside the model itself"):
        student = quantize(Attention(), 2, 2)
    calibrate(student, [torch.randn(2, 5, 4)])
    assert student(torch.randn(2, 5, 4)).shape == (2, 4)


def test_a_forward_that_cannot_be_traced():
    model, images = DataDependent(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"additions of DataDependent.*cannot be traced.*residual=None"):
        quantize(model, 4, 4)
    student = quantize(model, 4, 4, residual=None)
    calibrate(student, [images])
    assert streams(student) == []
    assert student(images).shape == (2, 4)


def test_residual_bits_and_none():
    assert all(q.bits == 5 for n, q in quantizers_of(quantize(KuangliuNet(), residual=5)) if "_stream" in n)
    assert streams(quantize(KuangliuNet(), residual=None)) == []
    assert streams(quantize(KuangliuNet(), 1, 1)) == []
    assert streams(quantize(KuangliuNet(), 1, 2)) != []


def test_streams_train():
    student, _, _ = watched(KuangliuNet(), torch.randn(4, 3, 8, 8), Plan())
    student.train()(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for name, quantizer in quantizers_of(student):
        for key, parameter in quantizer.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert bool(torch.isfinite(parameter.grad).all())
