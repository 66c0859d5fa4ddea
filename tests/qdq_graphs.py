"""Small QDQ models, built call by call, for the tests of target profiles."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

NUMBERS = {
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16,
    "int16": TensorProto.INT16,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int32": TensorProto.INT32,
}
RANGES = {"int8": (-127, 128), "uint8": (0, 256), "int4": (-7, 8), "uint4": (0, 16), "int16": (-999, 999)}
MIDDLE = {"uint8": 128, "uint4": 8, "uint16": 32768}


class QdqModel:
    """Collects nodes; every method returns the name of the value it makes."""

    def __init__(self, shape=(1, 4, 8, 8), opset=21, seed=0):
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants, self.outputs = [], [], []
        self.opset = opset
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))

    def constant(self, values, kind=None):
        name = f"c{len(self.constants)}"
        if kind is None:
            tensor = numpy_helper.from_array(np.asarray(values), name)
        else:
            tensor = helper.make_tensor(name, NUMBERS[kind], np.shape(values), np.ravel(values).tolist())
        self.constants.append(tensor)
        return name

    def node(self, op_type, *inputs, outputs=1, **attributes):
        name = f"{op_type}_{len(self.nodes)}"
        made = [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def _parameters(self, kind, scale, zero):
        zero = MIDDLE.get(kind, 0) if zero is None else zero
        return self.constant(np.float32(scale)), self.constant(zero, kind)

    def quantize(self, value, kind="uint8", scale=0.05, zero=None):
        return self.node("QuantizeLinear", value, *self._parameters(kind, scale, zero))

    def dequantize(self, value, kind="uint8", scale=0.05, zero=None):
        return self.node("DequantizeLinear", value, *self._parameters(kind, scale, zero))

    def qdq(self, value, kind="uint8", scale=0.05, zero=None):
        return self.dequantize(self.quantize(value, kind, scale, zero), kind, scale, zero)

    def weight(self, shape, kind="int8", axis=None, block=0, scale=0.01):
        codes = self.constant(self.random.integers(*RANGES[kind], shape), kind)
        if axis is None:
            return self.dequantize(codes, kind, scale, MIDDLE.get(kind, 0))
        sizes = (
            [size // block if i == axis else size for i, size in enumerate(shape)] if block else [shape[axis]]
        )
        scales = self.constant(
            np.linspace(scale, scale * 1.5, int(np.prod(sizes)), dtype=np.float32).reshape(sizes)
        )
        zeros = self.constant(np.full(sizes, MIDDLE.get(kind, 0)), kind)
        attributes = {"axis": axis, **({"block_size": block} if block else {})}
        return self.node("DequantizeLinear", codes, scales, zeros, **attributes)

    def bias(self, size, scale):
        return self.dequantize(self.constant(np.arange(size), "int32"), "int32", scale, 0)

    def conv(self, value, kind="int8", axis=0, groups=1, **attributes):
        return self.node(
            "Conv",
            value,
            self.weight((4, 4 // groups, 3, 3), kind, axis),
            pads=[1] * 4,
            group=groups,
            **attributes,
        )

    def output(self, *values):
        self.outputs += [helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in values]

    def model(self):
        graph = helper.make_graph(self.nodes, "qdq", [self.input], self.outputs, self.constants)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10 if self.opset > 19 else 8)
