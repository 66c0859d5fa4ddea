"""One-node models on onnxruntime and on a kernel, compared; random inputs for them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from hypothesis import settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.kernels import lookup, run
from onnxslim_lab.kernels.dtypes import NUMBERS

ML, MS = "ai.onnx.ml", "com.microsoft"
OPSETS = {"": 21, ML: 5, MS: 1}


def tensor_type(value):
    return TensorProto.STRING if value.dtype.kind in "OU" else NUMBERS[value.dtype]


def both(op_type, inputs, attributes=None, outputs=1, domain="", opset=None):
    """Return the outputs of onnxruntime and of the kernel for a model of one node."""
    attributes = attributes or {}
    opset = opset or OPSETS[domain]
    inputs = [None if value is None else np.asarray(value) for value in inputs]
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)]
    given_values = {name: value for name, value in zip(names, inputs, strict=True) if name}
    wrapped = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
    }
    node = helper.make_node(op_type, names, results, domain=domain, **wrapped)
    declared = [
        helper.make_tensor_value_info(name, tensor_type(value), list(value.shape))
        for name, value in given_values.items()
    ]
    graph = helper.make_graph([node], "g", declared, [onnx.ValueInfoProto(name=name) for name in results])
    opsets = [helper.make_opsetid("", 21)] + [helper.make_opsetid(domain, opset)] * bool(domain)
    if not domain:
        opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    want = session.run(None, given_values)
    have = run(lookup(op_type, domain, opset), inputs, attributes, outputs)
    return want, have[:outputs]


def check(
    op_type, inputs, attributes=None, *, outputs=1, domain="", opset=None, rtol=1e-5, atol=1e-6, steps=0
):
    want, have = both(op_type, inputs, attributes, outputs, domain, opset)
    for wanted, got in zip(want, have, strict=True):
        assert got.shape == wanted.shape
        if wanted.dtype == object or wanted.dtype.kind == "U":
            assert got.tolist() == wanted.tolist()
        elif wanted.dtype.kind in "iub":
            assert got.dtype == wanted.dtype
            apart = np.abs(got.astype(np.int64) - wanted.astype(np.int64))
            assert apart.max(initial=0) <= steps
            assert np.count_nonzero(apart) <= max(1, apart.size // 10)  # ties only
        else:
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(
                got.astype(np.float64), wanted.astype(np.float64), rtol=rtol, atol=atol
            )


SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=20, deadline=None)


def codes(rng, shape, dtype):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def grid(rng, dtype, scale=0.05):
    """Return a random scale and zero point."""
    size = np.array(scale * (0.5 + rng.random()), np.float32)
    return size, np.array(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1), dtype)


def quantized(rng, shape, dtype, scale=0.05):
    return codes(rng, shape, dtype), *grid(rng, dtype, scale)


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def words(rng, *shape):
    return rng.choice(["a", "b", "Cc", "dd e", ""], shape).astype(object)
