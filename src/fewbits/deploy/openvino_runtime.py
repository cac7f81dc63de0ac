"""OpenVINO: from the built graph to its own format, compiled on the CPU, and what it really runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import xnor
from .sessions import missing

if TYPE_CHECKING:
    import onnx
    import openvino

Array = npt.NDArray[Any]

LAYERS = ("Convolution", "BinaryConvolution", "FullyConnected", "MatMul")
"""Kinds of nodes of a compiled graph that multiply weights; what is fused into them goes under their name."""


def import_openvino() -> Any:
    """The package.

    Raises:
        ImportError: the extra ``openvino`` is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing(error, "openvino") from error
    return openvino


@cache
def cpu_core() -> openvino.Core:
    """The one core that compiles networks here, alive as long as the process.

    With its first network a core gives the thread another stack for signals, and takes it away when it dies. Of two
    that die in the order in which they were made, the second leaves the first one's behind, which is no memory any
    more, and the next signal that has a handler ends the process without a word (SIGCHLD, where a data loader of
    PyTorch was at work and any child process ends).
    """
    core: openvino.Core = import_openvino().Core()
    return core


def convert(proto: onnx.ModelProto) -> openvino.Model:
    """OpenVINO's graph of a model from ``openvino.build``.

    Raises:
        ImportError: the extra ``openvino`` is not installed.
        ValueError: there is an operator, or a form of one, that OpenVINO does not know.
    """
    import io

    ov = import_openvino()
    from openvino.frontend.onnx import ConversionExtension

    core = ov.Core()
    core.add_extension(ConversionExtension(xnor.OPERATOR, xnor.DOMAIN, _binary_convolution))
    try:
        return core.read_model(io.BytesIO(proto.SerializeToString()))
    except RuntimeError as error:
        raise ValueError(
            f"OpenVINO's own converter cannot follow this network: {str(error).strip()[-300:]}; export it for "
            "onnxruntime"
        ) from error


def _binary_convolution(node: Any) -> list[Any]:
    ov = import_openvino()
    from openvino import opset13 as ops

    packed, shape = node.get_input(1).get_node().data, ov.Shape(node.get_attribute("shape"))
    # Little-endian bits, as the kernel wants them and as ``packing.pack`` leaves them. A tensor made from an array
    # would only borrow its memory.
    bits = ov.Tensor(ov.Type.u1, shape)
    bits.data.reshape(-1).view(np.uint8)[:] = packed.reshape(-1)
    weight = ov.op.Constant(bits, shared_memory=False)
    weight.set_friendly_name(node.get_input(1).get_node().get_friendly_name())
    pads = node.get_attribute("pads")
    half = len(pads) // 2
    product = ops.binary_convolution(
        node.get_input(0),
        weight,
        node.get_attribute("strides"),
        pads[:half],
        pads[half:],
        node.get_attribute("dilations"),
        "xnor-popcount",
        node.get_attribute("pad_value") if node.has_attribute("pad_value") else 0.0,
    )
    return [product.output(0)]


def save(model: openvino.Model, path: Path, metadata: Mapping[str, str]) -> tuple[Path, Path]:
    """Write ``path`` (.xml) and its weights beside it (.bin)."""
    for key, value in metadata.items():
        model.set_rt_info(value, ["fewbits", key])
    if any(node.get_type_name() == xnor.OPERATOR for node in model.get_ops()):
        # The kernel asks for a fixed number of images; whoever wants another one calls reshape.
        model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
    import_openvino().save_model(model, path, compress_to_fp16=False)
    path.write_text(slim(path.read_text()))
    return path, path.with_suffix(".bin")


def slim(xml: str) -> str:
    """Without indentation and the sizes of every port, which OpenVINO works out again when it reads the graph.

    They are four tenths of the text, and a binary network has more text than weights.
    """
    xml = re.sub(r">\s+<", "><", xml)
    xml = re.sub(r"<dim>-?\d+</dim>", "", xml)
    return re.sub(r"(<port [^>]*)></port>", r"\1/>", xml)


def metadata(path: Path) -> dict[str, str]:
    """What ``save`` was given.

    Raises:
        ValueError: OpenVINO cannot read the file.
    """
    graph = Compiled(path).graph
    if not graph.has_rt_info(["fewbits"]):
        return {}
    known: dict[str, str] = graph.get_rt_info(["fewbits"]).value
    return dict(known)


class Compiled:
    """A network on the CPU, compiled for each number of images that it is given.

    Binary convolutions ask for a fixed number, and everything else is faster with one.

    Args:
        model: a graph, or a file: ``.xml`` with its ``.bin`` beside it, or ``.onnx``.
        threads: of one inference.

    Raises:
        ImportError: the extra ``openvino`` is not installed.
        ValueError: OpenVINO cannot read or compile the file.
    """

    def __init__(self, model: openvino.Model | Path, *, threads: int = 1) -> None:
        self.name = model.name if isinstance(model, Path) else "the model"
        self.core = cpu_core()
        # In float32 even where the processor has bfloat16, which OpenVINO would take there by itself.
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if isinstance(model, Path) and model.suffix == ".xml" and not model.with_suffix(".bin").is_file():
            raise ValueError(
                f"{model.name} has no weights: {model.with_suffix('.bin').name} has to lie beside it, under that name"
            )
        with self._explained():
            self.graph = self.core.read_model(model) if isinstance(model, Path) else model
        # A port has several names where OpenVINO dropped an operator that did nothing.
        self.inputs = tuple(frozenset(port.get_names()) for port in self.graph.inputs)
        self.outputs = tuple(frozenset(port.get_names()) for port in self.graph.outputs)
        self._networks: dict[tuple[int, ...], Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and name what comes out; all inputs have the same number of images."""
        arrays = self._arrays(feeds)
        network = self.network(tuple(map(len, arrays)))
        with self._explained():
            results = network(arrays)
        # Copies: the engine writes its next results into the same memory.
        return {
            name: np.array(value) for names, value in zip(self.outputs, results.values(), strict=True) for name in names
        }

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Compile for inputs of these sizes, which is when OpenVINO unpacks weights and chooses kernels."""
        self.network(tuple(map(len, self._arrays(feeds))))

    def _arrays(self, feeds: Mapping[str, Array]) -> list[Array]:
        for names in self.inputs:
            if not names & feeds.keys():
                raise ValueError(
                    f"{self.name} has an input {sorted(names)}, which a file of fewbits has not (it takes images): was "
                    "it made by something else?"
                )
        return [np.ascontiguousarray(next(feeds[name] for name in names if name in feeds)) for names in self.inputs]

    def network(self, sizes: tuple[int, ...]) -> Any:
        """What runs inputs of these batch sizes."""
        if sizes not in self._networks:
            graph = self.graph.clone()
            shapes = {
                port: [size, *list(port.partial_shape)[1:]] for port, size in zip(graph.inputs, sizes, strict=True)
            }
            with self._explained():
                graph.reshape(shapes)
                self._networks[sizes] = self.core.compile_model(graph, "CPU", self.options)
        return self._networks[sizes]

    def kernels(self) -> dict[str, str]:
        """What OpenVINO runs for each operator of the graph, read from its own compiled graph, by the operator's name.

        ``"Convolution brgconv_avx512_I8"`` is an integer kernel, ``"BinaryConvolution jit_avx512_u1"`` the binary one,
        ``"Convolution brgconv_avx512_f32"`` a float one.
        """
        found: dict[str, str] = {}
        for node in self.network((1,)).get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, kernel = (info[key].astype(str) for key in ("layerType", "primitiveType"))
            for name in info["originalLayersNames"].astype(str).split(","):
                if kind in LAYERS:
                    found.setdefault(name, f"{kind} {kernel}")
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot load or run {self.name}: {str(error).strip()[-500:]}") from error
