"""One-node models on onnxruntime and on a kernel, compared; random inputs for them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from hypothesis import Phase, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.kernels import lookup, run
from onnxslim_lab.kernels.dtypes import NUMBERS
from onnxslim_lab.runtime import Interpreter

ML, MS = "ai.onnx.ml", "com.microsoft"
OPSETS = {"": 21, ML: 5, MS: 1}


def tensor_type(value):
    return TensorProto.STRING if value.dtype.kind in "OU" else NUMBERS[value.dtype]


def one_node(op_type, inputs, attributes=None, outputs=1, domain="", opset=None):
    """Return a model of one node for these inputs (None: an absent one), and its feeds."""
    opset = opset or OPSETS[domain]
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)]
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if name}
    wrapped = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in (attributes or {}).items()
    }
    node = helper.make_node(op_type, names, results, domain=domain, **wrapped)
    declared = [
        helper.make_tensor_value_info(name, tensor_type(value), list(value.shape))
        for name, value in feeds.items()
    ]
    graph = helper.make_graph([node], "g", declared, [onnx.ValueInfoProto(name=name) for name in results])
    opsets = [helper.make_opsetid("", 21)] + [helper.make_opsetid(domain, opset)] * bool(domain)
    if not domain:
        opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def onnxruntime_outputs(model, feeds, *, optimized=True):
    """Return what onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def both(op_type, inputs, attributes=None, outputs=1, domain="", opset=None):
    """Return the outputs of onnxruntime and of the kernel for a model of one node."""
    inputs = [None if value is None else np.asarray(value) for value in inputs]
    model, feeds = one_node(op_type, inputs, attributes, outputs, domain, opset)
    want = onnxruntime_outputs(model, feeds)
    have = run(lookup(op_type, domain, opset or OPSETS[domain]), inputs, attributes or {}, outputs)
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


common = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
REFUSED = "refused"
UNDECIDED = {
    "NOT_IMPLEMENTED": "onnxruntime has no kernel for this dtype",
}


def outcome(compute):
    """Return the outputs, or REFUSED and why."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001 - the exceptions of onnxruntime have no common class
        return REFUSED, str(error)


def agree(op_type, inputs, attributes=None, *, outputs=1, opset=21, rtol=1e-5, atol=1e-6, refused=()):
    """Assert that onnxruntime (optimizations off) and the interpreter agree on a node, refusals included.

    Args:
        refused: Parts of onnxruntime's messages where it refuses what the specification allows.
    """
    inputs = [None if value is None else np.asarray(value) for value in inputs]
    while inputs[-1] is None:
        inputs.pop()
    model, feeds = one_node(op_type, inputs, attributes, outputs, opset=opset)
    want = outcome(lambda: onnxruntime_outputs(model, feeds, optimized=False))
    have = outcome(lambda: list(Interpreter(model).run(feeds).values()))
    if want[0] is REFUSED:
        documented = any(part in want[1] for part in (*UNDECIDED, *refused))
        assert have[0] is REFUSED or documented, want[1]
        return
    assert have[0] is not REFUSED, have[1]
    for wanted, got in zip(want, have, strict=True):
        assert got.shape == wanted.shape
        if wanted.dtype == object:
            assert got.tolist() == wanted.tolist()
            continue
        assert got.dtype == wanted.dtype
        if wanted.dtype.kind in "iub":
            np.testing.assert_array_equal(got, wanted)
        else:
            rounding = 2e-3 if wanted.dtype == np.float16 else 0
            np.testing.assert_allclose(
                got.astype(np.float64), wanted.astype(np.float64), rtol=rtol + rounding, atol=atol + rounding
            )


lengths = st.sampled_from([1, 2, 3, 3, 4, 5, 7, 0])


def shapes(low=0, high=4):
    return st.lists(lengths, min_size=low, max_size=high).map(tuple)


@st.composite
def broadcast(draw, count=2):
    """Draw shapes that broadcast to one."""
    whole = draw(shapes())
    made = []
    for _ in range(count):
        shape = whole[draw(st.integers(0, len(whole))) :] if draw(st.booleans()) else whole
        made.append(tuple(n if draw(st.booleans()) else 1 for n in shape))
    return made


def values(rng, shape, dtype, *, spoiled=False, low=-9, high=9):
    """Return random values of any dtype; spoiled: with infinities and NaN where it has them."""
    dtype = np.dtype(dtype)
    if dtype.kind == "O":
        return words(rng, *shape)
    if dtype.kind == "b":
        return np.array(rng.random(shape) < 0.5)
    if dtype.kind in "iu":
        return np.array(rng.integers(0 if dtype.kind == "u" else low, high + 1, shape)).astype(dtype)
    x = np.array(rng.standard_normal(shape) * 3).astype(dtype)
    for value in (np.inf, -np.inf, np.nan, 0.0) if spoiled else ():
        if x.size and rng.random() < 0.4:
            x.reshape(-1)[rng.integers(x.size)] = value
    return x
