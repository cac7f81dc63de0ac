"""Quantizing again: the same bits, less kept, and an error where a value changed in between."""

import contextlib
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fewbits.quantizers import METHODS, Quantizer, QuantSpec, build
from fewbits.quantizers.again import QuantizingAgain, _active, keeping_input

every_method = pytest.mark.parametrize("method", METHODS)


def quantizer(method: str, x: Tensor, bits: int = 4, role: str = "activation") -> Quantizer:
    bits = 1 if METHODS[method].bits == (1,) else bits
    made = build(QuantSpec(method, bits, role), x.shape[0 if role == "weight" else 1], 0 if role == "weight" else 1)
    made.calibrate(x)
    return made


class Chain(nn.Module):
    """A stream, and a layer that quantizes what it reads of it; remembers the memory of both."""

    def __init__(self, method: str, x: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.stream, self.inner = quantizer(method, x, 8), quantizer(method, x)
        self.of_weight, self.weight = quantizer(method, weight, 4, "weight"), nn.Parameter(weight.clone())
        self.made: list[StorageWeakRef] = []
        self.is_kept: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        streamed = keeping_input(self.stream, x)
        inner = keeping_input(self.inner, streamed)
        weight = keeping_input(self.of_weight, self.weight)
        self.made = [StorageWeakRef(each.untyped_storage()) for each in (streamed, inner, weight)]
        return F.conv2d(inner, weight, padding=1)


def run(net: Chain, x: Tensor, on: bool) -> list[Tensor]:
    """Output and gradients."""
    net.zero_grad()
    given = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with QuantizingAgain() if on else contextlib.nullcontext():
        y = net(given)
    net.is_kept = [not each.expired() for each in net.made]
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in (given, *net.parameters()) if p.grad is not None)]


@every_method
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_bit_changes_and_nothing_quantized_is_kept(method: str, layout: torch.memory_format):
    x = torch.randn(4, 8, 6, 6).relu().to(memory_format=layout)
    net = Chain(method, x, torch.randn(8, 8, 3, 3))
    expected = run(net, x, on=False)
    assert all(net.is_kept[1:])  # the layer's input and weight; ReActNet reads a shifted copy of its stream
    for given, wanted in zip(run(net, x, on=True), expected, strict=True):
        assert torch.equal(given, wanted)
    # What keeps something else than its input, tanh of it or a shifted copy, would have to keep that as well.
    assert net.is_kept == [False, method == "react", method in ("dorefa", "pact")]


def test_twice_through_one_graph_and_gradients_of_gradients():
    x, weight = torch.rand(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    net, found = Chain("lsq", x, weight), []
    for on in (False, True):
        given = x.clone().requires_grad_()
        with QuantizingAgain() if on else contextlib.nullcontext():
            loss = net(given).square().sum()
        (first,) = torch.autograd.grad(loss, given, retain_graph=True)
        (second,) = torch.autograd.grad(loss, given, create_graph=True)
        third = torch.autograd.grad(second.square().sum(), net.weight)[0]
        found.append((first, second.detach(), third))
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


def test_a_closed_gate_and_mixed_precision():
    x = torch.randn(4, 8, 6, 6).relu()
    net = Chain("lsq", x, torch.randn(8, 8, 3, 3))
    net.stream.enabled.fill_(False)
    for given, wanted in zip(run(net, x, True), run(net, x, False), strict=True):
        assert torch.equal(given, wanted)
    net.stream.enabled.fill_(True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(net, x, False)
        for given, wanted in zip(run(net, x, True), expected, strict=True):
            assert torch.equal(given, wanted)


def test_the_precision_of_the_forward_pass():
    seen = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x * x

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), QuantizingAgain():
        y = keeping_input(Looks(), x) * torch.ones(3, requires_grad=True)
    y.sum().backward()
    assert seen == [True, True]


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_what_a_shortcut_is_added_to_in_place_is_kept():
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    with QuantizingAgain():
        y = keeping_input(Squares(), x).add_(5) * weight
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("through", ["the quantizer", "an operator"])
def test_a_change_behind_the_back_of_autograd_is_an_error(through: str):
    weight, source = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True) * 1
    with QuantizingAgain():
        y = (keeping_input(Squares(), source) if through == "the quantizer" else source) * weight
    source.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(3,\).*inplace operation"):
        y.sum().backward()


def test_an_input_that_its_quantizer_does_not_keep_may_change():
    x = torch.randn(4, 8, 6, 6)
    layer, weight = quantizer("react", x), torch.randn(8, 8, 3, 3, requires_grad=True)
    found = []
    for on in (False, True):
        source = x.clone().requires_grad_() * 1
        with QuantizingAgain() if on else contextlib.nullcontext():
            source += F.conv2d(keeping_input(layer, source), weight, padding=1)  # Bi-Real Net's shortcut
        found.append(torch.autograd.grad(source.square().sum(), weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("what", ["bits", "gate", "range"])
def test_a_quantizer_that_changes_in_between_is_an_error(what: str):
    x = torch.rand(4, 8, 6, 6, requires_grad=True)
    layer, weight = quantizer("pact", x), torch.ones(8, 8, 3, 3, requires_grad=True)
    with QuantizingAgain():
        y = F.conv2d(keeping_input(layer, x), weight)
    with torch.no_grad():
        {"bits": lambda: layer.set_bits(2), "gate": lambda: layer.enabled.fill_(False), "range": layer.alpha.zero_}[
            what
        ]()
    with pytest.raises(RuntimeError, match="--no-recompute"):
        y.sum().backward()


def test_a_quantizer_that_draws_is_kept():
    class Dithers(nn.Module):
        is_repeatable = False

        def forward(self, x: Tensor) -> Tensor:
            return (x * x + torch.rand_like(x)).round()

    x, weight = torch.randn(50, requires_grad=True), torch.ones(50, requires_grad=True)
    with QuantizingAgain():
        y = keeping_input(Dithers(), x)
        (y * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, y)


def test_a_hook_on_all_modules_counts():
    x, weight = torch.rand(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    net = Chain("lsq", x, weight)
    hook = nn.modules.module.register_module_forward_hook(lambda m, _a, y: y * 3 if m is net.inner else None)
    try:
        found = [run(net, x, on) for on in (False, True)]
    finally:
        hook.remove()
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


def test_tensors_without_memory_of_the_usual_kind():
    weight = torch.randn(3, 4, requires_grad=True)
    found = []
    for on in (False, True):
        with QuantizingAgain() if on else contextlib.nullcontext():
            y = torch.sparse.mm(torch.eye(3).to_sparse(), weight)
            z = torch.view_as_complex(weight.view(3, 2, 2)).conj().imag * weight[:, :2]
        found.append(torch.autograd.grad(y.square().sum() + z.sum(), weight)[0])
    assert torch.equal(*found)


def test_the_context_is_left_clean():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), pytest.raises(RuntimeError, match="not here"):
        QuantizingAgain().__enter__()
    with pytest.raises(RuntimeError, match="saved tensor hooks") as error, QuantizingAgain():
        torch.func.grad(torch.sin)(torch.tensor(1.0))
    assert any("--no-recompute" in note for note in error.value.__notes__)
    assert not _active.contexts


def test_views_of_what_was_quantized():
    x = torch.rand(2, 6, 4)
    for weight in (torch.randn(5, 4), torch.randn(5, 8)):
        found = []
        for on in (False, True):
            layer, given, learned = quantizer("lsq", x), x.clone().requires_grad_(), weight.clone().requires_grad_()
            with QuantizingAgain() if on else contextlib.nullcontext():
                y = keeping_input(layer, given)
                y = y.reshape(2, 3, 8) if weight.shape[1] == 8 else y.transpose(0, 1)[1:]
                y = F.linear(y, learned)
            y.square().sum().backward()
            found.append([given.grad, learned.grad, layer.step.grad])
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)


def test_a_hook_sees_a_quantizer_once_and_its_word_counts():
    x, seen = torch.rand(4, 8, 6, 6), []
    net = Chain("lsq", x, torch.randn(8, 8, 3, 3))
    net.inner.register_forward_hook(lambda _m, _a, y: seen.append(y.shape))
    net.stream.register_forward_hook(lambda _m, _a, y: y * 3)
    found = [run(net, x, on) for on in (False, True)]
    assert len(seen) == 2
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


def test_checkpointed_blocks_still_keep_their_input_alone():
    x = torch.rand(4, 8, 6, 6)
    net = Chain("lsq", x, torch.randn(8, 8, 3, 3))
    held: list[StorageWeakRef] = []

    def block(given: Tensor) -> Tensor:
        inner = given * 2
        held.append(StorageWeakRef(inner.untyped_storage()))
        return net(inner)

    found = []
    for on in (False, True):
        net.zero_grad()
        with QuantizingAgain() if on else contextlib.nullcontext():
            y = checkpoint(block, x.requires_grad_(), use_reentrant=False)
            gc.collect()
            assert held[-1].expired()
        y.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


def test_nothing_is_remembered_without_gradients():
    x = torch.rand(4, 8, 6, 6)
    net = Chain("lsq", x, torch.randn(8, 8, 3, 3))
    with QuantizingAgain() as again:
        with torch.no_grad():
            net(x)
        assert not again._made
        y = net(x)
        del y
    assert not again._made
