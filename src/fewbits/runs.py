"""The networks that plain data describe: what ``run.json`` and a packed file say of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from torch import nn

from . import models
from .blocks import Branch, bireal
from .convert import Plan, Rule, quantize
from .recipes import make

INT8 = "int8"
"""In the option ``blocks``: shortcuts of 8 bits."""


def float_architecture(run: Mapping[str, Any]) -> nn.Module:
    """The float network of ``run.json`` as the run began with it, with random weights."""
    described = run["data"]
    network = models.build(
        run["model"],
        num_classes=len(described["classes"]),
        channels=described["channels"],
        image_size=described["image_size"],
    )
    return with_blocks(network, run.get("blocks", "none"))


def student_architecture(run: Mapping[str, Any]) -> nn.Module:
    """The student of ``run.json``, quantized and with the structure that training left it with; random weights."""
    network = float_architecture(run)
    if run.get("plan"):
        network = quantize(network, plan=plan_from_data(run["plan"]))
    return restructured(network, run)


def restructured(network: nn.Module, run: Mapping[str, Any]) -> nn.Module:
    """``network`` with what the run's recipe changed in its structure, in place."""
    return make(run["recipe_name"], run["recipe_options"]).restructure(network)


def with_blocks(network: nn.Module, blocks: str) -> nn.Module:
    """A copy of a residual network with the ``blocks`` that the option names; the network itself for none.

    Raises:
        ValueError: another text, or a network without basic blocks.
    """
    if blocks == "none":
        return network
    first, *parts = blocks.split("+")
    branches = [part for part in parts if part not in ("prelu", INT8)]
    if first != "bireal" or len(branches) > 1 or len(set(parts)) < len(parts) or set(branches) - set(get_args(Branch)):
        raise ValueError(
            f"blocks must be none or bireal, with +prelu, +{INT8} and one of +{', +'.join(get_args(Branch))}, "
            f"each once; got {blocks!r}"
        )
    branch = cast("Branch | None", (*branches, None)[0])
    return bireal(network, "prelu" if "prelu" in parts else "none", branch, float_shortcut=INT8 not in parts)


def rules_of(blocks: str) -> tuple[Rule, ...]:
    """The rules that a plan needs for ``blocks``: where shortcuts have 8 bits, they are those of LSQ."""
    return (Rule("*.shortcut.conv", 8, 8, "lsq"),) if INT8 in blocks.split("+") else ()


def plan_from_data(entries: Mapping[str, Any], where: str = "run.json") -> Plan:
    """A plan from plain data, as ``as_data`` made them.

    Raises:
        ValueError: it is none.
    """
    values = {key: value for key, value in entries.items() if key != "is"}
    try:
        values["keep"] = tuple(values["keep"])
        values["rules"] = tuple(Rule(**{k: v for k, v in rule.items() if k != "is"}) for rule in values["rules"])
        return Plan(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the plan in {where} is damaged or of another version of fewbits: {error}") from error
