"""fuse-linear: windows that every reader slices away are not computed; as text, at random and what stays."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from passes_helper import assert_equal_outputs, assert_settled, check, load

from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.fuse_linear import FuseLinear
from onnxslim_lab.passes.simplify import Simplify

QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
END = 2**63 - 1
W = "float[2,1,4] w = {1, 2, 3, 4, 5, 6, 7, 8}"
CUT = f"int64[1] i = {{%d}}, int64[1] e = {{{END}}}, int64[1] two = {{2}}"
Q4 = "int64[6] q = {0,0,4,0,0,2}"
LINES = 'p = Pad<mode = "reflect">(x, q) h = Conv<strides = [2]>(p, w)'


def model(lines, constants, size="8"):
    return f"g (float[n,1,{size}] x) => (float[n,2,a] y) <{W}, {constants}> {{ {lines} }}"


@pytest.mark.parametrize("mode", ["reflect", "edge"])
@pytest.mark.parametrize(
    ("begin", "start", "windows", "left"), [(4, 1, 1, 0), (5, 2, 2, 0), (4, 3, 2, 1), (3, 2, 1, 1)]
)
def test_pad_less_and_slice_less(mode, begin, start, windows, left):
    lines = LINES.replace("reflect", mode)
    size = 8 + begin % 2  # so that every place at the end is read
    pads = "int64[6] q = {0,0,%d,0,0,2}"
    cut = "k = Slice(h, i, e, two) y = Relu(k)"
    outcome = check(
        FuseLinear(),
        model(f"{lines} {cut}", f"{pads % begin}, {CUT % start}", size),
        model(
            f"{lines} {cut if left else 'y = Relu(h)'}",
            pads % (begin - 2 * windows) + (f", {CUT % left}" if left else ""),
            size,
        ),
    )
    shown = "1 window that nothing reads is" if windows == 1 else "2 windows that nothing reads are"
    assert [change.what for change in outcome.changes] == [f"{shown} not computed"]


def test_zeros_go_into_the_conv_once_windows_are_gone():
    check(
        FuseLinear(),
        model(
            "p = Pad(x, q) h = Conv<strides = [2]>(p, w) k = Slice(h, i, e, two) y = Relu(k)",
            f"int64[6] q = {{0,0,3,0,0,1}}, {CUT % 1}",
        ),
        f"""g (float[n,1,8] x) => (float[n,2,a] y) <{W}>
        {{ h = Conv<pads = [1,1], strides = [2]>(x, w) y = Relu(h) }}""",
    )


def test_the_spectra_of_an_stft():
    """As exporters write it: Pad of the samples, Unsqueeze, Conv, real and imaginary part sliced out."""
    head = "g (float[n,8] x) => (float[n,1,a] y)"
    lines = """p = Pad<mode = "reflect">(x, q) u = Unsqueeze(p, i) h = Conv<strides = [2]>(u, w)
    r = Slice(h, %s) m = Slice(h, %s) y = Add(r, m)"""
    check(
        FuseLinear(),
        f"""{head} <{W}, int64[4] q = {{0,3,0,2}}, int64[1] i = {{1}}, int64[2] s = {{0,1}},
        int64[2] e = {{1,{END}}}, int64[2] f = {{{END},{END}}}, int64[2] axes = {{1,2}}, int64[2] ones = {{1,1}},
        int64[2] v = {{1,1}}> {{ {lines % ("s, e, axes, ones", "v, f, axes, ones")} }}""",
        f"""{head} <{W}, int64[4] q = {{0,1,0,1}}, int64[1] i = {{1}}, int64[1] a = {{0}}, int64[1] b = {{1}},
        int64[1] c = {{1}}, int64[1] d = {{1}}, int64[1] f = {{{END}}}, int64[1] k = {{1}}, int64[1] l = {{1}},
        int64[1] o = {{1}}> {{ {lines % ("a, b, c, d", "k, f, l, o")} }}""",
    )


def test_what_shares_the_constants_keeps_them():
    graph = load(
        f"""g (float[n,1,8] x) => (float[n,2,a] y, int64[6] o, int64[1] z) <{W}, {Q4}, {CUT % 2}>
        {{ {LINES} k = Slice(h, i, e, two) y = Relu(k) o = Neg(q) z = Add(i, two) }}"""
    )
    result = graph.copy()
    assert len(FuseLinear().run(result).changes) == 1
    assert result.constant("q").tolist() == [0, 0, 4, 0, 0, 2]
    assert result.constant("i").tolist() == [2]
    assert_equal_outputs(graph, result)


def test_the_widths_by_axes():
    head = '<ir_version: 9, opset_import: ["" : 18]> '
    check(
        FuseLinear(),
        head
        + model(
            'p = Pad<mode = "edge">(x, q, , axes) h = Conv<strides = [2]>(p, w) y = Slice(h, i, e, axes)',
            f"int64[2] q = {{4,2}}, int64[1] axes = {{-1}}, int32[1] unused = {{0}}, {CUT % 3}",
        ),
        head
        + model(
            'p = Pad<mode = "edge">(x, q) h = Conv<strides = [2]>(p, w) y = Slice(h, i, e, axes)',
            f"int64[6] q = {{0,0,0,0,0,2}}, int64[1] axes = {{-1}}, int32[1] unused = {{0}}, {CUT % 1}",
        ),
    )


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        ("1", "4", "int64[1] i = {0}, int64[1] e = {3}"),
        ("1", "-1", "int64[1] i = {0}, int64[1] e = {-1}"),
        ("3", "1", "int64[1] i = {1}, int64[1] e = {0}"),
        ("-4", "-1", "int64[1] i = {-4}, int64[1] e = {-1}"),
        ("-5", "-1", "int64[1] i = {-5}, int64[1] e = {-1}"),
    ],
)
def test_bounds(start, end, left):
    reads = "y = Slice(h, i, e, two)"
    windows = 1 if start in ("1", "-5") else 2
    check(
        FuseLinear(),
        model(
            f"{LINES} {reads}",
            f"{Q4}, int64[1] i = {{{start}}}, int64[1] e = {{{end}}}, int64[1] two = {{2}}",
        ),
        model(
            f"{LINES} {reads}",
            f"int64[6] q = {{0,0,{4 - 2 * windows},0,0,2}}, {left}, int64[1] two = {{2}}",
        ),
    )


def test_the_least_start_counts_and_a_slice_of_all_stays_where_two_outputs_need_it():
    head = f"g (float[n,1,8] x) => (float[n,2,a] y, float[n,2,b] z) <{W}, "
    cut = f"int64[1] i = {{%d}}, int64[1] j = {{%d}}, int64[1] e = {{{END}}}, int64[1] two = {{2}}"
    reads = "y = Slice(h, i, e, two) z = Slice(h, j, e, two)"
    check(FuseLinear(), f"{head}{Q4}, {cut % (1, 2)}> {{ {LINES} {reads} }}",
          f"""{head}int64[6] q = {{0,0,2,0,0,2}}, int64[1] j = {{1}}, int64[1] e = {{{END}}}, int64[1] two = {{2}}>
          {{ {LINES.replace("h =", "y =")} z = Slice(y, j, e, two) }}""")  # fmt: skip


@pytest.mark.parametrize("size", ["8", "m"])
def test_padding_after_the_last_window(size):
    pads = "int64[6] q = {0,0,1,0,0,%d}"
    lines = LINES.replace("h =", "y =")
    check(FuseLinear(), model(lines, pads % 2, size), model(lines, pads % 1, size) if size == "8" else None,
          dims={"m": 8})  # fmt: skip


def test_padding_that_the_conv_adds_to_stays():
    lines = LINES.replace("strides = [2]", "strides = [2], pads = [1, 1]")
    check(FuseLinear(), model(lines.replace("h =", "y ="), "int64[6] q = {0,0,2,0,0,1}"), None)


def test_an_unknown_length_where_a_window_is_left_for_certain():
    cut = "k = Slice(h, i, e, two) y = Relu(k)"
    lines = LINES.replace("reflect", "constant").replace("(x, q)", "(x, q, one)")
    pads = "float one = {1}, int64[6] q = {0,0,%d,0,0,%d}"
    before = model(f"{lines} {cut}", f"{pads % (4, 2)}, {CUT % 2}", "m")
    after = model(f"{lines} {cut}", f"{pads % (2, 2)}, {CUT % 1}", "m")
    check(FuseLinear(), before, after, dims={"m": 3})


def stays(lines, constants, size="8", **options):
    check(FuseLinear(), model(lines, constants, size), None, dims={"m": 8}, **options)


@pytest.mark.parametrize(
    "lines",
    [
        f"{LINES} k = Slice(h, i, e, two) r = ReduceMax<keepdims = 1>(h) y = Add(k, r)",  # another reader
        f"{LINES} y = Slice(h, i, e, one)",  # along another axis
        f"{LINES} y = Slice(h, i, e, two, two)",  # every second window
        f"{LINES} k = Slice(h, i, e, two) g = Slice(h, zero, e, two) y = Concat<axis = 2>(k, g)",
        f"{LINES} k = Slice(h, i, e, two) g = ReduceMax<keepdims = 1>(p) y = Add(k, g)",
        f"{LINES.replace('strides = [2]', 'strides = [2], pads = [2, 0]')} y = Slice(h, i, e, two)",
        'p = Pad<mode = "reflect">(x, q) h = Conv<strides = [2], auto_pad = "SAME_UPPER">(p, w) y = Slice(h, i, e, two)',
        'p = Pad<mode = "reflect">(x, q) h = Conv<strides = [5]>(p, w) y = Slice(h, i, e, two)',
        'p = Pad<mode = "reflect">(x, q) r = Relu(p) h = Conv<strides = [2]>(r, w) y = Slice(h, i, e, two)',
    ],
)
def test_pads_that_stay(lines):
    constants = f"{Q4}, {CUT % 1}, int64[1] one = {{1}}, int64[1] zero = {{0}}"
    known = {name for name in ("one", "zero") if name in lines}
    spare = "".join(f" u{name} = Identity({name})" for name in {"one", "zero"} - known)
    stays(lines + spare, constants)


def test_a_length_that_may_leave_no_window_stays():
    stays(f"{LINES} y = Slice(h, i, e, two)", f"int64[6] q = {{0,0,4,0,0,1}}, {CUT % 2}", "m")


def test_a_conv_whose_result_is_an_output_stays():
    check(FuseLinear(), f"""g (float[n,1,8] x) => (float[n,2,a] y, float[n,2,b] h) <{W}, {Q4}, {CUT % 1}>
    {{ {LINES} y = Slice(h, i, e, two) }}""", None)  # fmt: skip


def test_a_conv_that_a_body_reads_stays():
    check(FuseLinear(), f"""g (float[n,1,8] x, bool c) => (float[n,2,a] y) <{W}, {Q4}, {CUT % 1}>
    {{ {LINES} k = Slice(h, i, e, two) y = If(c) <then_branch = t () => (float[n,2,b] u) {{ u = Relu(h) }},
    else_branch = f () => (float[n,2,d] v) {{ v = Identity(k) }}> }}""", None)  # fmt: skip


def test_bounds_that_are_inputs_stay():
    check(FuseLinear(), f"""g (float[n,1,8] x, int64[1] i) => (float[n,2,a] y) <{W}, {Q4}, int64[1] e = {{{END}}},
    int64[1] two = {{2}}> {{ {LINES} y = Slice(h, i, e, two) }}""", None, run=False)  # fmt: skip


def test_recorded_shapes_follow():
    graph = load(model(f"{LINES} k = Slice(h, i, e, two) y = Relu(k)", f"{Q4}, {CUT % 1}"))
    proto = graph.to_model()
    for name, shape in {"p": ["n", 1, 14], "h": ["n", 2, 6]}.items():
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    result = Graph.load(proto)
    FuseLinear().run(result)
    assert not {"p", "h"} & set(result.declared)
    known = result.shape_of("p"), result.shape_of("h")
    result.infer()
    assert known == (result.shape_of("p"), result.shape_of("h")) == (("n", 1, 12), ("n", 2, 5))


@st.composite
def sliced(draw):
    """Pad of one or two axes, a Conv, and one or two Slices of its windows."""
    rank, last = draw(st.integers(1, 2)), draw(st.booleans())
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    sizes = [draw(st.integers(2, 6)) for _ in range(rank)]
    mode = draw(st.sampled_from(["constant", "reflect", "edge"]))
    most = [size - 1 if mode == "reflect" else 5 for size in sizes]
    widths = [draw(st.integers(0, limit)) for limit in [*most, *most]]
    spans = [step * (taps - 1) + 1 for step, taps in zip(dilations, kernel, strict=True)]
    for axis in range(rank):
        while sizes[axis] + widths[axis] + widths[rank + axis] < spans[axis]:
            sizes[axis] += 1
    arrays = {
        "w": np.random.default_rng(draw(st.integers(0, 9999)))
        .normal(size=(2, 1, *kernel))
        .astype(np.float32),
        "value": np.float32(1),
        "one": np.int64([1]),
        "pads": np.int64([0, 0, *widths[:rank], 0, 0, *widths[rank:]]),
    }
    nodes = [helper.make_node("Pad", ["x", "pads", "value"], ["p"], mode=mode)]
    shape, value = [2, 1, *sizes], "p"
    if last:
        shape = [2, *sizes]
        arrays["pads"] = np.int64([0, *widths[:rank], 0, *widths[rank:]])
        nodes.append(helper.make_node("Unsqueeze", ["p", "one"], ["u"]))
        value = "u"
    nodes.append(helper.make_node("Conv", [value, "w"], ["h"], strides=strides, dilations=dilations))
    results = ["y", "z"][: draw(st.integers(1, 2))]
    axes = draw(st.sampled_from([[2], [-1], [1, 2], [2, 3], [3, 1, 2]]))
    axes = [axis for axis in axes if axis < 2 + rank]
    arrays["axes"] = np.int64(axes)
    for name in results:
        arrays[f"i{name}"] = np.int64([draw(st.integers(-2, 3)) for _ in axes])
        arrays[f"e{name}"] = np.int64([draw(st.sampled_from([END, -1, 1, 2, 4])) for _ in axes])
        nodes.append(helper.make_node("Slice", ["h", f"i{name}", f"e{name}", "axes"], [name]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(name, 1, None) for name in results],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@QUICK
@given(sliced())
def test_random_slices_of_windows_compute_the_same(graph):
    result = graph.copy()
    FuseLinear().run(result)
    assert_settled(FuseLinear(), result)
    assert_equal_outputs(graph, result, relative=1e-6)


def test_silero_computes_no_window_that_it_slices_away(zoo, zoo_feeds):
    name = "silero_vad_16k_sequence"
    original = Graph.load(zoo(name))
    result = original.copy()
    Simplify().run(result)
    result.infer()
    (stft,) = (node for node in result.nodes if node.name == "/stft/Conv")
    assert result.shape_of(stft.output[0])[1:] == (258, 4)  # 258 filters; it is 5 windows as exported
    assert_equal_outputs(original, result, list(zoo_feeds(name, 3, 0)))
