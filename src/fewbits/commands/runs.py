"""Reading finished runs: the student, the data, the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import data as datasets
from .. import models
from ..convert import Plan, Rule, quantize
from ..data import Dataset, Normalisation
from ..training import read_json, read_metrics
from ..training.folder import RUN, STUDENT


def load_run(folder: Path) -> tuple[nn.Module, Normalisation]:
    """The trained student of a finished run, in eval mode, and the normalisation of its input.

    Raises:
        ValueError: the folder holds no run, or one that is not finished, or files that do not belong together.
    """
    run = read_json(folder / RUN)
    if not (folder / STUDENT).exists():
        raise ValueError(f"{folder} holds a run that is not finished; continue it with train --resume")
    if "model" not in run:
        raise ValueError(f"{folder} was trained from Python on a network without a name; load its student yourself")
    network = float_architecture(run)
    if run.get("plan"):
        network = quantize(network, plan=plan_from_data(run["plan"]))
    models.load_into(network, models.load_weights(folder / STUDENT), what=str(folder / STUDENT))
    shift, scale = run["normalisation"]["mean"], run["normalisation"]["std"]
    return network.eval(), Normalisation(tuple(shift), tuple(scale))


def float_architecture(run: dict[str, Any]) -> nn.Module:
    """The float network of ``run.json``, with random weights."""
    described = run["data"]
    return models.build(
        run["model"],
        num_classes=len(described["classes"]),
        channels=described["channels"],
        image_size=described["image_size"],
    )


def plan_from_data(entries: dict[str, Any]) -> Plan:
    """A plan from ``run.json``."""
    values = {key: value for key, value in entries.items() if key != "is"}
    values["keep"] = tuple(values["keep"])
    values["rules"] = tuple(Rule(**{k: v for k, v in rule.items() if k != "is"}) for rule in values["rules"])
    return Plan(**values)


def run_data(folder: Path, root: Path | None = None) -> Dataset:
    """The data set of a run."""
    run = read_json(folder / RUN)
    data = datasets.load(run.get("data_source", run["data"]["name"]), root, False, run["data"]["image_size"])
    # A run that was tuned on held-out images is measured on them: nothing else touches the real test split.
    data = data.hold_out(run["hold_out"], seed=0) if run.get("hold_out") else data
    return data.per_class(run["per_class"], seed=run["settings"]["seed"]) if run.get("per_class") else data


def run_result(folder: Path) -> dict[str, Any]:
    """The last record of a finished run.

    Raises:
        ValueError: it is not finished.
    """
    records = [record for record in read_metrics(folder) if record["event"] == "end"]
    if not records:
        raise ValueError(f"{folder} holds a run that is not finished; continue it with train --resume")
    return records[-1]
