"""ONNX Runtime sessions, all made in one place: quiet, on the CPU, with a fixed number of threads."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime

_ERRORS_ONLY = 3

INTEGER_KERNELS = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"})
"""What a quantized layer becomes if it is multiplied in integers; anything else runs in float."""


def missing(error: ImportError, extra: str = "onnx") -> ImportError:
    """The error that says which extra to install."""
    return ImportError(
        f'this needs {error.name}, which is not installed; pip install "fewbits[{extra}]"', name=error.name
    )


def open_session(
    model: bytes | Path, *, threads: int = 1, optimized: Path | None = None, profile: str | None = None
) -> onnxruntime.InferenceSession:
    """Load ``model``.

    Args:
        model: a file, or its bytes.
        threads: of one operator; many sessions with several threads in one process disturb each other.
        optimized: where the engine writes the graph that it really runs.
        profile: what the name of the file begins with in which the engine leaves the times of all operators.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: the file is no ONNX model that this engine can run.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing(error) from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # The last level only reorders float weights in memory, and renames them with that.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        source = str(model) if isinstance(model, Path) else model
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the engine raises its own types, none of them public
        name = model.name if isinstance(model, Path) else "the model"
        raise ValueError(f"ONNX Runtime cannot load {name}: {error}") from error


def kernels(model: bytes) -> tuple[dict[str, str], Counter[str]]:
    """What ONNX Runtime makes of ``model``, read from the graph that it writes after its optimizations.

    Returns:
        The operator that reads or else makes each value, by the value's name (folded constants keep theirs); and how
        often each operator stands in the graph.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(model, optimized=optimized)
        graph = onnx.load(optimized).graph
    readers: dict[str, str] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node.op_type)
    for node in graph.node:
        for name in node.output:
            readers.setdefault(name, node.op_type)
    return readers, Counter(node.op_type for node in graph.node)


class Opened:
    """A loaded model that names what it gives, and leaves out what it does not ask for.

    Args:
        model: a file, or its bytes.
        threads: of one operator.
    """

    def __init__(self, model: bytes | Path, *, threads: int = 1) -> None:
        self.name = model.name if isinstance(model, Path) else "the model"
        self.session = open_session(model, threads=threads)
        self.inputs = {port.name for port in self.session.get_inputs()}
        self.outputs = [port.name for port in self.session.get_outputs()]

    def prepare(self, feeds: Mapping[str, Any]) -> None:
        """Nothing is left to do: weights are unpacked and kernels chosen when a file is opened."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once and name what it gives."""
        asked = {name: array for name, array in feeds.items() if name in self.inputs}
        if missed := self.inputs - asked.keys():
            raise ValueError(
                f"{self.name} has an input {sorted(missed)}, which a file of fewbits has not (it takes images): was it "
                "made by something else?"
            )
        return dict(zip(self.outputs, self.session.run(self.outputs, asked), strict=True))


def metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of a file.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        ValueError: the file is no ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing(error) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise ValueError(f"{path.name} is no ONNX model: {error}") from error
    return {entry.key: entry.value for entry in model.metadata_props}
