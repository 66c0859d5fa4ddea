"""Which channels go together: removing those nobody listens to changes no output, whatever they go through."""

import numpy as np
import onnx
import pytest
from channel_graphs import HEADER, assert_equal, half, made, remove_silent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxslim_lab.channels.groups import find_groups
from onnxslim_lab.graph import Graph

CONV = "h = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, w1)\n"
END = "y = Conv (t, w9)"


def between(inner, *, weights="", size=8, out=8):
    """Return Conv -> inner -> Conv; `inner` makes t of h."""
    return (
        f"g (float[1,3,6,6] x, float[{size},3,3,3] w1, float[4,{out},1,1] w9{weights}) => "
        f"(float[1,4,N,M] y) {{ {CONV} {inner} {END} }}"
    )


def dense(inner, *, weights="", out=8, shape="N,4"):
    """Return Conv -> inner -> MatMul."""
    return (
        f"g (float[1,3,6,6] x, float[8,3,3,3] w1, float[{out},4] w9{weights}) => "
        f"(float[{shape}] y) {{ {CONV} {inner} y = MatMul(t, w9) }}"
    )


SE = """p = GlobalAveragePool(h) q = Conv(p, w2) r = Relu(q) s = Conv(r, w3) u = HardSigmoid(s) t = Mul(h, u)"""
HEADS = """g (float[2,5,12] x, float[12,12] w1, float[12,12] w2, float[12,12] w3, float[12,12] w4, float[12] w5) =>
  (float[2,5,12] y) <int64[4] split = {0, 0, 3, 4}, int64[3] merge = {0, 0, 12}, float two = {2.0}> {
  q0 = MatMul(x, w1) q1 = Add(q0, w5) k0 = MatMul(x, w2) v0 = MatMul(x, w3)
  q2 = Reshape(q1, split) k2 = Reshape(k0, split) v2 = Reshape(v0, split)
  q = Transpose <perm=[0,2,1,3]>(q2) k = Transpose <perm=[0,2,3,1]>(k2) v = Transpose <perm=[0,2,1,3]>(v2)
  s0 = MatMul(q, k) s1 = Div(s0, two) s = Softmax(s1) o0 = MatMul(s, v)
  o1 = Transpose <perm=[0,2,1,3]>(o0) o = Reshape(o1, merge) y = MatMul(o, w4) }"""
RECURRENT = """g (float[5,2,6] x, float[1,{G},6] w1, float[1,{G},8] w2, float[1,{B}] w3, float[8,3] w9) =>
  (float[5,2,3] y) <int64[1] axis = {{1}}> {{ h = {OP} <hidden_size=8>(x, w1, w2, w3)
  t = Squeeze(h, axis) y = MatMul(t, w9) }}"""
BOTH = """g (float[5,2,6] x, float[2,32,6] w1, float[2,32,8] w2, float[2,24] w4, float[2,64] w3, float[16,3] w9) =>
  (float[5,2,3] y) <int64[3] merge = {5, 2, 16}> {
  h = LSTM <hidden_size=8, direction="bidirectional">(x, w1, w2, w3, , , , w4)
  s = Transpose <perm=[0,2,1,3]>(h) t = Reshape(s, merge) y = MatMul(t, w9) }"""
GEMMS = """g (float[2,6] x, float[6,8] w1, float[8] w2, float[4,8] w3, float[4] w4) => (float[2,4] y)
  { h = Gemm(x, w1, w2) t = Tanh(h) y = Gemm <transB=1>(t, w3, w4) }"""
LOOKUP = """g (int64[2,5] x, float[9,8] w1, float[5,8] w2, float[8,4] w9) => (float[2,5,4] y) <int64[1] f = {8}>
  { i = Mod(x, f) h = Gather(w1, i) t = Add(h, w2) y = MatMul(t, w9) }"""

CASES = {
    "relu": between("t = Relu(h)"),
    "sigmoid": between("t = Sigmoid(h)"),
    "batchnorm": between(
        "t = BatchNormalization(h, w2, w3, w4, b5)",
        weights=", float[8] w2, float[8] w3, float[8] w4, float[8] b5",
    ),
    "instancenorm": between("t = InstanceNormalization(h, w2, w3)", weights=", float[8] w2, float[8] w3"),
    "prelu": between("t = PRelu(h, w2)", weights=", float[8,1,1] w2"),
    "bias": between("a = Add(h, w2) t = Mul(a, w3)", weights=", float[1,8,1,1] w2, float[8,1,1] w3"),
    "pools": between("a = MaxPool <kernel_shape=[2,2]>(h) t = AveragePool <kernel_shape=[2,2]>(a)"),
    "resize": between("t = Resize(h, , s)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}>"
    ),
    "resize to sizes": between("t = Resize(h, , , s)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[4] s = {1, 8, 9, 7}>"
    ),
    "pad": between("t = Pad(h, p)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 2, 0}>"
    ),
    "transposes": between("a = Transpose <perm=[0,2,3,1]>(h) b = Relu(a) t = Transpose <perm=[0,3,1,2]>(b)"),
    "residual": between("a = Conv(h, w2) b = Relu(a) t = Add(h, b)", weights=", float[8,8,1,1] w2"),
    "bottleneck": between(
        "a = Conv(h, w2) b = Relu(a) c = Conv(b, w3) t = Add(h, c)",
        weights=", float[6,8,1,1] w2, float[8,6,1,1] w3",
    ),
    "gate": between(SE, weights=", float[4,8,1,1] w2, float[8,4,1,1] w3"),
    "wide gate": between("a = Conv(h, w2) b = Sigmoid(a) t = Mul(h, b)", weights=", float[1,8,1,1] w2"),
    "depthwise": between("t = Conv <group=8>(h, w2, w3)", weights=", float[8,1,3,3] w2, float[8] w3"),
    "depthwise twice": between("t = Conv <group=8>(h, w2)", weights=", float[16,1,3,3] w2", out=16),
    "grouped": between("t = Conv <group=2>(h, w2)", weights=", float[12,4,1,1] w2", out=12),
    "grouped deconvolution": between(
        "t = ConvTranspose <group=2>(h, w2)", weights=", float[8,6,2,2] w2", out=12
    ),
    "deconvolution": between(
        "t = ConvTranspose(h, w2, w3)", weights=", float[8,6,2,2] w2, float[6] w3", out=6
    ),
    "shuffle": between(
        "a = Conv <group=2>(h, w2) b = Reshape(a, s) c = Transpose <perm=[0,2,1,3,4]>(b) d = Reshape(c, u)"
        " t = Conv <group=2>(d, w3)",
        weights=", float[8,4,1,1] w2, float[8,4,1,1] w3",
    ).replace("(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[5] s = {1,2,4,6,6}, int64[4] u = {1,8,6,6}>"),
    "concat": between(
        "a = Conv(h, w2) b = Relu(h) t = Concat <axis=1>(a, b, h)", weights=", float[5,8,1,1] w2", out=21
    ),
    "dense concat": between(
        "a = Conv(h, w2) b = Concat <axis=1>(h, a) c = Conv(b, w3) t = Concat <axis=-3>(b, c)",
        weights=", float[4,8,1,1] w2, float[4,12,1,1] w3",
        out=16,
    ),
    "split": between("a, b = Split <axis=1>(h, s) c = Relu(a) t = Concat <axis=1>(b, c)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[2] s = {5, 3}>"
    ),
    "equal split": between("a, b = Split <axis=1>(h) t = Concat <axis=1>(b, a)"),
    "glu": between("a, b = Split <axis=1>(h) c = Sigmoid(b) t = Mul(a, c)", out=4),
    "slice": between("t = Slice(h, s, e, ax)", out=5).replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[1] s = {2}, int64[1] e = {7}, int64[1] ax = {1}>"
    ),
    "slice of positions": between("t = Slice(h, s, e, ax)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[1] s = {-4}, int64[1] e = {100}, int64[1] ax = {3}>"
    ),
    "slice to the end": between("t = Slice(h, s, e, ax)", out=3).replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[1] s = {-3}, int64[1] e = {100}, int64[1] ax = {1}>"
    ),
    "expand": between("p = GlobalAveragePool(h) t = Expand(p, s)").replace(
        "(float[1,4,N,M] y)", "(float[1,4,N,M] y) <int64[4] s = {1, 8, 6, 6}>"
    ),
    "depth to space": between("t = DepthToSpace <blocksize=2>(h)", out=2),
    "column, row": between('t = DepthToSpace <blocksize=2, mode="CRD">(h)', out=2),
    "space to depth": between("t = SpaceToDepth <blocksize=2>(h)", out=32),
    "several readers": between(
        "a = Relu(h) b = Sigmoid(h) c = MaxPool <kernel_shape=[1,1]>(h) t = Sum(a, b, c)"
    ),
    "two weights": between(
        "a = Conv(h, w2) b = Conv(h, w2) c = Concat <axis=1>(a, b) t = Relu(c)",
        weights=", float[6,8,1,1] w2",
        out=12,
    ),
    "flatten": dense("a = MaxPool <kernel_shape=[3,3], strides=[3,3]>(h) t = Flatten(a)", out=32),
    "reshape": dense("a = MaxPool <kernel_shape=[3,3], strides=[3,3]>(h) t = Reshape(a, s)", out=32).replace(
        "(float[N,4] y)", "(float[N,4] y) <int64[2] s = {0, 32}>"
    ),
    "reshape, rest": dense("a = GlobalAveragePool(h) t = Reshape(a, s)").replace(
        "(float[N,4] y)", "(float[N,4] y) <int64[2] s = {1, -1}>"
    ),
    "squeeze": dense("a = GlobalAveragePool(h) b = Squeeze(a, ax) c = Unsqueeze(b, z) t = Identity(c)")
    .replace("(float[N,4] y)", "(float[N,4] y) <int64[2] ax = {2, 3}, int64[1] z = {0}>")
    .replace("float[N,4] y", "float[1,1,4] y"),
    "mean of positions": dense("t = ReduceMean <axes=[2,3], keepdims=0>(h)"),
    "einsum": dense(
        'a = ReduceMean <axes=[2,3], keepdims=0>(h) t = Einsum <equation="bc,cd->bd">(a, w2)',
        weights=", float[8,6] w2",
        out=6,
    ),
    "gemm": GEMMS,
    "embedding": LOOKUP,
    "heads": HEADS,
    "LSTM": RECURRENT.format(OP="LSTM", G=32, B=64),
    "GRU": RECURRENT.format(OP="GRU", G=24, B=48),
    "RNN": RECURRENT.format(OP="RNN", G=8, B=16),
    "both directions": BOTH,
}


@pytest.mark.parametrize("name", CASES)
def test_silent_channels_are_removed_and_nothing_changes(name):
    before, after, pairs = remove_silent(made(CASES[name]), half)
    assert sum(len(numbers) for _, numbers in pairs), find_groups(before, widths=False)[1]
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert sum(np.prod(after.constant_type(n)[1]) for n in after.initializers if n[0] == "w") < sum(
        np.prod(before.constant_type(n)[1]) for n in before.initializers if n[0] == "w"
    )
    assert_equal(before, after)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("batchnorm", np.float16),
        ("heads", np.float16),
        ("depthwise", np.float16),
        ("heads", np.float64),
        ("gemm", np.float64),
    ],
)
def test_other_types(name, dtype):
    model = made(CASES[name], dtype)
    if name == "heads":
        model.set_constant("two", np.array(2.0, dtype))
    before, after, pairs = remove_silent(model, half)
    assert any(len(numbers) for _, numbers in pairs)
    assert_equal(before, after, relative=2e-2 if dtype == np.float16 else 1e-9)


REFUSED = {
    "output": (
        between("t = Relu(h)").replace("(float[1,4,N,M] y)", "(float[1,4,N,M] y, float[1,8,6,6] h)"),
        "output",
    ),
    "softmax": (between("t = Softmax <axis=1>(h)"), "works along it"),
    "normalized": (
        between(
            "a = Transpose <perm=[0,2,3,1]>(h) c = LayerNormalization(a, w2) t = Transpose <perm=[0,3,1,2]>(c)",
            weights=", float[8] w2",
        ),
        "mean and variance",
    ),
    "no rule": (
        between(
            "t = GroupNormalization <num_groups=2>(h, w2, w3)", weights=", float[2] w2, float[2] w3"
        ).join(['<ir_version: 9, opset_import: ["" : 18]>\n', ""]),
        "not known to let channels go",
    ),
    "size read": (between("s = Shape(h) f = Cast <to=1>(s) m = ReduceMean(f) t = Mul(h, m)"), "size is read"),
    "stepped slice": (
        between("t = Slice(h, s, e, a, st)", out=4).replace(
            "(float[1,4,N,M] y)",
            "(float[1,4,N,M] y) <int64[1] s = {0}, int64[1] e = {8}, int64[1] a = {1}, int64[1] st = {2}>",
        ),
        "takes some of it",
    ),
    "summed": (between("t = ReduceMax <axes=[1]>(h)", out=1), "sums it up"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    text, reason = REFUSED[name]
    groups, refusals = find_groups(made(text), widths=False)
    assert not groups
    assert any(reason in refusal.reason for refusal in refusals), refusals


def test_widths_are_cut_on_demand():
    model = made(REFUSED["normalized"][0])
    groups, _ = find_groups(model, widths=True)
    assert [group.size for group in groups] == [8]
    _, after, _ = remove_silent(model, half, widths=True)
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert after.constant_type("w2")[1] == (4,)


def test_a_body_is_a_graph_too():
    text = (
        HEADER
        + """g (bool c, float[2,6] x, float[6,8] w1, float[8,4] w2) => (float[2,4] y) {
      y = If (c) <then_branch = a () => (float[2,4] o) { h = MatMul(x, w1) t = Relu(h) o = MatMul(t, w2) },
                  else_branch = b () => (float[2,4] p) { k = MatMul(x, w1) p = MatMul(k, w2) }> }"""
    )
    model = made(text)
    before, after, pairs = remove_silent(model, half)
    assert len(pairs) == 2
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert_equal(before, after)


def test_declared_shapes_follow():
    proto = made(CASES["residual"]).to_model()
    inferred = onnx.shape_inference.infer_shapes(proto)
    declared = {value.name for value in inferred.graph.value_info}
    inferred.graph.value_info.append(
        onnx.helper.make_tensor_value_info("w1", onnx.TensorProto.FLOAT, [8, 3, 3, 3])
    )
    before, after, _ = remove_silent(Graph.load(inferred), half)
    assert "h" in declared
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert_equal(before, after)
    left = {value.name: value for value in after.to_model().graph.value_info}
    assert not {"h", "w1"} & left.keys()


def test_weights_in_constant_nodes():
    model = made(
        HEADER
        + """g (float[2,3] x) => (float[2,2] y) {
      w = Constant <value = float[3,4] {1,2,3,4,5,6,7,8,9,1,2,3}> ()
      v = Constant <value = float[4,2] {1,2,3,4,5,6,7,8}> ()
      h = MatMul(x, w) t = Relu(h) y = MatMul(t, v) }"""
    )
    before, after, pairs = remove_silent(model, half)
    assert sum(len(numbers) for _, numbers in pairs) == 2
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert after.constant_type("w")[1] == (3, 2)
    assert_equal(before, after)


STEPS = {
    "relu": "{o} = Relu({i})",
    "sigmoid": "{o} = Sigmoid({i})",
    "conv": "{o} = Conv({i}, w{n})",
    "residual": "r{n} = Conv({i}, w{n}) {o} = Add(r{n}, {i})",
    "depthwise": "{o} = Conv <group={c}, pads=[1,1,1,1]>({i}, w{n})",
    "dense": "r{n} = Conv({i}, w{n}) {o} = Concat <axis=1>({i}, r{n})",
    "gate": "r{n} = GlobalAveragePool({i}) s{n} = Conv(r{n}, w{n}) {o} = Mul({i}, s{n})",
    "halves": "a{n}, b{n} = Split <axis=1>({i}) {o} = Concat <axis=1>(b{n}, a{n})",
    "turn": "a{n} = Transpose <perm=[0,2,3,1]>({i}) b{n} = Neg(a{n}) {o} = Transpose <perm=[0,3,1,2]>(b{n})",
}


@settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.integers(0, 99))
def test_random_networks(steps, seed):
    weights, body, channels, value = ["float[6,3,1,1] w0"], ["h0 = Conv(x, w0)"], 6, "h0"
    for number, step in enumerate(steps, start=1):
        out = f"h{number}"
        grown = channels + 4 if step == "dense" else channels
        form = {"depthwise": (channels, 1, 3, 3), "dense": (4, channels, 1, 1)}.get(
            step, (channels, channels, 1, 1)
        )
        weights.append(f"float[{','.join(map(str, form))}] w{number}")
        body.append(STEPS[step].format(i=value, o=out, n=number, c=channels))
        value, channels = out, grown
    text = (
        f"g (float[1,3,4,4] x, {', '.join(weights)}, float[2,{channels},1,1] wl) => (float[1,2,4,4] y) "
        f"{{ {' '.join(body)} y = Conv({value}, wl) }}"
    )
    random = np.random.default_rng(seed)
    before, after, _ = remove_silent(
        made(text, seed=seed),
        lambda group: random.choice(group.size, random.integers(0, group.size), replace=False),
    )
    onnx.checker.check_model(after.to_model(), full_check=True)
    assert_equal(before, after)
