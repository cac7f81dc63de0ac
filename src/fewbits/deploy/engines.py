"""What export, parity and bench need of an engine; everything in which engines differ is behind these few methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import nn

    from .activations import Cut
    from .candidates import Candidates
    from .costs import Cost
    from .fold import Care, Site
    from .kernels import Kind
    from .markers import Built

Array = npt.NDArray[Any]
ENGINE = "engine"
"""Key in a file's metadata: who it was built for."""


UNFUSED = "the engine does not fuse it, though its weights, input and output would allow it"


class Session(Protocol):
    """A network that an engine has loaded."""

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Do what the first inference of this size would do once."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; what comes out by its name."""


class Engine(Protocol):
    """How a graph is built for an engine, written, loaded and looked into."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of files."""

    def build(
        self, traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care]
    ) -> Built:
        """Replace the markers of ``traced`` by what the engine makes fast."""

    def cut(
        self, model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]
    ) -> onnx.ModelProto:
        """A copy with every tensor of codes an output and, as ``NAME.in``, an input."""

    def open(self, model: onnx.ModelProto | Path, *, threads: int = 1) -> Session:
        """Load a graph or a file."""

    def kernels(self, built: Built) -> dict[str, str]:
        """The operator that runs each quantized layer, read from the engine's own optimized graph."""

    def candidates(self, traced: ir.Model, student: nn.Module) -> dict[str, Candidates]:
        """The kernels that each quantized layer can have with the same codes; no layers where there is no choice."""

    def measure(
        self, found: Mapping[str, Candidates], student: nn.Module, *, threads: int, repeats: int
    ) -> dict[str, dict[Kind, float]]:
        """Milliseconds of each candidate."""

    def metadata(self, path: Path) -> dict[str, str]:
        """What was written into a file beside the network."""

    def is_integer(self, kernel: str) -> bool:
        """Whether a kernel multiplies integers or bits."""

    def unfused(self, built: Built, kernels: Mapping[str, str]) -> dict[str, str]:
        """Why the engine runs layers in float which as they were built could be integer kernels."""

    def costs(self, path: Path, feeds: Mapping[str, Array], *, threads: int, repeats: int) -> list[Cost]:
        """What each operator of a file takes, the most expensive first."""

    def write(self, built: Built, path: Path) -> tuple[Path, ...]:
        """Leave the finished files, ``path`` first."""


class OnnxRuntime:
    """One ``.onnx`` file of standard operators."""

    suffixes: tuple[str, ...] = (".onnx",)

    def build(
        self, traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care]
    ) -> Built:
        """See ``onnx.build``, and ``outline`` for what makes the file small."""
        from . import onnx
        from .outline import outline

        built = onnx.build(traced, student, metadata, care)
        outline(built.proto)
        return built

    def cut(
        self, model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]
    ) -> onnx.ModelProto:
        """See ``onnx.cut``."""
        from . import onnx

        return onnx.cut(model, cuts, shapes)

    def open(self, model: onnx.ModelProto | Path, *, threads: int = 1) -> Session:
        """See ``sessions.open_session``."""
        from .sessions import Opened

        return Opened(model if isinstance(model, Path) else model.SerializeToString(), threads=threads)

    def kernels(self, built: Built) -> dict[str, str]:
        """See ``sessions.kernels``."""
        from . import sessions

        readers = sessions.kernels(built.proto.SerializeToString(deterministic=True))[0]
        return {
            site.layer: readers.get(str(site.weight.name)) or readers.get(str(site.result.name), "float")
            for site in built.sites
        }

    def candidates(self, traced: ir.Model, student: nn.Module) -> dict[str, Candidates]:
        """None: a layer runs on integers where its output is quantized."""
        return {}

    def measure(
        self, found: Mapping[str, Candidates], student: nn.Module, *, threads: int, repeats: int
    ) -> dict[str, dict[Kind, float]]:
        """Nothing to measure.

        Raises:
            ValueError: always.
        """
        raise ValueError("engine must be 'openvino', got 'onnxruntime', in which no layer has a choice of kernels")

    def metadata(self, path: Path) -> dict[str, str]:
        """See ``sessions.metadata``."""
        from .sessions import metadata

        return metadata(path)

    def is_integer(self, kernel: str) -> bool:
        """See ``sessions.INTEGER_KERNELS``."""
        from .sessions import INTEGER_KERNELS

        return kernel in INTEGER_KERNELS

    def unfused(self, built: Built, kernels: Mapping[str, str]) -> dict[str, str]:
        """All that have no integer kernel."""
        return {layer: UNFUSED for layer, kernel in kernels.items() if not self.is_integer(kernel)}

    def costs(self, path: Path, feeds: Mapping[str, Array], *, threads: int, repeats: int) -> list[Cost]:
        """See ``costs.of_onnxruntime``."""
        from .costs import of_onnxruntime

        return of_onnxruntime(path, feeds, threads=threads, repeats=repeats)

    def write(self, built: Built, path: Path) -> tuple[Path, ...]:
        """One file; the same network gives the same bytes."""
        path.write_bytes(built.proto.SerializeToString(deterministic=True))
        return (path,)


class OpenVINO:
    """OpenVINO's own ``.xml`` with a ``.bin`` beside it; without binary layers an ``.onnx`` that it reads as well.

    The ``.onnx`` is one file and smaller (OpenVINO's XML takes some kilobytes for each layer), but has no word for a
    binary convolution.
    """

    suffixes: tuple[str, ...] = (".xml", ".onnx")

    def build(
        self, traced: ir.Model, student: nn.Module, metadata: Mapping[str, str], care: Mapping[str, Care]
    ) -> Built:
        """See ``openvino.build``; biases are floats here, so that nothing needs care."""
        from . import openvino

        return openvino.build(traced, student, {**metadata, ENGINE: "openvino"})

    def cut(
        self, model: onnx.ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, tuple[int, ...]]
    ) -> onnx.ModelProto:
        """See ``openvino_cut.cut``."""
        from .openvino_cut import cut

        return cut(model, cuts, shapes)

    def open(self, model: onnx.ModelProto | Path, *, threads: int = 1) -> Session:
        """See ``openvino_runtime.Compiled``."""
        from .openvino_runtime import Compiled, convert

        return Compiled(model if isinstance(model, Path) else convert(model), threads=threads)

    def kernels(self, built: Built) -> dict[str, str]:
        """See ``openvino_runtime.Compiled.kernels``."""
        from .openvino_runtime import Compiled, convert

        kernels = Compiled(convert(built.proto)).kernels()
        return {site.layer: _kernels(kernels, built.proto, site) for site in built.sites}

    def candidates(self, traced: ir.Model, student: nn.Module) -> dict[str, Candidates]:
        """See ``candidates.candidates``."""
        from .candidates import candidates

        return candidates(traced, student)

    def measure(
        self, found: Mapping[str, Candidates], student: nn.Module, *, threads: int, repeats: int
    ) -> dict[str, dict[Kind, float]]:
        """See ``layer_times.measure``."""
        from .layer_times import measure

        return measure(found, student, threads=threads, repeats=repeats)

    def metadata(self, path: Path) -> dict[str, str]:
        """Of either kind of file."""
        from .openvino_runtime import metadata
        from .sessions import metadata as onnx_metadata

        return metadata(path) if path.suffix == ".xml" else onnx_metadata(path)

    def is_integer(self, kernel: str) -> bool:
        """Kernels end in the precision that they work in."""
        return all(part.endswith(("_i8", "_u8", "_u1")) for part in kernel.lower().split(" + "))

    def unfused(self, built: Built, kernels: Mapping[str, str]) -> dict[str, str]:
        """All that have no integer kernel."""
        return {layer: UNFUSED for layer, kernel in kernels.items() if not self.is_integer(kernel)}

    def costs(self, path: Path, feeds: Mapping[str, Array], *, threads: int, repeats: int) -> list[Cost]:
        """See ``costs.of_openvino``."""
        from .costs import of_openvino

        return of_openvino(path, feeds, threads=threads, repeats=repeats)

    def write(self, built: Built, path: Path) -> tuple[Path, ...]:
        """One file or two.

        Raises:
            ValueError: an ``.onnx`` was asked for, but there are binary convolutions.
        """
        from .openvino_runtime import convert, save
        from .xnor import OPERATOR

        if path.suffix == ".xml":
            return save(convert(built.proto), path, {entry.key: entry.value for entry in built.proto.metadata_props})
        if any(node.op_type == OPERATOR for node in built.proto.graph.node):
            raise ValueError(
                f"path must end in .xml for a network with binary convolutions, got {path.name!r}; ONNX has no "
                "operator for them"
            )
        path.write_bytes(built.proto.SerializeToString(deterministic=True))
        return (path,)


ENGINES: dict[str, Engine] = {"onnxruntime": OnnxRuntime(), "openvino": OpenVINO()}


def engine_of(path: Path) -> str:
    """The engine that a file was written for.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: there is no such file, or it is none of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; export first")
    if path.suffix == ".xml":
        return "openvino"
    if path.suffix != ".onnx":
        raise ValueError(f"exported files end in .onnx or .xml, got {path.name!r}")
    from .sessions import metadata

    return metadata(path).get(ENGINE, "onnxruntime")


def _kernels(kernels: Mapping[str, str], proto: onnx.ModelProto, site: Site) -> str:
    """The kernel of a layer; of one that is put together from several all of them."""
    found = [_kernel(kernels, proto, str(value.name)) for value in site.products or (site.result,)]
    counts = [f"{found.count(kernel)} x {kernel}" for kernel in dict.fromkeys(found)]
    return " + ".join(counts) if site.products else found[0]


def _kernel(kernels: Mapping[str, str], proto: onnx.ModelProto, name: str) -> str:
    """The kernel of the operator that makes ``name``; OpenVINO may keep only the name of what it fused to it."""
    for _ in range(4):
        if name in kernels:
            return kernels[name]
        reader = next((node for node in proto.graph.node if name in node.input), None)
        if reader is None:
            break
        name = reader.output[0]
    return "float"
