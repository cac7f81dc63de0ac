"""Conversion and calibration: what is replaced, what stays, and that nothing else changes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits import data, models
from fewbits.calibration import calibrate
from fewbits.convert import (
    Plan,
    Rule,
    float_state,
    plan_of,
    quantize,
    quantizer_keys,
    quantizers_of,
)
from fewbits.data.split import TensorSplit
from fewbits.layers import QuantConv2d, QuantLayer, QuantLinear
from fewbits.precision import Precision, set_precision
from fewbits.quantizers import METHODS

# torch.compile itself makes an object of torch.autograd.Function when it traces one.
FUNCTION_OBJECTS = "ignore:.*should not be instantiated:DeprecationWarning"


@pytest.fixture(autouse=True)
def coarse_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start matters to one test only, and the search for it takes most of the time."""
    if "shared_data" not in request.fixturenames:
        monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn(self.conv(x)))


def network() -> nn.Module:
    """Four layers, "0", "3.conv", "4.conv" and "7", and two additions."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return model.eval()


def chain() -> nn.Module:
    """The same without additions, so that binary methods and PACT fit as well."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(num: int = 4) -> Tensor:
    return torch.randn(num, 3, 8, 8)


def bits_of(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """Weight and activation bits of every layer, float ones included."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            quantizers = (module.weight_quantizer, module.input_quantizer)
            found[name] = tuple(None if q is None else q.bits for q in quantizers)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            found[name] = (None, None)
    return found


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# What is converted


def test_the_original_is_untouched():
    model, x = network(), images()
    before, wanted, modules = copy.deepcopy(model.state_dict()), model(x), [type(m) for m in model.modules()]
    student = quantize(model, 2, 2)
    calibrate(student, [x])
    student.train()
    torch.optim.SGD(student.parameters(), 0.1).zero_grad()
    student(x).sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert same_state(model.state_dict(), before)
    assert torch.equal(model(x), wanted)
    assert [type(m) for m in model.modules()] == modules
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert plan_of(model) is None


def test_bits_of_layers_and_ends():
    assert bits_of(quantize(network(), 2, 3)) == {"0": (8, 8), "3.conv": (2, 3), "4.conv": (2, 3), "7": (8, 8)}
    assert bits_of(quantize(network(), 2, 3, ends=4))["0"] == (4, 4)
    assert bits_of(quantize(network(), 2, 3, ends=32))["7"] == (None, None)
    assert bits_of(quantize(network(), 2, 3, ends="paper"))["0"] == (8, 8)
    for method in ("dorefa", "ewgs", "minmax"):
        student = quantize(network(), 2, 2, quantizer=method, ends="paper")
        assert bits_of(student)["0"] == (None, None) == bits_of(student)["7"]
        student = quantize(network(), 2, 2, quantizer=method)
        assert {q.spec.method for n, q in quantizers_of(student) if n.startswith(("0.", "7."))} == {"lsq"}


def test_full_precision_on_one_side():
    assert set(bits_of(quantize(network(), 2, 32)).values()) == {(8, None), (2, None)}
    assert set(bits_of(quantize(network(), 32, 3)).values()) == {(None, 8), (None, 3)}


def test_granularity_is_for_weights():
    student = quantize(network(), granularity="channel")
    assert student[3].conv.weight_quantizer.step.shape == (8,)
    assert student[3].conv.input_quantizer.step.shape == ()


class Backwards(nn.Module):
    """Registered in another order than it runs, with a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.middle = nn.Conv2d(8, 8, 1)
        self.stem = nn.Conv2d(3, 8, 1)
        self.unused = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x).relu()).relu().mean((2, 3)))


def test_first_and_last_by_order_of_execution():
    """Found: a layer that never runs counted as the last one, and the classifier got the body's bits."""
    bits = bits_of(quantize(Backwards(), 2, 2))
    assert bits == {"head": (8, 8), "middle": (2, 2), "stem": (8, 8), "unused": (2, 2)}


def test_subclasses_are_left_alone():
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    student = quantize(model)
    assert type(student[2]) is Standardized
    assert type(student[4]) is QuantConv2d
    with pytest.raises(ValueError, match="subclasses of them are left alone"):
        quantize(nn.Sequential(Standardized(3, 8, 3)))


def test_attention_keeps_its_hidden_layers():
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(self.middle(self.attention(x, x, x)[0]).relu().mean(1))

    model, x = Attentive().eval(), torch.randn(2, 5, 4)
    student = quantize(model, 2, 2, residual=None)
    assert not isinstance(student.attention.out_proj, QuantLayer)
    assert not any(name.startswith("attention") for name, _ in quantizers_of(student))
    calibrate(student, [x])
    set_precision(student, Precision(weights=False, activations=False))
    torch.testing.assert_close(student(x), model(x))


def test_a_transformer_layer_runs_its_quantized_layers_in_every_mode():
    """Found: in eval mode without gradients PyTorch read the float weights past the quantizers."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(x)).mean(1))

    x = torch.randn(2, 5, 4)
    student = quantize(Encoder(), 2, 2, residual=None).eval()
    assert bits_of(student)["layer.linear1"] == (2, 2)
    calibrate(student, [x])
    with torch.no_grad():
        without_gradients = student(x)
    torch.testing.assert_close(without_gradients, student(x))


def test_shared_modules_stay_shared():
    middle = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.ReLU(), middle, nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)
    )
    student = quantize(model, 2, 2)
    assert student[2] is student[4]
    assert isinstance(student[2], QuantConv2d)
    assert len(list(quantizers_of(student))) == 6
    assert calibrate(student, [images()]) == 6
    assert student(images()).shape == (4, 2)


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", stride=1, bias=False),
    ],
    ids=["groups", "depthwise", "dilation", "circular", "reflect"],
)
def test_options_of_layers_are_kept(middle: nn.Conv2d):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 2, 1)), images()
    student = quantize(model, 8, 8)
    calibrate(student, [x])
    assert isinstance(student[2], QuantConv2d)
    for option in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(student[2], option) == getattr(middle, option)
    wanted = model(x)
    assert (student(x) - wanted).abs().max() < 0.2 * wanted.abs().max()  # eight bits, four candidates: coarse but near


# Patterns


def test_keep():
    assert bits_of(quantize(network(), 2, 2, keep=["3"]))["3.conv"] == (None, None)
    assert bits_of(quantize(network(), 2, 2, keep=["*.conv"]))["4.conv"] == (None, None)
    assert bits_of(quantize(network(), 2, 2, keep="3.conv")) == {  # one pattern, not six letters
        "0": (8, 8),
        "3.conv": (None, None),
        "4.conv": (2, 2),
        "7": (8, 8),
    }


def test_rules_win_over_ends_and_the_first_one_counts():
    rules = [Rule("0", weights=4), Rule("4", weights=32, activations=32), Rule("*", weights=3, quantizer="dorefa")]
    student = quantize(network(), 2, 5, rules=rules)
    assert bits_of(student) == {"0": (4, 5), "3.conv": (3, 5), "4.conv": (None, None), "7": (3, 5)}
    assert student[3].conv.weight_quantizer.spec.method == "dorefa"


@pytest.mark.parametrize("argument", ["keep", "rules"])
def test_a_pattern_without_a_match_lists_close_names(argument: str):
    patterns: Any = ["4.conf"] if argument == "keep" else [Rule("4.conf", 2)]
    with pytest.raises(ValueError, match=rf"{argument} pattern '4.conf' matches no layer; layers are .*4\.conv"):
        quantize(network(), **{argument: patterns})


# Bad input


@pytest.mark.parametrize("name", ["weights", "activations"])
@pytest.mark.parametrize("bits", [0, 9, -1, 16, 31])
def test_bits_out_of_range(name: str, bits: int):
    with pytest.raises(ValueError, match=f"{name} must be between 1 and 8, got {bits}"):
        quantize(network(), **{name: bits})


@pytest.mark.parametrize("name", ["weights", "activations", "ends", "residual"])
@pytest.mark.parametrize("bits", ["four", True, 2.0])
def test_bits_of_another_kind(name: str, bits: Any):
    with pytest.raises(TypeError, match=f"{name} must be a whole number from 1 to 8, got {bits!r}"):
        quantize(network(), **{name: bits})


@pytest.mark.parametrize("bits", [0, 9, 32])
def test_residual_out_of_range(bits: int):
    with pytest.raises(ValueError, match=f"residual must be between 1 and 8, got {bits}"):
        quantize(network(), residual=bits)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=r"quantizer must be one of lsq, .*, got 'lqs'"):
        quantize(network(), quantizer="lqs")
    with pytest.raises(ValueError, match=r"method must be one of lsq, .*, got 'lqs'"):
        quantize(network(), rules=[Rule("3", quantizer="lqs")])
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        quantize(network(), rules=[Rule("3", weights=9)])
    with pytest.raises(ValueError, match="method 'sign' works on 1 bit, got bits=2"):
        quantize(network(), 2, 2, quantizer="sign")
    with pytest.raises(ValueError, match="granularity must be one of tensor, channel, got 'row'"):
        quantize(network(), granularity="row")  # type: ignore[arg-type]


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"Sequential has no nn.Conv2d and no nn.Linear"):
        quantize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))


def test_quantized_already():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(network()))


# States


def test_a_float_state_loads_strictly_and_comes_back():
    student, other = quantize(network(), 2, 2), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    student.load_state_dict(other.state_dict())
    assert same_state(float_state(student), other.state_dict())
    assert quantizer_keys(student) & float_state(student).keys() == set()
    fresh = network()
    fresh.load_state_dict(float_state(student))
    assert same_state(fresh.state_dict(), other.state_dict())


def test_a_float_state_that_lacks_a_weight_is_an_error():
    state = network().state_dict()
    del state["3.conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.conv\.weight"):
        quantize(network()).load_state_dict(state)


def test_a_state_with_only_some_quantizer_keys_is_an_error():
    student = quantize(network())
    state = student.state_dict()
    del state["3.conv.input_quantizer.step"]
    with pytest.raises(RuntimeError, match=r"3\.conv\.input_quantizer\.step"):
        quantize(network()).load_state_dict(state)
    only = {key: value for key, value in student.state_dict().items() if not key.startswith("3.conv.weight_q")}
    with pytest.raises(RuntimeError, match=r"3\.conv\.weight_quantizer"):
        quantize(network()).load_state_dict(only)


def test_the_quantized_state_makes_the_same_network(tmp_path: Path):
    """With zero points and the fact that it was calibrated; through a file without pickle."""
    model, x = network(), images()
    student = quantize(model, 2, 2)
    calibrate(student, [x])
    set_precision(student, Precision(weights=True, activations=False))
    assert float(student[0].input_quantizer.zero_point) > 0
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    other = quantize(network(), 2, 2).eval()
    other.load_state_dict(load_file(tmp_path / "student.safetensors"))
    assert same_state(other.state_dict(), student.state_dict())
    assert torch.equal(other(x), student(x))
    assert calibrate(other, [images()]) == 0


def test_copies_are_equal_and_independent():
    student, x = quantize(network(), 2, 2), images()
    calibrate(student, [x])
    twin = copy.deepcopy(student)
    wanted = student(x)
    assert torch.equal(twin(x), wanted)
    assert plan_of(twin) == plan_of(student) == Plan(2, 2)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    assert torch.equal(student(x), wanted)
    twin.load_state_dict(network().state_dict())  # the hook of float states is copied too


@pytest.mark.filterwarnings(FUNCTION_OBJECTS)
def test_one_compiled_graph_with_stream_hooks():
    torch._dynamo.reset()
    student, x = quantize(network(), 2, 2), images()
    calibrate(student, [x])
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), student(x))
    student.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    torch._dynamo.reset()


# Calibration


def test_calibration_sets_everything_once():
    student, x = quantize(network(), 2, 2), images()
    num = len(list(quantizers_of(student)))
    assert num == 2 * 4 + 1 + 2 * 2  # layers, the stem's ReLU, and what enters and leaves the additions
    assert not any(bool(q.calibrated) for _, q in quantizers_of(student))
    assert calibrate(student, [x]) == num
    assert all(bool(q.calibrated) for _, q in quantizers_of(student))
    before = copy.deepcopy(student.state_dict())
    assert calibrate(student, [10 * x]) == 0
    assert same_state(student.state_dict(), before)
    assert calibrate(student, [10 * x], again=True) == num
    step = student[0].input_quantizer.step.item()
    assert step == pytest.approx(10 * before["0.input_quantizer.step"].item())


def test_weights_and_statistics_stay():
    model = network()
    student = quantize(model, 2, 2)
    calibrate(student.train(), [images()])
    assert same_state(float_state(student), model.state_dict())


def test_at_most_256_images_are_looked_at():
    student, seen = quantize(chain(), 2, 2), []
    student[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calibrate(student, (images(100) for _ in range(1000)))
    assert seen == [100, 100, 56]


@pytest.mark.parametrize("method", METHODS)
def test_mode_gates_and_gradients_are_restored(method: str):
    bits = max(METHODS[method].bits[:2])
    student = quantize(chain(), bits, bits, quantizer=method, residual=None)
    set_precision(student, Precision(weights=True, activations=False))
    student.train()
    student[0].eval()
    student[2].weight.requires_grad_(False)

    def state() -> list[Any]:
        gates = [bool(q.enabled) for _, q in quantizers_of(student)]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
        return [gates, [m.training for m in student.modules()], [p.requires_grad for p in student.parameters()], hooks]

    before = state()
    with pytest.raises(ValueError, match="NaN"):
        calibrate(student, [images(), torch.full((2, 3, 8, 8), torch.nan)])
    assert state() == before
    with pytest.raises(RuntimeError):
        calibrate(student, [torch.randn(2, 5, 8, 8)])
    assert state() == before
    calibrate(student, [images()])
    assert state() == before


def test_batches_that_hold_nothing():
    for batches in ([], iter([]), [images(0)]):
        with pytest.raises(ValueError, match="batches holds no image"):
            calibrate(quantize(network()), batches)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite(value: float):
    bad = images()
    bad[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        calibrate(quantize(network()), [bad])


def test_batches_of_another_kind():
    """Found: one tensor was read as a batch of batches, row by row."""
    with pytest.raises(TypeError, match=r"pass \[images\]"):
        calibrate(quantize(network()), images())
    with pytest.raises(TypeError, match="got tuple; leave labels out"):
        calibrate(quantize(network()), [(images(), torch.zeros(4))])  # type: ignore[list-item]


def test_a_layer_that_never_runs_is_named():
    student = quantize(Backwards(), 2, 2)
    with pytest.raises(ValueError, match=r"layer unused.*never ran.*keep="):
        calibrate(student, [images()])
    kept = quantize(Backwards(), 2, 2, keep=["unused"])
    calibrate(kept, [images()])


def test_pact_on_signed_input_names_the_layer():
    """DoReFa and PACT represent values from 0 up; the residual default and 8-bit ends spare them the image itself."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    for method in ("pact", "dorefa"):
        with pytest.raises(ValueError, match=r"layer 1\.input_quantizer: .*use method lsq or ewgs.*ReLU"):
            calibrate(quantize(model, 4, 4, quantizer=method), [images()])


def test_a_range_that_is_not_known_yet_does_not_clip_what_comes_behind():
    """Found: PACT off clips at its start of 8, so that layers behind it were calibrated on clipped values."""
    model, x = chain(), images()
    with torch.no_grad():
        model[0].weight.mul_(1000)
    for quantizer in ("pact", "lsq"):
        student = quantize(model, 4, 4, quantizer=quantizer)
        calibrate(student, [x])
        wanted = model[:6](x).max()
        reach = student[6].input_quantizer.encode(model[:6](x)).decode().max()
        assert reach > 0.5 * wanted


@pytest.mark.parametrize("method", [method for method in METHODS if method not in {"dorefa", "pact"}])
@pytest.mark.parametrize("residual", [8, None])
def test_closed_gates_give_the_float_network(method: str, residual: int | None):
    """Bit for bit, except where "off" clips: DoReFa and PACT, see the next test."""
    model, x = network(), images()
    bits = max(METHODS[method].bits[:2])
    student = quantize(model, bits, bits, quantizer=method, residual=residual).eval()
    calibrate(student, [x])
    set_precision(student, Precision(weights=False, activations=False))
    assert torch.equal(student(x), model(x))


@pytest.mark.parametrize(("method", "top"), [("dorefa", 1.0), ("pact", None)])
def test_closed_gates_that_clip(method: str, top: float | None):
    model, x = chain(), 5 * images()
    student = quantize(model, 4, 4, quantizer=method)
    calibrate(student, [x])
    set_precision(student, Precision(weights=False, activations=False))
    top = student[2].input_quantizer.alpha.item() if top is None else top
    assert model[:2](x).max().item() > top
    assert torch.equal(student(x), model[2:](model[:2](x).clamp(max=top)))


def output_error(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((student.eval()(x) - teacher(x)).square().mean())


def test_the_least_squares_start_beats_the_paper_s_on_a_trained_network(shared_data: Path):
    """At 2 bits nothing is left of an untrained student's logits either way; at 4 bits the difference is plain."""
    found = models.pretrained("resnet20", "cifar10")
    if found is None:
        pytest.skip("no pretrained ResNet-20")
    weights, normalisation = found
    teacher = models.build("resnet20", num_classes=10)
    models.load_into(teacher, weights, what="the test")
    split = data.load("cifar10").train
    assert isinstance(split, TensorSplit)
    x = normalisation.apply(split.images[:32] / 255)
    for bits, factor in ((2, 1.0), (4, 0.5)):
        errors = {}
        for start in ("data", "paper"):
            student = quantize(teacher.eval(), plan=Plan(bits, bits, start=start))
            calibrate(student, [x])
            errors[start] = output_error(student, teacher, x)
        assert errors["data"] < factor * errors["paper"], (bits, errors)


def test_plans_are_values():
    assert Plan.of(1, 1) == Plan(1, 1, "sign", residual=None)
    assert Plan.of(2, 2) == Plan(2, 2) == Plan(2, 2, "lsq", residual=8)
    assert Plan.of(1, 2).quantizer == "lsq"
    assert Plan.of(1, 1, "lsq", residual=8) == Plan(1, 1, residual=8)
    assert hash(Plan(2, 2, rules=(Rule("a", 3),))) == hash(Plan(2, 2, rules=(Rule("a", 3),)))


def test_a_linear_layer_without_a_stage_is_its_own_first_and_last():
    student = quantize(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 2, 2)
    assert isinstance(student[1], QuantLinear)
    assert bits_of(student) == {"1": (8, 8)}


MAKERS: dict[str, Callable[[], nn.Module]] = {"network": network, "chain": chain}


@pytest.mark.parametrize("name", MAKERS)
def test_calibration_does_not_depend_on_how_images_are_batched(name: str):
    model, x = MAKERS[name](), images(8)
    whole, halves = quantize(model, 3, 3), quantize(model, 3, 3)
    calibrate(whole, [x])
    calibrate(halves, [x[:4], x[4:]])
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[key], value, rtol=1e-4, atol=1e-6)
