"""The compiled objective against the same network step by step: numbers, gates, and what is kept in between."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.quantizers import Quantizer, integer_products
from fewbits.quantizers.gates import promised_open
from fewbits.quantizers.learned_step import lsq
from fewbits.training.compiling import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """Two convolutions and a shortcut: streams, layers' inputs and weights, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.first, self.last = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.last(self.norm(self.conv(x)) + x).mean((2, 3)))


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    student = fb.quantize(Small(), 4, 4)
    images = torch.randn(4, 3, 8, 8)
    fb.calibrate(student, [images])
    return student, images


def taken(run: nn.Module, student: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    student.zero_grad()
    logits = run(images)
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_same_numbers_with_gates_open_and_closed():
    student, images = made()
    student.eval()  # batch norm's sums differ by their order, and codes with them
    run = compiled(student)
    for is_open in (True, False):
        for module in student.modules():
            if isinstance(module, Quantizer):
                module.enabled.fill_(is_open)
        (logits, grads), (fast, fast_grads) = taken(student, student, images), taken(run, student, images)
        torch.testing.assert_close(fast, logits, rtol=1e-4, atol=1e-4)
        assert grads.keys() == fast_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(fast_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_what_was_quantized_is_not_kept():
    """A convolution's quantized input is made again; what is kept beside the float network's are streams before it."""
    student, images = made()
    kept = {}
    for name, run in (("plainly", torch.compile(student)), ("ours", compiled(student))):
        saved = run(images).grad_fn.saved_tensors  # type: ignore[union-attr]
        kept[name] = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        torch._dynamo.reset()
    assert kept["ours"] < 0.7 * kept["plainly"]


def test_bfloat16_is_the_same_network():
    student, images = made()
    run, logits = compiled(student), {}
    with torch.autocast("cpu", torch.bfloat16):
        for name, network in (("eager", student.eval()), ("compiled", run)):
            logits[name] = network(images).float()
    # Where bf16 rounds differs; predictions are those of one network.
    assert (logits["eager"] - logits["compiled"]).abs().mean() < 0.1 * logits["eager"].std()


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that products of whole numbers took."""
    if not integer_products.is_available():
        pytest.skip("this processor does not multiply bytes")
    shapes: list[torch.Size] = []

    def counted(way: Callable[..., Tensor], codes: Tensor, *given: object) -> Tensor:
        shapes.append(codes.shape)
        return way(codes, *given)

    for name in ("_convolve", "_multiply"):
        monkeypatch.setattr(integer_products, name, partial(counted, getattr(integer_products, name)))
    return shapes


def in_channels_last(student: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    return student.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)


def test_whole_numbers_where_gates_stay_open(multiplied):
    student, images = in_channels_last(*made())
    student.eval()
    run = compiled(student)
    (logits, grads), (fast, fast_grads) = taken(student, student, images), taken(run, student, images)
    assert not multiplied
    with promised_open(student):
        whole, whole_grads = taken(run, student, images)
    assert len(multiplied) == 2
    for found, gradients in ((fast, fast_grads), (whole, whole_grads)):
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        for name, grad in grads.items():
            torch.testing.assert_close(gradients[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_gates_count_again_without_the_promise(multiplied):
    student, images = in_channels_last(*made())
    run = compiled(student.eval())
    with promised_open(student):
        run(images)
    multiplied.clear()
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.enabled.fill_(False)
    torch.testing.assert_close(run(images), student(images), rtol=1e-4, atol=1e-4)
    assert not multiplied


class Wide(nn.Module):
    """Codes that are no bytes."""

    def __init__(self, high: int, weight_low: int, weight_high: int) -> None:
        super().__init__()
        self.bounds, self.weight_bounds = (0, high), (weight_low, weight_high)
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.step, self.weight_step = nn.Parameter(torch.tensor(0.01)), nn.Parameter(torch.tensor(0.02))

    def forward(self, x: Tensor) -> Tensor:
        weight = lsq(self.weight, self.weight_step, *self.weight_bounds)
        return nn.functional.conv2d(lsq(x, self.step, *self.bounds), weight)


@pytest.mark.parametrize(
    ("bounds", "are_whole"),
    [((255, -128, 127), True), ((256, -8, 7), False), ((15, -129, 100), False), ((15, -8, 128), False)],
)
def test_what_is_no_byte_stays_float(multiplied, bounds, are_whole):
    torch.manual_seed(0)
    network, images = in_channels_last(Wide(*bounds), 4 * torch.rand(2, 4, 6, 6))
    (wanted, _), (found, _) = taken(network, network, images), taken(compiled(network), network, images)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert bool(multiplied) == are_whole


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norms = nn.Conv2d(3, 16, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(torch.relu(norm(x)))
        return x


def kept(run: nn.Module, images: Tensor) -> int:
    """Bytes between forward and backward, parameters without their shares."""
    saved = run(images).grad_fn.saved_tensors  # type: ignore[union-attr]
    places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(places.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_between_norms_and_convolutions_nothing_is_kept(precision):
    """Less than the float network keeps: what a norm gives is made again of what the norm keeps anyway."""
    torch.manual_seed(0)
    network, images = in_channels_last(Block(), torch.randn(16, 3, 32, 32))
    student = fb.quantize(network, 4, 4, residual=None)
    fb.calibrate(student, [images])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        sizes = [kept(run, images) for run in (torch.compile(network), compiled(student))]
    assert sizes[1] < 0.7 * sizes[0]


def test_half_precision_is_kept_on_request():
    torch.manual_seed(0)
    network, images = in_channels_last(Block(), torch.randn(16, 3, 32, 32))
    student = fb.quantize(network, 4, 4, residual=None)
    fb.calibrate(student, [images])
    sizes = []
    for recompute in (True, False):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            sizes.append(kept(compiled(student, recompute=recompute), images))
    assert sizes[0] < 0.8 * sizes[1]


def test_values_that_are_no_numbers_are_seen(multiplied):
    student, images = in_channels_last(*made())
    images[0, 0, 0, 0] = float("nan")
    run = compiled(student)
    with promised_open(student):
        _, grads = taken(run, student, images)
    assert multiplied
    assert any(not grad.isfinite().all() for grad in grads.values())


class Attending(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.second(nn.functional.gelu(self.first(self.norm(x))))).mean(1))


def test_matrices_of_whole_numbers(multiplied):
    torch.manual_seed(0)
    student, tokens = fb.quantize(Attending(), 4, 4, residual=None), torch.randn(8, 20, 16)
    fb.calibrate(student, [tokens])
    run = compiled(student)
    logits, grads = taken(student, student, tokens)
    with promised_open(student):
        fast, fast_grads = taken(run, student, tokens)
    assert multiplied == [(160, 16), (160, 32)]  # the head's eight rows are not worth it
    torch.testing.assert_close(fast, logits, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(fast_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_frozen_layer_cannot_hide_what_is_no_number(multiplied):
    """Bytes hold no NaN: only where a step's gradient shows one are there bytes."""
    student, images = in_channels_last(*made())
    student.stem.requires_grad_(False)
    images[0, 0, 0, 0] = float("nan")
    with promised_open(student):
        logits, _ = taken(compiled(student), student, images)
    assert multiplied == [(4, 8, 8, 8)]  # the second convolution's
    assert not logits.isfinite().all()


def test_a_map_that_is_too_narrow(multiplied):
    student, images = in_channels_last(*made())
    student.conv.stride = (2, 2)
    student.last = nn.Identity()
    student.forward = lambda x: student.head(student.conv(student.first(student.stem(x))).mean((2, 3)))  # type: ignore[method-assign]
    tall = images.repeat(1, 1, 4, 1)[..., :2].contiguous(memory_format=torch.channels_last)
    with promised_open(student):
        whole, _ = taken(compiled(student), student, tall)
    assert not multiplied
    torch.testing.assert_close(whole, student(tall), rtol=1e-4, atol=1e-4)
