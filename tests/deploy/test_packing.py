import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from onnx import TensorProto, helper

from fewbits.deploy.packing import pack, packed_size, unpack

widths = st.integers(1, 8)


@st.composite
def coded(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(widths)
    codes = draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    return np.array(codes, np.int64), bits


@given(coded())
def test_round_trip_at_true_size(case: tuple[np.ndarray, int]):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(codes.size, bits) == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, codes.size), codes)


@given(coded())
def test_the_layout_by_slow_loops(case: tuple[np.ndarray, int]):
    codes, bits = case
    number = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == number.to_bytes(packed_size(codes.size, bits), "little")


def test_shape_is_read_row_by_row():
    codes = np.arange(4).reshape(2, 2)
    np.testing.assert_array_equal(pack(codes, 2), pack(codes.reshape(-1), 2))


@pytest.mark.parametrize(("codes", "bits"), [([4], 2), ([-1], 2), ([0.5], 2), ([256], 8)])
def test_codes_that_do_not_fit(codes: list[float], bits: int):
    with pytest.raises(ValueError, match="codes must be whole numbers from 0 to"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits: int):
    with pytest.raises(ValueError, match="bits must be between 1 and 8"):
        pack([0], bits)


def test_another_number_of_bytes():
    with pytest.raises(ValueError, match="damaged"):
        unpack(np.zeros(3, np.uint8), 2, 5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 8, 1, 1)])
def test_standard_operators_unpack(bits: int, shape: tuple[int, ...]):
    import onnx_ir as ir

    from fewbits.deploy.builder import Builder
    from fewbits.deploy.weights import WeightGrid, unpacked

    codes = np.random.default_rng(0).integers(0, 2**bits, shape)
    if bits == 8:
        codes = codes.clip(1, 255)
    factor = np.array([1, -1] * shape[0])[: shape[0]]
    grid = WeightGrid(codes, bits, 1, -(2 ** (bits - 1)), np.ones(1), None, "w")
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    value = unpacked(Builder(graph), grid, factor)
    value.type, value.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(shape)
    if value.producer() is None:
        np.testing.assert_array_equal(value.const_value.numpy(), (codes - 128) * factor.reshape(-1, 1, 1, 1))
        return
    graph.outputs.append(value)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto)
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {})
    low = -(2 ** (bits - 1))
    np.testing.assert_array_equal(found, (codes + low) * factor.reshape(-1, 1, 1, 1))
    stored = next(i for i in proto.graph.initializer if i.name == "w.packed")
    assert len(stored.raw_data) == packed_size(codes.size, bits)
    assert helper.tensor_dtype_to_np_dtype(TensorProto.INT8) == found.dtype
