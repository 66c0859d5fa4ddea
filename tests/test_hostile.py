"""Hostile and broken files through the command line: one clear line, in bounded time and memory."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

LIMIT = 1_500_000_000  # bytes of address space beyond what the interpreter and its libraries map


def model(nodes, *, inputs=(("x", [4]),), outputs=(("y", [4]),), opset=17, tensors=(), ir=8):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, **attributes)


def ints(name, values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def external(location):
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return model([node("Add", ["x", "w"], ["y"])], tensors=[tensor])


def scalar(name, value, dtype=TensorProto.INT64):
    return helper.make_tensor(name, dtype, [], [value])


def reals(name, shape, entries):
    return helper.make_tensor(name, TensorProto.FLOAT, shape, entries)


def folded(*nodes, tensors, opset=17):
    """Return a model whose nodes, the last one making c, depend on constants only: y = x + sum(c)."""
    tail = [
        node("Cast", ["c"], ["f"], to=1),
        node("ReduceSum", ["f"], ["s"], keepdims=0),
        node("Add", ["x", "s"], ["y"]),
    ]
    return model([*nodes, *tail], tensors=tensors, opset=opset)


PIXEL = reals("p", [1, 1, 1, 1], [1])
KERNEL = reals("w", [1, 1, 2, 2], [1] * 4)
VECTOR = reals("v", [4096], [1] * 4096)
GOOD = model([node("Relu", ["x"], ["y"])]).SerializeToString()
BAD = {
    "empty": b"",
    "truncated": GOOD[:-9],
    "text": b"hello, this is no model",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "no graph": helper.make_model(helper.make_graph([], "", [], [])).SerializeToString()[:3],
    "cycle": model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])]),
    "duplicate names": model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]),
    "missing initializer": model([node("Add", ["x", "w"], ["y"])]),
    "parent folder": external("../secret"),
    "absolute path": external("/etc/passwd"),
    "overflowing dims": model(
        [node("Add", ["x", "w"], ["y"])],
        tensors=[TensorProto(name="w", data_type=1, dims=[2**33, 2**33], raw_data=b"abcd")],
    ),
    "negative dims": model(
        [node("Add", ["x", "w"], ["y"])],
        tensors=[TensorProto(name="w", data_type=1, dims=[-1], raw_data=b"abcd")],
    ),
    "unknown dtype": model(
        [node("Add", ["x", "w"], ["y"])],
        tensors=[TensorProto(name="w", data_type=99, dims=[1], raw_data=b"a")],
    ),
    "newlines in names": model([node("Add", ["x", "w\n[red]<script>"], ["y"], name="a\nb")]),
}
# Files that load, but ask for a lot: they must come back in bounded time and memory, one way or the other.
GREEDY = {
    "fill": model(
        [
            node("ConstantOfShape", ["n"], ["c"]),
            node("ReduceSum", ["c"], ["s"], keepdims=0),
            node("Add", ["x", "s"], ["y"]),
        ],
        tensors=[ints("n", [100_000_000_000])],
    ),
    "range": model(
        [
            node("Range", ["a", "b", "c"], ["r"]),
            node("Cast", ["r"], ["f"], to=1),
            node("ReduceSum", ["f"], ["s"], keepdims=0),
            node("Add", ["x", "s"], ["y"]),
        ],
        tensors=[helper.make_tensor(n, 7, [], [v]) for n, v in (("a", 0), ("b", 10**12), ("c", 1))],
    ),
    "broadcast": model(
        [
            node("ConstantOfShape", ["n"], ["p"]),
            node("ConstantOfShape", ["m"], ["q"]),
            node("Add", ["p", "q"], ["r"]),
            node("ReduceSum", ["r"], ["s"], keepdims=0),
            node("Add", ["x", "s"], ["y"]),
        ],
        tensors=[ints("n", [200_000, 1]), ints("m", [1, 200_000])],
    ),
    "tiles": model(
        [
            node("Tile", ["x", "n"], ["t"]),
            node("ReduceSum", ["t"], ["s"], keepdims=0),
            node("Add", ["x", "s"], ["y"]),
        ],
        tensors=[ints("n", [10**10])],
    ),
    "long integers": helper.make_model(
        helper.make_graph(
            [
                node("Cast", ["i"], ["j"], to=7),
                node("Add", ["j", "j"], ["k"]),
                node("Cast", ["k"], ["y"], to=1),
            ],
            "g",
            [helper.make_tensor_value_info("i", TensorProto.INT64, [10**12])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [10**12])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    ),
    "resize by scales": folded(
        node("Resize", ["p", "", "k"], ["c"], mode="nearest"),
        tensors=[PIXEL, reals("k", [4], [1, 1, 1e6, 1e6])],
    ),
    "resize by infinity": folded(
        node("Resize", ["p", "", "k"], ["c"], mode="linear"),
        tensors=[PIXEL, reals("k", [4], [1, 1, float("inf"), float("nan")])],
    ),
    "upsample": folded(
        node("Upsample", ["p", "k"], ["c"], mode="linear"),
        tensors=[PIXEL, reals("k", [4], [1, 1, 1e6, 1e6])],
        opset=9,
    ),
    "strides": folded(
        node("ConvTranspose", ["q", "w"], ["c"], strides=[10**6, 10**6]),
        tensors=[reals("q", [1, 1, 2, 2], [1] * 4), KERNEL],
    ),
    "negative pads": folded(
        node("ConvTranspose", ["p", "w"], ["c"], pads=[-(10**6)] * 4), tensors=[PIXEL, KERNEL]
    ),
    "output shape": folded(
        node("ConvTranspose", ["p", "w"], ["c"], output_shape=[10**6, 10**6]), tensors=[PIXEL, KERNEL]
    ),
    "convolution pads": folded(node("Conv", ["p", "w"], ["c"], pads=[10**6] * 4), tensors=[PIXEL, KERNEL]),
    "pool pads": folded(
        node("MaxPool", ["p"], ["c"], kernel_shape=[10**6, 10**6], pads=[10**6 - 1] * 4), tensors=[PIXEL]
    ),
    "one hot": folded(
        node("OneHot", ["i", "d", "o"], ["c"]),
        tensors=[ints("i", [0]), scalar("d", 10**12), reals("o", [2], [0, 1])],
    ),
    "eye": folded(
        node("Expand", ["v", "n"], ["e"]),
        node("EyeLike", ["e"], ["c"]),
        tensors=[reals("v", [1, 1], [1]), ints("n", [10**6, 10**6])],
    ),
    "depth to space": folded(
        node("ConstantOfShape", ["n"], ["a"]),
        *(node("DepthToSpace", [f"a{i}" if i else "a"], [f"a{i + 1}"], blocksize=2) for i in range(8)),
        *(node("SpaceToDepth", [f"a{8 + i}"], [f"a{9 + i}"], blocksize=2) for i in range(8)),
        node("Identity", ["a16"], ["c"]),
        tensors=[ints("n", [1, 4**16, 1, 1])],
    ),
    "outer products": folded(node("Einsum", ["v", "v", "v"], ["c"], equation="i,j,k->ijk"), tensors=[VECTOR]),
    "range of floats": folded(
        node("Range", ["a", "b", "d"], ["c"]),
        tensors=[scalar("a", 0.0, 1), scalar("b", 3e38, 1), scalar("d", 1e-38, 1)],
    ),
    "range of NaN": folded(
        node("Range", ["a", "b", "d"], ["c"]),
        tensors=[scalar("a", 0.0, 1), scalar("b", float("nan"), 1), scalar("d", 1.0, 1)],
    ),
    "window": folded(node("HannWindow", ["n"], ["c"]), tensors=[scalar("n", 10**12)]),
    "mel weights": folded(
        node("MelWeightMatrix", ["n", "d", "r", "a", "b"], ["c"]),
        tensors=[
            *(scalar("n", 10**6), scalar("d", 10**12), scalar("r", 8000)),
            *(scalar("a", 0.0, 1), scalar("b", 4000.0, 1)),
        ],
    ),
    "sequence": folded(
        node("ConstantOfShape", ["n"], ["a"]),
        node("SequenceConstruct", ["a"] * 64, ["q"]),
        node("ConcatFromSequence", ["q"], ["c"], axis=0),
        tensors=[ints("n", [10**7])],
    ),
    "wrong opset": model([node("Relu", ["x"], ["y"])], opset=9999),
    "zero-size tensor": model(
        [node("Concat", ["x", "w"], ["y"], axis=0)], tensors=[helper.make_tensor("w", 1, [0], [])]
    ),
    "NaN weights": model(
        [node("Mul", ["x", "w"], ["y"])], tensors=[helper.make_tensor("w", 1, [4], [np.nan, np.inf, 0, 1])]
    ),
    "no nodes": model([node("Identity", ["x"], ["y"])], opset=13),
    "old": model([node("Relu", ["x"], ["y"])], opset=1, ir=3),
}


def run(path, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

    environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "onnxslim_lab", "optimize", str(path), "-o", str(tmp_path / "out.onnx")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, preexec_fn=limit, check=False
    )


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_gives_one_line(name, tmp_path):
    content = BAD[name]
    path = tmp_path / "in.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    before = path.read_bytes()
    done = run(path, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out.onnx").exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_file_comes_back(name, tmp_path):
    path = tmp_path / "in.onnx"
    path.write_bytes(GREEDY[name].SerializeToString())
    done = run(path, tmp_path)
    assert done.returncode in (0, 1, 2), done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr
    assert (tmp_path / "out.onnx").exists() == (done.returncode == 0)


def test_a_chain_of_ten_thousand_nodes(tmp_path):
    count = 10_000
    nodes = [node("Add", [f"v{i}", "w"], [f"v{i + 1}"]) for i in range(count)]
    chain = model(
        nodes,
        inputs=[("v0", [4])],
        outputs=[(f"v{count}", [4])],
        tensors=[helper.make_tensor("w", 1, [1], [1])],
    )
    path = tmp_path / "in.onnx"
    path.write_bytes(chain.SerializeToString())
    done = run(path, tmp_path)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr
