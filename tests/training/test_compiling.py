"""The compiled objective against the same network step by step: numbers, gates, and what is kept in between."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.quantizers import Quantizer
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
