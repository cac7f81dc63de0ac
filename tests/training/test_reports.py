"""What a run records beside its losses: nothing that an aggregate would hide."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_worker import SETTINGS, part_of_digits

from fewbits.convert import quantize
from fewbits.distill import Networks
from fewbits.models.resnet_cifar import CifarResNet
from fewbits.recipes import DTQ, QFD, Best, make
from fewbits.training import fit, read_metrics

BLOCKS = [f"report/blocks.layer{stage}_0.loss" for stage in (1, 2)]
ENTROPIES = [f"report/alignment.{tap}.entropy" for tap in (0, 1)]
SCALE = "report/teacher.linear.feature_quantizer.output_scale"


def records(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    teacher = CifarResNet((1, 1), (4, 8), projection=False, num_classes=10, channels=1, architecture="tiny")
    fit(
        quantize(teacher, 2, 2),
        teacher,
        recipe=recipe,
        data=part_of_digits(),
        output=folder,
        progress=False,
        **SETTINGS | {"lr": 1e-4},
    )
    return [record for record in read_metrics(folder) if record["event"] == "train"]


def test_each_block_s_loss_and_each_tap_s_attention(tmp_path: Path):
    """Found: DGRL's log had the sum of the blocks alone, DTQ's nothing of where its attention goes."""
    for record in records(DTQ() + Best(beta=2.0), tmp_path):
        assert {name for name in record if name.startswith("report/")} == {*BLOCKS, *ENTROPIES}
        assert sum(record[name] for name in BLOCKS) == pytest.approx(record["loss/blocks"], rel=1e-5)
        assert all(record[name] > 0 for name in BLOCKS)
        assert all(0.5 < record[name] <= 1 for name in ENTROPIES)


def test_the_scale_of_qfd_s_feature(tmp_path: Path):
    """Found: a scale that drifts in the teacher's phase was seen nowhere."""
    seen = {record["phase"]: record[SCALE] for record in records(QFD(), tmp_path)}
    assert list(seen) == ["teacher", "student"]
    assert all(scale > 0 for scale in seen.values())


def test_reports_do_not_break_the_graph():
    network = CifarResNet((1, 1), (4, 8), projection=False, num_classes=10, channels=1, architecture="tiny")
    student, (images, labels) = quantize(network, 2, 2), (torch.rand(4, 1, 8, 8), torch.arange(4))
    made = make("best").objective(student, network, batches=[images])
    plain = made(images, labels).total.item()
    before = made.networks.report()
    torch.compile(made, fullgraph=True, backend="aot_eager")(2 * images, labels)
    assert all(made.networks.report()[name] != value for name, value in before.items())
    assert made(images, labels).total.item() == pytest.approx(plain, rel=0.5)
    assert made.networks.helpers.state_dict() == {}
    assert Networks(student, network, images).report() == {}
