"""Under torch.compile: one graph, the same numbers, no recompilation by a switch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.quantizers import METHODS, Quantizer, QuantSpec, build, graph, inductor
from fewbits.quantizers.learned_step import lsq

# torch.compile itself makes an object of torch.autograd.Function when it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")

SPECS = {
    f"{name}-{role}": QuantSpec(name, min(2, max(method.bits)), role)
    for name, method in METHODS.items()
    for role in ("weight", "activation")
} | {"lsq-channel": QuantSpec("lsq", 2, "weight", "channel"), "lsq-1-bit": QuantSpec("lsq", 1, "weight")}

every_kind = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(spec: QuantSpec) -> tuple[Quantizer, Tensor]:
    quantizer = build(spec, 4, 0 if spec.role == "weight" else 1)
    x = torch.randn(4, 4, 3, 5)
    x = x if quantizer.signed else x.relu()
    quantizer.calibrate(x)
    return quantizer, x


def run(function: Callable[[Tensor], Tensor], quantizer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    y = function(x)
    y.backward(g)
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in quantizer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


class Product(nn.Module):
    """An activation and a weight, each with its quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = build(QuantSpec("lsq", 4, "activation"), 16, -1)
        self.weights = build(QuantSpec("lsq", 4, "weight", "channel"), 16, 0)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) @ self.weights(self.weight)


@pytest.mark.slow
def test_sizes_that_are_not_known():
    product = Product()
    compiled = torch.compile(product, dynamic=True)
    for size in (8, 5):
        x = torch.randn(size, 16)
        plain, traced = (run(function, product, x, torch.ones(size, 16)) for function in (product, compiled))
        for name in plain:
            torch.testing.assert_close(traced[name], plain[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_step_for_each_value():
    x, step, grad = torch.randn(3), torch.rand(3) + 0.1, torch.randn(3)

    def taken(function: Callable[..., Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_(), step.clone().requires_grad_()
        return list(torch.autograd.grad(function(*given, -2, 1), given, grad))

    for one, other in zip(taken(lsq), taken(torch.compile(lsq)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_seen_outside_of_the_range_too():
    x, grad = torch.tensor([-9.0, 0.1, 0.2, 9.0]), torch.tensor([float("inf"), 1.0, 1.0, float("nan")])
    quantizer = build(QuantSpec("lsq", 2, "activation"), 4, 0)
    found = run(torch.compile(quantizer), quantizer, x, grad)
    assert found["x"].isnan().tolist() == [True, False, False, True]


class Counter:
    """A backend that compiles nothing and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.num += 1
        return graph.forward


@every_kind
def test_one_graph_with_the_same_numbers(spec: QuantSpec):
    quantizer, x = make(spec)
    g = torch.randn_like(x)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    for enabled in (True, False):
        quantizer.enabled.fill_(enabled)
        plain, traced = run(quantizer, quantizer, x, g), run(compiled, quantizer, x, g)
        assert plain.keys() == traced.keys()
        for name in plain:
            if name in ("y", "x"):
                assert torch.equal(plain[name], traced[name]), name
            else:  # a compiled graph sums a learned parameter's gradient in its own way
                torch.testing.assert_close(plain[name], traced[name], msg=name)


@every_kind
def test_switching_does_not_recompile(spec: QuantSpec):
    quantizer, x = make(spec)
    counter = Counter()
    compiled = torch.compile(quantizer, backend=counter, fullgraph=True)
    on = compiled(x)
    for enabled in (False, True, False, True):
        quantizer.enabled.fill_(enabled)
        assert torch.equal(compiled(x), on if enabled else quantizer.bypass(x))
    quantizer.calibrate(x)
    compiled(x)
    assert counter.num == 1


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if max(METHODS[spec.method].bits) > 1])
def test_new_bits_recompile_at_most_once_per_width(spec: QuantSpec):
    quantizer, x = make(spec)
    counter = Counter()
    compiled = torch.compile(quantizer, backend=counter, fullgraph=True)
    widths = (8, 4, 2, 4, 8, 2)
    for bits in widths:
        quantizer.set_bits(bits)
        assert torch.equal(compiled(x), quantizer(x))
    assert counter.num == len(set(widths))


class Together(nn.Module):
    """One of each kind, so that one compilation covers them all."""

    def __init__(self, quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [quantizer(x) for quantizer, x in zip(self.quantizers, inputs, strict=True)]


KINDS = (
    "lsq-channel",
    "lsq-activation",
    "pact-activation",
    "ewgs-weight",
    "minmax-activation",
    "react-activation",
    "dorefa-weight",
)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    quantizers, inputs = zip(*(make(SPECS[kind]) for kind in KINDS), strict=True)
    grads = [torch.randn_like(x) for x in inputs]
    model = Together(list(quantizers))
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        given = [x.clone().requires_grad_() for x in inputs]
        outputs = function(given)
        torch.autograd.backward(outputs, grads)
        results.append((outputs, given, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_in, plain_learned), (traced, traced_in, traced_learned) = results
    for kind, a, b, a_in, b_in in zip(KINDS, plain, traced, plain_in, traced_in, strict=True):
        assert torch.equal(a, b), kind
        torch.testing.assert_close(a_in.grad, b_in.grad, rtol=1e-6, atol=1e-6, msg=kind)
    for name, grad in plain_learned.items():
        torch.testing.assert_close(grad, traced_learned[name], rtol=1e-5, atol=1e-5, msg=name)


def test_another_version_of_the_loops_is_another_operator():
    """A cache of compiled graphs on disk knows operators by their names."""
    assert all(inductor.DIGEST in str(operator) for operator in (graph.LSQ, graph.LSQ_BACKWARD))
