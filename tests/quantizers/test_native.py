"""``kernels.cpp`` against PyTorch's operators: the same bits; and what happens where it cannot be had."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.quantizers import QuantSpec, build, library, native
from fewbits.quantizers.learned_step import lsq
from fewbits.quantizers.rounding import sign_polynomial, sign_ste
from fewbits.quantizers.sums import BLOCK, halved_sum

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.reason() or "there is one")
SHAPES = [(1,), (5, 7), (2, 3, 8, 8), (3, 5, 7, 3), (BLOCK,), (2 * BLOCK + 1,), (64, 16, 32, 33)]
LAYOUTS = ["contiguous", "channels-last", "strided", "expanded gradient", "transposed"]


@pytest.fixture(autouse=True)
def forget_what_was_loaded() -> Iterator[None]:
    yield
    library.load.cache_clear()


def inputs(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor]:
    """Values with ties, bounds, zeros of both signs and far ones among them; a gradient."""
    torch.manual_seed(len(shape))
    x, grad = 2 * torch.randn(shape), torch.randn(shape)
    flat = x.view(-1)
    flat[::3] = (flat[::3] / 0.15).round() * 0.15
    for place, value in enumerate((0.0, -0.0, 1.0, -1.0, 1e6, -1e6, 1e-30)):
        flat[1 + place :: 17] = value
    if layout == "channels-last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last), grad.contiguous()
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2], grad
    if layout == "expanded gradient":
        return x, torch.ones(()).expand(shape)
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1), grad
    return x, grad


def passed(function: Callable[..., Tensor], x: Tensor, grad: Tensor, *learned: Tensor) -> list[Tensor]:
    """Value and gradients."""
    x = x.detach().requires_grad_()
    learned = tuple(value.detach().clone().requires_grad_() for value in learned)
    y = function(x, *learned)
    return [y.detach(), *torch.autograd.grad(y, (x, *learned), grad)]


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """In one pass, and by PyTorch's operators."""
    assert native.is_available()
    fast = run()
    with monkeypatch.context() as patch:
        patch.setattr(native, "serves", lambda *tensors: False)
        return fast, run()


def assert_same_bits(fast: list[Tensor], slow: list[Tensor]) -> None:
    for given, wanted in zip(fast, slow, strict=True):
        assert torch.equal(given, wanted)
        assert given.stride() == wanted.stride() or given.numel() == 1


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("low", "high"), [(0, 15), (-8, 7), (-127, 127), (-3, 0), (torch.tensor(-3.0), torch.tensor(12.0))]
)
def test_lsq_has_the_same_bits(
    shape: tuple[int, ...], layout: str, low: Any, high: Any, monkeypatch: pytest.MonkeyPatch
):
    x, grad = inputs(shape, layout)
    fast, slow = both(monkeypatch, lambda: passed(lambda v, s: lsq(v, s, low, high, 0.01), x, grad, torch.tensor(0.3)))
    assert_same_bits(fast, slow)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (5, 600), (2, 3, 40, 40)])
def test_a_step_for_each_channel(shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch):
    x, grad = inputs(shape, layout)
    step = (torch.rand(shape[0]) + 0.1).view(-1, *[1] * (len(shape) - 1))
    fast, slow = both(monkeypatch, lambda: passed(lambda v, s: lsq(v, s, -8, 7, 0.01), x, grad, step))
    assert_same_bits(fast, slow)


@needs_native
@pytest.mark.parametrize("step", [1e-9, 1e-8, -1.0, 0.0, float("nan")])
@pytest.mark.parametrize("sense", [1.0, -1.0])
def test_a_step_at_its_floor(step: float, sense: float, monkeypatch: pytest.MonkeyPatch):
    x, grad = inputs((2, 3, 8, 8), "contiguous")
    run = lambda: passed(lambda v, s: lsq(v, s, 0, 15, 0.01), x, sense * grad, torch.tensor(step))  # noqa: E731
    for given, wanted in zip(*both(monkeypatch, run), strict=True):
        assert torch.equal(given.nan_to_num(7.0), wanted.nan_to_num(7.0))


@needs_native
def test_what_is_not_finite(monkeypatch: pytest.MonkeyPatch):
    x, grad = inputs((4, 9), "contiguous")
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    run = lambda: passed(lambda v, s: lsq(v, s, -8, 7), x, grad, torch.tensor(0.3))  # noqa: E731
    fast, slow = both(monkeypatch, run)
    assert torch.isnan(fast[0].view(-1)[0])
    for given, wanted in zip(fast, slow, strict=True):
        assert torch.equal(given.nan_to_num(7.0), wanted.nan_to_num(7.0))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "function",
    [sign_ste, lambda x: sign_ste(x, strict=True), lambda x: sign_ste(x, clip=float("inf")), sign_polynomial],
    ids=["within", "below", "everywhere", "tent"],
)
def test_signs_have_the_same_bits(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
):
    x, grad = inputs(shape, layout)
    assert_same_bits(*both(monkeypatch, lambda: passed(function, x, grad)))


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int):
    x, grad = inputs((16, 16, 32, 33), "contiguous")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = passed(lambda v, s: lsq(v, s, 0, 15, 0.01), x, grad, torch.tensor(0.3))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found, passed(lambda v, s: lsq(v, s, 0, 15, 0.01), x, grad, torch.tensor(0.3)))


@needs_native
def test_bfloat16_is_computed_in_float32():
    x, grad = (tensor.bfloat16() for tensor in inputs((2, 3, 8, 8), "contiguous"))
    step = torch.tensor(0.3)
    y = native.lsq(x, step, 0, 15)
    assert y.dtype == torch.float32
    assert torch.equal(y, native.lsq(x.float(), step, 0, 15))
    grad_x, grad_step = native.lsq_backward(x, grad, step, 0, 15, 0.5)
    wide_x, wide_step = native.lsq_backward(x.float(), grad.float(), step, 0, 15, 0.5)
    assert torch.equal(grad_x, wide_x.bfloat16())
    assert torch.equal(grad_step, wide_step)


@needs_native
def test_bfloat16_rounds_as_pytorch_does():
    grad = torch.cat([torch.randn(5000), torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40])])
    given, _ = native.lsq_backward(torch.zeros(len(grad)).bfloat16(), grad, torch.tensor(1.0), 0, 1, 1.0)
    assert torch.equal(given.nan_to_num(7.0), grad.bfloat16().nan_to_num(7.0))


@needs_native
def test_others_are_left_to_pytorch():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert not native.serves(torch.ones(3))
    assert not native.serves(torch.ones(3, dtype=torch.float64))
    assert not native.serves(torch.ones(3, device="meta"))
    assert not native.serves(torch.ones(3), torch.ones(3, dtype=torch.bfloat16))
    assert not native.serves(torch._neg_view(torch.ones(3)))
    assert native.serves(torch.ones(3), torch.nn.Parameter(torch.ones(3)))
    assert native.serves(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))


@needs_native
def test_a_trace_by_dispatch_sees_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(3, 4)
    traced = make_fx(lambda v: lsq(v, torch.tensor(0.3), -2, 1))(x)
    assert torch.equal(traced(2 * x), lsq(2 * x, torch.tensor(0.3), -2, 1))


@needs_native
def test_a_trace_before_dispatch_sees_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(3, 4)
    traced = make_fx(lambda v: lsq(v, torch.tensor(0.3), -2, 1), pre_dispatch=True)(x)
    assert torch.equal(traced(2 * x), lsq(2 * x, torch.tensor(0.3), -2, 1))


@needs_native
@pytest.mark.parametrize("function", [lambda x, s: lsq(x, s, -2, 3), lambda x, s: sign_ste(x) * s], ids=["lsq", "sign"])
def test_many_gradients_at_once(function: Callable[[Tensor, Tensor], Tensor]):
    x, step = torch.randn(4, 5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    y, grads = function(x, step), torch.randn(3, 4, 5)
    found = torch.autograd.grad(y, (x, step), grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, (x, step), grad, retain_graph=True) for grad in grads]
    for one, others in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others))


def test_the_gradient_s_gradient_of_a_step_alone():
    """In tensors large enough for tiles, of which a graph cannot be made."""
    x, step = torch.randn(2, 3, 300, 300), torch.tensor(0.3, requires_grad=True)
    y = lsq(x, step, -2, 3)
    grad = torch.ones_like(y, requires_grad=True)
    (of_step,) = torch.autograd.grad(y, step, grad, create_graph=True)
    (again,) = torch.autograd.grad(of_step, grad)
    assert again.shape == x.shape


@needs_native
@pytest.mark.parametrize(
    ("shape", "step_shape"),
    [
        ((4, 4), (4,)),
        ((3,), (3, 1)),
        ((), (1,)),
        ((4,), (1, 1)),
        ((0, 3), (0, 1)),
        ((0, 3), ()),
        ((4, 4), (1, 4)),
        ((2, 3), (1, 1)),
    ],
)
def test_a_step_broadcasts_as_anywhere(
    shape: tuple[int, ...], step_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    x, step = torch.randn(shape), torch.rand(step_shape) + 0.1
    grad = torch.randn(torch.broadcast_shapes(shape, step_shape))
    y = lsq(x, step, -2, 3)
    assert torch.equal(y, (x / step).round().clamp(-2, 3) * step)
    if y.shape == x.shape:
        fast, slow = both(monkeypatch, lambda: passed(lambda v, s: lsq(v, s, -2, 3), x, grad, step))
        assert_same_bits(fast, slow)


@needs_native
def test_a_step_for_each_index_of_a_first_dimension_that_is_not_outermost(monkeypatch: pytest.MonkeyPatch):
    x, step = torch.randn(64).as_strided((2, 2, 2), (4, 1, 16)), torch.tensor([0.1, 0.7]).view(2, 1, 1)
    assert torch.equal(lsq(x, step, -2, 3), (x / step).round().clamp(-2, 3) * step)


@needs_native
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (torch.tensor(-2), torch.tensor(3)),
        (torch.tensor(-2.0, dtype=torch.float64), 3),
        (-2, torch.tensor(3.0)),
        (torch.tensor([[-2.0], [-1.0]]), torch.tensor([[3.0], [2.0]])),
    ],
)
def test_bounds_of_any_kind(low: Any, high: Any):
    x, step = 2 * torch.randn(2, 5), torch.tensor(0.3)
    x.requires_grad_()
    y = lsq(x, step.requires_grad_(), low, high)
    wanted = (x / step).round().clamp(torch.as_tensor(low).float(), torch.as_tensor(high).float()) * step
    assert torch.equal(y, wanted)
    y.sum().backward()
    assert x.grad is not None


@needs_native
def test_a_default_type_of_16_bits():
    x, step = torch.randn(64, 2048 * 9, requires_grad=True), torch.full((64, 1), 0.5, requires_grad=True)
    y = lsq(x, step, -2, 3).sum()
    y.backward(retain_graph=True)
    assert x.grad is not None
    wanted, x.grad = x.grad.clone(), None
    try:
        torch.set_default_dtype(torch.bfloat16)
        y.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(x.grad, wanted)


@needs_native
@pytest.mark.parametrize("size", [(4, 5), (64, 16, 33, 33)])
@pytest.mark.parametrize("name", ["lsq", "sign"])
def test_a_gradient_s_gradient(name: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Of a gradient penalty: that of PyTorch's operators, not zero."""
    torch.manual_seed(0)
    x, weight = torch.randn(size), torch.randn(size[-1], 3)

    def run() -> list[Tensor]:
        v, w, s = x.clone().requires_grad_(), weight.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        quantized = lsq(v, s, -2, 3) if name == "lsq" else sign_ste(v) * s
        loss = (quantized @ w).square().sum()
        (grad,) = torch.autograd.grad(loss, v, create_graph=True)
        assert grad.requires_grad
        return list(torch.autograd.grad(loss + grad.square().sum(), (v, w, s)))

    fast, slow = both(monkeypatch, run)
    for given, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(given, wanted)


@needs_native
def test_an_exported_graph_has_no_operators_of_ours():
    quantizer = build(QuantSpec("lsq", 4, "activation"), 3, 1)
    quantizer.calibrate(torch.rand(2, 3, 4, 4))
    exported = torch.export.export(quantizer, (torch.rand(2, 3, 4, 4),))
    assert "fewbits" not in str(exported.graph)
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(exported.module()(x), quantizer(x))


@pytest.mark.parametrize("size", [1, 2, 2047, 2048, 2049, 5 * 2048, 300_001])
def test_halved_sum(size: int):
    values = torch.randn(3, size)
    exact = values.double().sum(1)
    torch.testing.assert_close(halved_sum(values, 3).double(), exact, rtol=1e-6, atol=1e-4)
    assert torch.equal(halved_sum(values, 3), torch.cat([halved_sum(row) for row in values]))


def test_halved_sum_follows_memory():
    values = torch.randn(2, 3, 40, 40)
    laid = values.to(memory_format=torch.channels_last)
    assert torch.equal(halved_sum(laid), halved_sum(laid.permute(0, 2, 3, 1).contiguous()))


def reason_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Why there is none, in a cache of its own."""
    library.load.cache_clear()
    monkeypatch.setenv("FEWBITS_CACHE", str(folder))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    why = native.reason()
    assert native.is_available() == (why == "")
    # Whatever is missing, the result is there, and the same.
    x, step = torch.tensor([-1.0, 0.3, 5.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    y = lsq(x, step, 0, 3)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.5, 1.5]
    assert step.grad is not None
    assert step.grad.item() == pytest.approx(0.4 + 3.0)
    assert sign_ste(x).tolist() == [-1.0, 1.0, 1.0]
    return why


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert reason_in(tmp_path, monkeypatch, FEWBITS_NATIVE="0") == "FEWBITS_NATIVE is 0"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in reason_in(tmp_path, monkeypatch, PATH=str(tmp_path))


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'cannot compile today' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "cannot compile today" in reason_in(tmp_path / "cache", monkeypatch, CXX=str(compiler))
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_native
def test_functions_that_compute_something_else_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = tmp_path / "kernels.cpp"
    wrong.write_text(library.SOURCE.read_text().replace("std::rint(front", "std::floor(front"))
    monkeypatch.setattr(library, "SOURCE", wrong)
    assert "not what PyTorch computes" in reason_in(tmp_path, monkeypatch)


CHECK = "from fewbits.quantizers import native; assert native.is_available(), native.reason()"


@needs_native
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that is cut short would kill the process."""
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", CHECK], check=True)
        (made,) = (tmp_path / "native").glob("*.so")
        content = made.read_bytes()
        assert len(content) > 1000
        made.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"not a library"}[damage])


@needs_native
def test_what_others_may_have_written_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert reason_in(tmp_path, monkeypatch) == ""
    folder = tmp_path / "native"
    assert not folder.stat().st_mode & 0o077
    (made,) = folder.glob("*.so")
    before = made.stat().st_mtime_ns
    folder.chmod(0o777)
    assert reason_in(tmp_path, monkeypatch) == ""  # compiled for this process alone
    assert made.stat().st_mtime_ns == before


@needs_native
def test_a_cache_that_can_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert reason_in(tmp_path, monkeypatch) == ""
    (tmp_path / "native").chmod(0o500)
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert reason_in(tmp_path, monkeypatch) == ""
    (tmp_path / "native").chmod(0o700)


@needs_native
def test_a_message_in_no_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = tmp_path / "a b"
    compiler.write_bytes(b"#!/bin/sh\nprintf '\\377\\376 bad' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "bad" in reason_in(tmp_path / "cache", monkeypatch, CXX=f"'{compiler}' -flag")


@needs_native
def test_several_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    started = [subprocess.Popen([sys.executable, "-c", CHECK]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list((tmp_path / "native").iterdir())) == 2  # and its checksum
