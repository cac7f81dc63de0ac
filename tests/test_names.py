"""A misspelt name: the choices, and what was probably meant, wherever a name is given."""

from collections.abc import Callable
from typing import Any

import pytest

import fewbits as fb
from fewbits.names import unknown_name


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: fb.recipes.make("qdf"), "qfd"),
        (lambda: fb.Plan(quantizer="lsqq"), "lsq"),
        (lambda: fb.quantizers.build(fb.QuantSpec("dorefaa", 2, "weight"), 1, 0), "dorefa"),
        (
            lambda: fb.quantize(
                fb.models.build("resnet20", num_classes=2), rules=[fb.Rule("layer1.*", quantizer="bi-real")]
            ),
            "bireal",
        ),
        (lambda: fb.models.build("resnet21", num_classes=2), "resnet32"),
        (lambda: fb.data.load("cifar-10"), "cifar10"),
    ],
)
def test_what_was_meant(call: Callable[[], Any], meant: str):
    with pytest.raises(ValueError, match=f"must be one of .*; did you mean {meant}\\?"):
        call()


def test_nothing_near_and_no_text():
    assert unknown_name("recipe", "xyz", ["plain"]) == "recipe must be one of plain, got 'xyz'"
    assert unknown_name("recipe", None, ["plain"]) == "recipe must be one of plain, got None"


def test_case_does_not_hide_what_was_meant():
    assert unknown_name("model", "ResNet20", ["resnet20", "vgg-small"]).endswith("did you mean resnet20?")
