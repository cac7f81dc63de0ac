"""DGRL: block losses, gradient routings and stages, recomputed by slow loops."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.blocks import binary_blocks, bireal
from fewbits.convert import quantize, quantizers_of
from fewbits.distill import Objective
from fewbits.distill.feature_losses import normalised_squared_error, squared_attention_distance
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.quantizers.sign import BiRealActivation, BiRealWeight
from fewbits.recipes import BlockWise, Features, NoTeacher, Plain, make
from fewbits.recipes.blockwise import ACTIVATIONS_ONLY, BinaryBlocks, BlockDistance

BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")
ROUTINGS = ("through", "detached", "teacher_input")


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grids start does not matter here, and the search for it takes most of the time."""
    monkeypatch.setattr("fewbits.quantizers.start.NUM_CANDIDATES", 4)


def network(blocks: tuple[int, ...] = (2, 2)) -> CifarResNet:
    return CifarResNet(blocks, (4, 8), projection=False, num_classes=3, architecture="tiny")


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])


def begun(teacher: nn.Module | None = None, phase: int = 0, **options: Any) -> tuple[Objective, Tensor, Tensor]:
    """An objective in eval mode, where a network gives the same numbers twice, and a batch."""
    teacher = teacher or bireal(network(), "prelu")
    student, (x, y) = quantize(teacher, 1, 1, quantizer="bireal"), batch()
    recipe, made = BlockWise(**options), None
    for index in range(phase + 1):
        made = recipe.objective(student, teacher, batches=[x], phase=index, networks=made.networks if made else None)
    assert made is not None
    for block in binary_blocks(student):
        for branch in (block.branch1, block.branch2):
            if branch is not None:
                nn.init.normal_(branch[-1].weight, std=0.3)  # type: ignore[index]
    return made.eval(), x, y


def taken(network: nn.Module, x: Tensor, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What each block took and gave, and the logits; by hand, block after block."""
    seen: dict[str, Tensor] = {}
    y = x
    for name, module in network.named_children():
        if not name.startswith("layer"):
            y = module(y)
            continue
        for index, block in enumerate(module.children()):
            path = f"{name}.{index}"
            y = y if inputs is None else inputs[path] if path in inputs else y.detach()
            seen[f"{path}.input"] = y
            y = block(y)
            seen[path] = y
    return seen | {"logits": y}


def by_hand(made: Objective, x: Tensor, routing: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        teacher = taken(made.networks.network("teacher"), x)
    inputs: dict[str, Tensor] | None = {} if routing == "detached" else None
    if routing == "teacher_input":
        inputs = {block: teacher[f"{block}.input"] for block in BLOCKS}
    return taken(made.networks.student, x, inputs), teacher


def mean_squared(one: Tensor, two: Tensor) -> Tensor:
    """Mean over batch and elements, one after the other."""
    pairs = list(zip(one.flatten(), two.flatten(), strict=True))
    return torch.stack([(a - b) ** 2 for a, b in pairs]).sum() / len(pairs)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_loss_and_gradients_by_explicit_loops(routing: Any):
    made, x, y = begun(routing=routing, stages="one", beta=0.7)
    losses = made(x, y)
    losses.total.backward()
    got = {name: p.grad.clone() for name, p in made.networks.student.named_parameters() if p.grad is not None}
    made.zero_grad()
    student, teacher = by_hand(made, x, routing)
    blocks = sum((mean_squared(student[b], teacher[b]) for b in BLOCKS), torch.zeros(()))
    log_p = student["logits"] - student["logits"].exp().sum(1, keepdim=True).log()
    labels = -sum(log_p[n, int(y[n])] for n in range(len(y))) / len(y)
    torch.testing.assert_close(losses.terms["blocks"], blocks.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, labels + 0.7 * blocks, rtol=1e-4, atol=1e-5)
    (labels + 0.7 * blocks).backward()
    wanted = {name: p.grad for name, p in made.networks.student.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("last", range(len(BLOCKS)))
def test_a_block_loss_reaches_its_own_block_or_all_before_it(routing: Any, last: int):
    made, x, _ = begun(routing=routing, stages="one", branch=None)
    features: dict[str, Tensor] = {}
    for block in BLOCKS:
        module = made.networks.student.get_submodule(block)
        module.register_forward_hook(lambda m, args, out, block=block: features.__setitem__(block, out))
    made(x, batch()[1])
    features[BLOCKS[last]].square().mean().backward()
    reached = {
        block
        for block in BLOCKS
        if any(
            p.grad is not None and bool(p.grad.any()) for p in made.networks.student.get_submodule(block).parameters()
        )
    }
    stem = made.networks.student.get_submodule("conv1").get_parameter("weight").grad
    assert reached == ({*BLOCKS[: last + 1]} if routing == "through" else {BLOCKS[last]})
    assert (stem is not None) == (routing == "through")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_evaluation_does_not_notice_the_routing(routing: Any):
    made, x, y = begun(routing=routing, stages="one")
    made(x, y)
    made.networks.network("teacher")(torch.randn_like(x))
    other = batch()[0]
    wanted = copy.deepcopy(made.networks.student)
    made.close()
    torch.testing.assert_close(made.networks.student(other), taken(wanted, other)["logits"])
    made.networks.student(other).sum().backward()
    assert made.networks.student.get_submodule("conv1").get_parameter("weight").grad is not None
    hooks = [m for n in ("student", "teacher") for m in made.networks.network(n).modules() if m._forward_pre_hooks]  # type: ignore[arg-type]
    assert hooks == []


def test_an_evaluation_between_two_steps():
    made, x, y = begun(routing="teacher_input", stages="one")
    before = made(x, y).total
    x2 = torch.randn(7, 3, 8, 8)
    got = made.networks.student(x2)
    assert torch.equal(got, taken(made.networks.student, x2)["logits"])
    made.forget_features()
    assert torch.equal(made(x, y).total, before)


@pytest.mark.parametrize("distance", ["normalised", "attention"])
def test_other_distances(distance: Any):
    made, x, y = begun(stages="one", distance=distance)
    student, teacher = by_hand(made, x, "through")
    compare = normalised_squared_error if distance == "normalised" else squared_attention_distance
    wanted = sum(compare(student[b], teacher[b]) for b in BLOCKS)
    torch.testing.assert_close(made(x, y).terms["blocks"], wanted.detach())  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("branch", "routings"), [("bottleneck", ROUTINGS), ("squeeze", ("detached",)), ("grouped", ("detached",))]
)
def test_one_compiled_graph_for_each_routing(branch: Any, routings: tuple[str, ...]):
    """Found: compiled code looks at no hooks, so that one routing's graph served the next objective's."""
    torch._dynamo.reset()
    teacher = bireal(network((1, 1)), "prelu")
    for routing in routings:
        made, x, y = begun(teacher, routing=routing, stages="one", branch=branch)
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        got, wanted = compiled(x, y), made(x, y)
        torch.testing.assert_close(got.terms, wanted.terms, rtol=1e-4, atol=1e-5)
        got.total.backward()
        gradients = {n: p.grad.clone() for n, p in made.networks.student.named_parameters() if p.grad is not None}
        made.zero_grad()
        wanted.total.backward()
        for name, parameter in made.networks.student.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
            else:
                assert name not in gradients or not gradients[name].any()
        made.close()
    torch._dynamo.reset()


# Stages


def test_two_stages():
    first, second = BlockWise().phases()
    assert first.precision == ACTIVATIONS_ONLY
    assert first.terms == second.terms == BlockWise(stages="one").phases()[0].terms
    assert first.edits == (BinaryBlocks(),)
    assert second.edits == ()
    made, _, _ = begun()
    for _, quantizer in quantizers_of(made.networks.student):
        assert bool(quantizer.enabled) == (quantizer.spec.role == "activation")
    made, _, _ = begun(phase=1)
    assert all(bool(quantizer.enabled) for _, quantizer in quantizers_of(made.networks.student))


def test_blocks_first():
    first, second = BlockWise(stages="blocks_first", routing="detached", share=0.3).phases()
    assert (first.share, second.share) == (pytest.approx(0.3), pytest.approx(0.7))
    assert first.terms == (BlockDistance(1.0),)
    assert first.routing == "detached"
    assert [term.name for term in second.terms] == ["cross_entropy", "blocks"]
    assert second.routing == "through"
    made, x, y = begun(stages="blocks_first", routing="detached")
    assert list(made(x, y).terms) == ["blocks"]


def test_controls():
    """Branch without distillation, distillation without branch, neither: the same network, start and stages."""
    sizes = {}
    for branch, beta in itertools.product((None, "bottleneck"), (0.0, 1.0)):
        recipe = BlockWise(beta=beta, branch=branch)  # type: ignore[arg-type]
        assert isinstance(recipe.teacher, NoTeacher) == (beta == 0)
        made, x, y = begun(branch=branch, beta=beta)
        assert ("blocks" in made(x, y).terms) == (beta > 0)
        sizes[branch, beta] = sum(p.numel() for p in made.networks.student.parameters())
    assert sizes[None, 0.0] == sizes[None, 1.0] < sizes["bottleneck", 0.0] == sizes["bottleneck", 1.0]


def test_other_recipes_train_the_same_network():
    teacher, (x, y) = network(), batch()
    student = quantize(bireal(teacher, "prelu"), 1, 1, quantizer="bireal")
    for recipe in (Plain(), Features(), BlockWise(activation="prelu", branch=None, stages="one")):
        trained = copy.deepcopy(student)
        made = recipe.objective(trained, teacher, batches=[x])
        made(x, y).total.backward()
        assert trained.state_dict().keys() == student.state_dict().keys()
        assert all(p.grad is not None for p in binary_blocks(trained)[0].parameters() if p.requires_grad)
    assert {type(q) for _, q in quantizers_of(binary_blocks(student)[0])} == {BiRealWeight, BiRealActivation}


def test_block_losses_add_up_with_other_recipes():
    recipe = make("blockwise+logits", {"blockwise.stages": "one", "blockwise.branch": "squeeze"})
    assert [term.name for term in recipe.phases()[0].terms] == ["cross_entropy", "blocks", "logits"]
    assert recipe.edits == (BinaryBlocks("squeeze"),)


@pytest.mark.parametrize("branch", [None, "bottleneck", "squeeze", "grouped"])
def test_a_fresh_student_gets_the_structure(branch: Any):
    """What export does with a run: the architecture by name, then what the recipe changed."""
    made, _, _ = begun(network(), branch=branch)
    recipe = BlockWise(branch=branch)
    for fresh in (quantize(network(), 1, 1, quantizer="bireal"), network()):
        assert recipe.restructure(fresh) is fresh
    low_bit = recipe.restructure(quantize(network(), 1, 1, quantizer="bireal"))
    low_bit.load_state_dict(made.networks.student.state_dict())
    x = batch()[0]
    assert torch.equal(low_bit.eval()(x), made.networks.student(x))


# Bad input


def test_bad_options():
    for options, match in (
        ({"routing": "none"}, "routing must be one of through, detached, teacher_input, got 'none'"),
        ({"stages": "three"}, "stages must be one of two, one, blocks_first, got 'three'"),
        ({"distance": "l1"}, "distance must be one of squared, normalised, attention"),
        ({"beta": -1.0}, "beta must be a number of 0 or more, got -1.0; 0 leaves"),
        ({"share": 1.0}, "share must be a number between 0 and 1, got 1.0; it is the first stage"),
        ({"beta": 0.0, "routing": "detached"}, "beta=0 leaves no block losses"),
        ({"beta": 0.0, "stages": "blocks_first"}, "beta=0 leaves no block losses"),
    ):
        with pytest.raises(ValueError, match=match):
            BlockWise(**options)


def test_networks_that_do_not_pair():
    shallow = CifarResNet((1, 1), (4, 8), projection=False, num_classes=3, architecture="shallow")
    student = quantize(network(), 1, 1)
    with pytest.raises(ValueError, match="the student has 4 and the teacher 2"):
        BlockWise().objective(student, shallow, batches=[batch()])
    wide = CifarResNet((2, 2), (6, 12), projection=False, num_classes=3, architecture="wide")
    with pytest.raises(ValueError, match=r"different outputs of block layer1\.0"):
        BlockWise().objective(quantize(network(), 1, 1), wide, batches=[batch()])
    BlockWise(distance="attention").objective(quantize(network(), 1, 1), wide, batches=[batch()])  # maps do
