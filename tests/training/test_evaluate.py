"""Accuracy and batch norm's statistics, against slow recomputation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from training_worker import Net, network, part_of_digits

from fewbits.data import TensorSplit
from fewbits.training import accuracy, reestimate_batch_norm
from fewbits.training.evaluate import count_correct


def batches(num: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 1, 8, 8), torch.randint(0, 10, (size,))) for _ in range(num)]


def test_accuracy_counts_one_image_after_the_other():
    model, given = network(dropout=0.5).train(), batches()
    right = total = 0
    model.eval()
    for images, labels in given:
        for image, label in zip(images, labels, strict=True):
            right += int(model(image[None])[0].argmax() == label)
            total += 1
    model.train()
    assert accuracy(model, given) == right / total
    assert count_correct(model, given) == (right, total)


def test_modes_come_back_one_by_one():
    model = network().train()
    model.bn2.eval()
    before = [m.training for m in model.modules()]
    accuracy(model, batches())
    reestimate_batch_norm(model, [images for images, _ in batches()])
    assert [m.training for m in model.modules()] == before
    assert model.bn1.momentum == 0.1


def test_nothing_changes_by_measuring():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy(model, batches())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="batches holds no image"):
        accuracy(network(), [])


def test_an_empty_batch_counts_nothing():
    """The last batch of a test split may leave nothing for a later process; quantizers divide by the batch."""
    from fewbits.calibration import calibrate
    from fewbits.convert import quantize

    student = quantize(network(), weights=3, activations=3)
    calibrate(student, [batches()[0][0]])
    empty = (torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))
    assert count_correct(student, [*batches(), empty])[1] == 24


def slow_statistics(model: Net, images: list[Tensor]) -> dict[str, Tensor]:
    """Means of batch means and of unbiased batch variances, module by module, with everything else in eval mode."""
    sums: dict[str, list[Tensor]] = {}
    for batch in images:
        x = model.conv1(batch)
        sums.setdefault("bn1.running_mean", []).append(x.mean((0, 2, 3)))
        sums.setdefault("bn1.running_var", []).append(x.var((0, 2, 3), correction=1))
        x = model.relu(normalise(x, model.bn1))
        x = model.conv2(x)
        sums.setdefault("bn2.running_mean", []).append(x.mean((0, 2, 3)))
        sums.setdefault("bn2.running_var", []).append(x.var((0, 2, 3), correction=1))
    return {name: torch.stack(values).mean(0) for name, values in sums.items()}


def normalise(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def test_batch_norm_equals_slow_statistics():
    model = network(dropout=0.5)
    images = [batch * 3 + 1 for batch, _ in batches(4)]
    with torch.no_grad():
        model.bn1.running_mean.fill_(99)
        expected = slow_statistics(model, images)
        assert reestimate_batch_norm(model, images) == 4
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_network_without_batch_norm_is_not_run():
    def refuse() -> Tensor:
        raise AssertionError

    assert reestimate_batch_norm(network(norm=False), (refuse() for _ in range(3))) == 0


def test_poisoned_batches_do_not_reach_the_statistics():
    model, twin = network(), network()
    images = [batch for batch, _ in batches(3)]
    bad = images[1].clone()
    bad[0, 0, 0, 0] = torch.nan
    assert reestimate_batch_norm(model, [images[0], bad, images[2]]) == 2
    reestimate_batch_norm(twin, [images[0], images[2]])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_without_a_usable_batch_the_statistics_stay():
    model = network()
    model(batches()[0][0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for given in ([], [torch.full((4, 1, 8, 8), torch.inf)]):
        with pytest.raises(ValueError, match="no batch of finite images"):
            reestimate_batch_norm(model, given)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert model.training
        assert model.bn1.momentum == 0.1


def test_the_split_of_a_data_set_can_be_measured():
    data = part_of_digits()
    assert isinstance(data.test, TensorSplit)
    data = replace(data, test=data.test.subset(torch.arange(13)))
    given = data.test.batches(batch_size=5, normalisation=data.normalisation)
    assert 0 <= accuracy(network(), given) <= 1
