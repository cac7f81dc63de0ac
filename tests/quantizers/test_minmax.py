import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits.quantizers import Quantizer, QuantSpec, build

F = np.float32


def make(bits: int, role: str = "activation") -> Quantizer:
    return build(QuantSpec("minmax", bits, role), 3, 1)


@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_by_loops(bits: int, role: str):
    step = 2.0 / (2**bits - 1)  # ties of the range from -0.75 to 1.25
    halves = torch.arange(1, 2 ** (bits + 1) - 2) * (step / 2) - 0.75
    x = torch.cat([torch.rand(60) * 1.9 - 0.7, halves, torch.tensor([-0.75, 1.25])])
    x = x[torch.randperm(len(x))].requires_grad_()
    g = torch.randn_like(x)
    y = make(bits, role)(x)
    y.backward(g)

    v = x.detach().numpy()
    lo, hi = v.min(), v.max()
    s = (hi - lo) / F(2**bits - 1)
    values, grads, extra = [], [], 0.0
    for each, grad in zip(v, g.tolist(), strict=True):
        u = (each - lo) / s
        values.append(float(np.rint(u) * s + lo))
        grads.append(grad)
        extra += grad * float(np.rint(u) - u) / (2**bits - 1)
    grads[int(v.argmax())] += extra
    grads[int(v.argmin())] -= extra
    assert y.tolist() == values
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(grads), rtol=1e-4, atol=1e-5)


def test_gradient_agrees_with_autograd():
    """The extremes in the graph, rounding straight through."""
    x, g = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    make(2)(fast).backward(g)
    lo, hi = slow.min(), slow.max()
    s = (hi - lo) / 3
    u = (slow.clamp(lo.detach(), hi.detach()) - lo) / s
    ((u + (u.round() - u).detach()) * s + lo).backward(g)
    assert fast.grad is not None
    assert slow.grad is not None
    torch.testing.assert_close(fast.grad, slow.grad)


def test_ranges_are_dynamic_also_at_test_time():
    quantizer = make(2).eval()
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(quantizer(5 * x), 5 * quantizer(x))
    assert quantizer.engine == "float"


def test_zero_is_in_general_no_level():
    assert 0.0 not in make(2)(torch.tensor([-1.0, 0.0, 3.5])).tolist()


def test_a_constant_is_reproduced():
    x = torch.full((2, 3), 0.3, requires_grad=True)
    y = make(4)(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 3))


RANK = """
import os, sys, torch
from torch import distributed as dist
from fewbits.quantizers import QuantSpec, build

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
results = {}
for name, (x, g) in torch.load(f"{folder}/data.pt").items():
    x, g = (each.chunk(2)[rank].clone() for each in (x, g))
    x.requires_grad_()
    y = build(QuantSpec("minmax", 2, "activation"), 3, 1)(x)
    y.backward(g)
    whole = torch.compile(build(QuantSpec("minmax", 2, "activation"), 3, 1), backend="aot_eager", fullgraph=True)
    compiled = x.detach().requires_grad_()
    z = whole(compiled)
    z.backward(g)
    assert torch.equal(z, y) and torch.equal(compiled.grad, x.grad)
    own = build(QuantSpec("minmax", 2, "weight"), 3, 1)(x.detach())
    results[name] = y.detach(), x.grad, own
torch.save(results, f"{folder}/{rank}.pt")
# A graph that was compiled with a collective in it keeps the group, so destroying that would not end gloo's threads,
# and one that lets go of a tensor while the interpreter shuts down aborts the process.
os._exit(0)
"""


@pytest.mark.distributed
def test_two_processes_have_the_range_of_the_whole_batch(tmp_path: Path):
    """Values and gradients; half of the values behind a ReLU share the minimum, on both ranks."""
    batches = {"normal": torch.randn(8, 3, 4, 4), "relu": torch.randn(8, 3, 4, 4).relu()}
    data = {name: (x, torch.randn_like(x)) for name, x in batches.items()}
    torch.save(data, tmp_path / "data.pt")
    source = str(Path(fewbits.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": source, "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 0, errors
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    for name, (x, g) in data.items():
        x.requires_grad_()
        y = make(2)(x)
        y.backward(g)
        assert torch.equal(torch.cat([result[name][0] for result in results]), y), name
        assert x.grad is not None
        torch.testing.assert_close(torch.cat([result[name][1] for result in results]), x.grad)
        for result, part in zip(results, x.detach().chunk(2), strict=True):
            assert torch.equal(result[name][2], make(2)(part))  # weights are the same everywhere: nothing to reduce
