"""``export``: build, write beside the target, check, and only then put the file in its place."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from .. import checks
from ..convert import FLOAT_BITS, plan_of, quantizers_of
from ..layers import QuantLayer
from .choosing import Source
from .choosing import choices as choose_kernels
from .engines import Engine
from .kernels import Choice
from .prepare import prepare
from .result import Exported, LayerRow
from .seal import digest, sealed
from .sizes import sizes
from .variants import PACKED, VARIANTS

if TYPE_CHECKING:
    from . import fold, markers, parity
    from .graph import Normalisation

CARE = "care"
"""Key in a file's metadata: the layers that were given more than the plain way, see ``fold.Care``."""

DYNAMIC = "the range of its input is found anew in every batch; freeze_ranges makes another method of it, on integers"
MINIMUM_EQUAL = 0.995
"""Share of equal predictions; where PyTorch disagrees with itself about as much, see ``parity.check``."""


def export(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor,
    normalisation: Normalisation | Literal["trained"] | None = "trained",
    engine: str = "onnxruntime",
    variant: str = PACKED,
    check: bool = True,
    minimum_equal: float = MINIMUM_EQUAL,
    class_names: Sequence[str] = (),
    kernels: Source = "table",
    threads: int = 1,
) -> Exported:
    """Write ``student`` as a file for ``engine``, weights packed at their bits, and prove that it computes the same.

    The file takes ``images`` (float32 in 0..1, N x C x H x W, any N) and gives ``logits``; the normalisation is inside.
    The same student on the same kernels gives the same bytes. A float network is exported too, as the baseline of a
    comparison.

    Args:
        student: a quantized and calibrated network; it is neither changed nor moved.
        path: ends in ``.onnx``, or for OpenVINO in ``.xml`` (with a ``.bin`` beside it, where the network has binary
            convolutions the only way); a file that is there is replaced once the new one is proved.
        example: real images in 0..1, N x C x H x W; all of them serve as the proof, so 64 or more are better than one.
        normalisation: mean and std of the pixels that the student was trained with; by default what ``fit`` trained it
            with; None if it takes pixels in 0..1 as they are.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        variant: ``"packed"``, the engine's own fast form; for ONNX Runtime also ``"int4"``, weights of 2 to 4 bits as
            ONNX's INT2 and INT4, and ``"qdq"``, plain int8 QuantizeLinear and DequantizeLinear as TensorRT takes them,
            where ``misplaced`` of the result says what it would not take. TensorRT itself is not run.
        check: whether to run the file and compare; a file that was not checked may be wrong.
        minimum_equal: share of images that must get the same prediction; of few images one may differ.
        class_names: go into the file's metadata.
        kernels: how a layer's kernel is chosen where several give the same codes, in OpenVINO: ``"table"`` takes the
            fastest by the times that were measured on this machine before, ``"measure"`` measures first,
            ``"default"`` leaves times aside: XNOR for one-bit weights and signs, else int8.
        threads: of the engine, whose times count.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ParityError: the engine computes something else; no file is left.
        TypeError: a student that is no network, an example that is no tensor.
        ValueError: another suffix, engine, shape or range of pixels than allowed; NaN in the student; a network that
            cannot be followed.
    """
    checks.check_network("student", student)
    checks.check("example", example, Tensor)
    checks.check("minimum_equal", minimum_equal, checks.UnitInterval)
    if engine not in VARIANTS:
        raise ValueError(f"engine must be one of {', '.join(VARIANTS)}, got {engine!r}")
    if variant not in VARIANTS[engine]:
        allowed = ", ".join(VARIANTS[engine])
        raise ValueError(f"variant must be one of {allowed} for engine {engine!r}, got {variant!r}")
    target = Path(path)
    chosen = VARIANTS[engine][variant]
    if target.suffix not in chosen.suffixes:
        raise ValueError(f"path must end in {' or '.join(chosen.suffixes)} for engine {engine!r}, got {target.name!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {str(path)!r}")
    network, traced, images, normalisation = prepare(student, example, normalisation)
    from . import parity
    from .placement import misplaced

    binary = target.suffix != ".onnx"
    choices, chosen_kinds = choose_kernels(chosen, engine, traced, network, kernels, threads=threads, binary=binary)
    metadata, state = _metadata(student, class_names) | chosen_kinds, digest(student, normalisation)
    built, found = chosen.build(traced, network, sealed(metadata, state), {}), None
    if check:
        expected = parity.reference(network, images, normalisation, built.cuts)
        found = parity.compare(built.proto, expected, images, built.cuts, chosen)
        care: dict[str, fold.Care] = {}
        while more := _more_care(built, found, care, minimum_equal, len(images)):
            care |= more
            built = chosen.build(traced, network, sealed(metadata | {CARE: written_care(care)}, state), care)
            found = parity.compare(built.proto, expected, images, built.cuts, chosen)
        parity.check(found, minimum_equal, len(images))
    rows: tuple[LayerRow, ...] = _layers(network, built, chosen, choices)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        files = chosen.write(built, Path(folder) / target.name)
        size = sum(file.stat().st_size for file in files)
        # The file that names the others comes last.
        for file in reversed(files):
            os.replace(file, target.parent / file.name)
    theoretical, full = sizes(network)
    return Exported(
        path=target,
        size_bytes=size,
        theoretical_bytes=theoretical,
        float_bytes=full,
        max_difference=found.max_difference if found else float("nan"),
        mean_difference=found.mean_difference if found else float("nan"),
        own_difference=found.own_difference if found else float("nan"),
        equal_predictions=found.equal_predictions if found else float("nan"),
        layers=rows,
        codes=found.codes if found else (),
        dynamic=_dynamic(network),
        variant=variant,
        misplaced=misplaced(built) if variant == "qdq" else (),
    )


def written_care(care: Mapping[str, fold.Care]) -> str:
    """For a file's metadata: whoever builds the file again needs it."""
    return json.dumps({name: int(level) for name, level in care.items()}, sort_keys=True)


def read_care(metadata: Mapping[str, str]) -> dict[str, fold.Care]:
    """The inverse of ``written_care``."""
    from .fold import Care

    return {name: Care(level) for name, level in json.loads(metadata.get(CARE, "{}")).items()}


def _metadata(student: nn.Module, class_names: Sequence[str]) -> dict[str, str]:
    try:
        metadata = {"fewbits": version("fewbits")}
    except PackageNotFoundError:  # a checkout that is not installed
        metadata = {"fewbits": "unknown"}
    plan = plan_of(student)
    if plan is not None:
        metadata["plan"] = json.dumps(asdict(plan), sort_keys=True)
    if _dynamic(student):
        metadata["ranges"] = "dynamic: found anew in every batch, so logits depend on the whole batch"
    if class_names:
        metadata["classes"] = json.dumps(list(class_names))
    return metadata


def _more_care(
    built: markers.Built, found: parity.Parity, care: Mapping[str, fold.Care], minimum_equal: float, num_images: int
) -> dict[str, fold.Care]:
    """The next step for layers whose codes differ in more than rounding explains; none when all is well.

    A deep network adds up what every layer is allowed: where the layers agree and the predictions do not, the layers
    with any code that differs get what costs no integer kernel.
    """
    from . import fold, parity

    wrong, highest = {row.name for row in parity.wrong_rows(found)}, fold.Care.FLOAT
    if not wrong and parity.has_other_predictions(found, minimum_equal, num_images):
        wrong, highest = {row.name for row in found.codes if row.equal < 1}, fold.Care.LIFTED
    layers = {built.layer_before(cut) for cut in built.cuts if parity.row_name(cut) in wrong} - {None}
    levels = {str(name): care.get(str(name), fold.Care.PLAIN) for name in layers}
    return {name: fold.Care(level + 1) for name, level in levels.items() if level < highest}


def _layers(
    network: nn.Module, built: markers.Built, engine: Engine, choices: Mapping[str, Choice]
) -> tuple[LayerRow, ...]:
    rows, dynamic, kernels = [], _dynamic(network), engine.kernels(built)
    unfused = engine.unfused(built, kernels)
    for site in built.sites:
        layer = network.get_submodule(site.layer)
        assert isinstance(layer, QuantLayer)
        reason = DYNAMIC if f"{site.layer}.input_quantizer" in dynamic else site.reason
        reason = reason or unfused.get(site.layer, "")
        choice = choices[site.layer].why if site.layer in choices else ""
        rows.append(LayerRow(site.layer, *_bits(layer), kernels[site.layer], reason, site.note, choice))
    return tuple(rows)


def _dynamic(network: nn.Module) -> tuple[str, ...]:
    """Activation quantizers whose ranges are computed from the batch."""
    return tuple(
        n for n, q in quantizers_of(network) if q.spec.role == "activation" and q.engine == "float" and bool(q.enabled)
    )


def _bits(layer: QuantLayer) -> tuple[int, int]:
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    return weight.bits if weight else FLOAT_BITS, activation.bits if activation else FLOAT_BITS
