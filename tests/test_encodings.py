"""Every encoding of random arrays decodes bit for bit, in NumPy and on onnxruntime, and has the size it says."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import GraphProto, TensorProto, helper, numpy_helper

from onnxslim_lab.encodings import choice as encoding_choice
from onnxslim_lab.encodings.choice import all_options, dense_bytes, smallest_plan
from onnxslim_lab.encodings.facts import Facts, find_palette, narrow_types
from onnxslim_lab.encodings.grid import grid_options
from onnxslim_lab.encodings.options import Option
from onnxslim_lab.encodings.packing import index_width, pack, packed_bytes
from onnxslim_lab.encodings.plan import BFLOAT16, Plan, Target, bit_view, message, numpy_type, same_bits
from onnxslim_lab.encodings.sparse import best_low, distances_of, rice_bits, rice_code

IR_OF_OPSET = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 13: 7, 17: 8, 21: 10, 25: 13}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
SPECIAL = {
    "negative zero": 0x80000000,
    "NaN with a payload": 0x7FC01234,
    "signalling NaN": 0x7F800001,
    "subnormal": 0x00000001,
    "infinity": 0x7F800000,
}


def target_at(opset, **others):
    return Target(**{"name": "layer.weight", "opset": opset, "ir_version": IR_OF_OPSET[opset]} | others)


def model_of(plans, arrays):
    """Return a model whose outputs are the weights that the plans decode."""
    target = plans[0].target
    graph = GraphProto(name="decoders")
    for plan, array in zip(plans, arrays, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.output.append(helper.make_tensor_value_info(plan.target.name, kind, array.shape))
        for word, (data, stored) in (plan.tensors | plan.shared).items():
            graph.initializer.append(
                numpy_helper.from_array(data.astype(numpy_type(stored)), plan.full_name(word))
            )
            if target.ir_version < 4:
                entry = helper.make_tensor_value_info(plan.full_name(word), stored, data.shape)
                graph.input.append(entry)
        graph.node.extend(plan.node(step) for step in plan.steps)
    opset = helper.make_opsetid("", target.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=target.ir_version)


def plans_at(opset, array, prefix=""):
    """Return every option's plan, under names of its own."""
    plans = [option.build() for option in all_options(array, target_at(opset))]
    for number, plan in enumerate(plans):
        key = f"{prefix}{number}"
        plan.target = target_at(opset, name=f"w{key}", stem=f"e{key}", shared_stem=f"s{key}")
    return plans


def session(model, *, optimize, saved=""):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if saved:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model, *, optimize):
    """Return the outputs by name; bfloat16, which onnxruntime's Python API lacks, is widened: that is exact."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            name, value.name = value.name, f"{value.name}.wide"
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            model.graph.node.append(helper.make_node("Cast", [name], [value.name], to=TensorProto.FLOAT))
    names = [value.name for value in model.graph.output]
    values = session(model, optimize=optimize).run(None, {})
    return {
        name.removesuffix(".wide"): value.astype(BFLOAT16) if name.endswith(".wide") else value
        for name, value in zip(names, values, strict=True)
    }


@st.composite
def arrays(draw):
    dtype = np.dtype(BFLOAT16) if (name := draw(st.sampled_from(DTYPES))) == "bfloat16" else np.dtype(name)
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    distinct = draw(st.sampled_from([1, 2, 3, 7, 16, 40, 256, 5000]))
    scale = draw(st.sampled_from([1, 100, 1e5]))
    pool = rng.standard_normal(distinct) * scale
    values = rng.choice(np.rint(pool) if draw(st.booleans()) else pool, shape)
    if draw(st.booleans()):  # another codebook for each row
        values = values * (1 + np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))
    values[rng.random(shape) > draw(st.sampled_from([0.02, 0.1, 0.4, 1.0]))] = draw(
        st.sampled_from([0.0, -3.0])
    )
    if len(shape) > 1 and draw(st.booleans()):  # whole slices of background
        values[:, rng.random(shape[1]) > 0.5] = 0.0
    with np.errstate(all="ignore"):
        if draw(st.booleans()):
            values = values.astype(np.float16)
        array = values.astype(dtype)
    if dtype == np.float32 and draw(st.booleans()):
        array.view(np.uint32).reshape(-1)[rng.integers(array.size)] = draw(
            st.sampled_from(list(SPECIAL.values()))
        )
    return array


@settings(max_examples=60, deadline=None)
@given(arrays(), st.sampled_from(sorted(IR_OF_OPSET)))
def test_every_option_decodes_bit_for_bit_and_weighs_what_it_says(array, opset):
    if array.dtype == BFLOAT16 and opset < 13:
        opset = 13
    plans = plans_at(opset, array)
    for plan in plans:
        assert same_bits(plan.decode(), array), plan.encoding
        model = model_of([plan], [array])
        graph = GraphProto(
            initializer=model.graph.initializer, node=model.graph.node, input=model.graph.input
        )
        assert plan.size() == graph.ByteSize(), plan.encoding
    if plans:
        model = model_of(plans, [array] * len(plans))
        for optimize in (True, False):
            values = run(model, optimize=optimize)
            for plan in plans:
                assert same_bits(values[plan.target.name], array), (plan.encoding, optimize)


def sparse_weight(shape=(96, 120), density=0.1, values=15, seed=0):
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(values).astype(np.float32) if values else None
    weight = rng.choice(pool, shape) if values else rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < density, weight, np.float32(0))


def quantized(shape, scale, low, high, seed=0):
    integers = np.random.default_rng(seed).integers(low, high + 1, shape)
    return integers.astype(np.float32) * np.asarray(scale, np.float32)


SCALES = np.random.default_rng(5).uniform(0.001, 0.01, 64).astype(np.float32)

GROUPED = np.concatenate([sparse_weight((6, 200), density=1.0, values=16, seed=seed) for seed in range(20)])

EXAMPLES = {
    "codebook per 6 rows": GROUPED,
    "codebook per 6 columns": np.ascontiguousarray(GROUPED[:117].T),
    "int8 per row": quantized((64, 96), SCALES[:, None], -127, 127),
    "int4 per column": quantized((96, 64), SCALES, -7, 7),
    "uint8 per column": quantized((96, 64), SCALES, -30, 220),
    "int4 blocks": quantized((8, 4, 32), SCALES[:32].reshape(8, 4, 1), -8, 7).reshape(8, 128),
    "codebook 4": sparse_weight(density=1.0, values=16),
    "codebook 3": sparse_weight((33, 35), density=1.0, values=8),
    "codebook 2": sparse_weight((33, 35), density=1.0, values=4),
    "sparse codebook": sparse_weight(),
    "sparse odd": sparse_weight((37, 41), density=0.04, values=5),
    "sparse floats": sparse_weight(values=0),
    "empty columns": np.concatenate([np.zeros((96, 61), np.float32), sparse_weight((96, 60), 0.3)], 1),
    "empty kernels": np.concatenate(
        [np.zeros((9, 8, 3, 3), np.float32), sparse_weight((9, 5, 3, 3), 0.5)], 1
    ),
    "half": sparse_weight(density=1.0, values=0).astype(np.float16).astype(np.float32),
    "integers": np.arange(9000).reshape(90, 100),
    "constant": np.full((50, 60), -0.0, np.float32),
    "mask": np.tril(np.ones((64, 64), bool)),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_onnxruntime_folds_every_decoder_at_load(opset, tmp_path):
    plans, arrays = [], []
    for number, array in enumerate(EXAMPLES.values()):
        some = plans_at(opset, array, f"{number}x")
        plans += some
        arrays += [array] * len(some)
    assert len(plans) > 40
    session(model_of(plans, arrays), optimize=True, saved=tmp_path / "optimized.onnx")
    left = {
        output.split(".")[0]
        for node in onnx.load(tmp_path / "optimized.onnx").graph.node
        for output in node.output
    }
    assert not [plan.encoding for plan in plans if plan.target.stem in left or plan.target.name in left]


@pytest.mark.parametrize("opset", [7, 11, 17, 25])
def test_decoders_pass_the_checker_and_shape_inference_knows_the_weights(opset):
    plans = []
    for number, array in enumerate(EXAMPLES.values()):
        target = Target(f"w{number}", f"e{number}", f"s{number}", opset, IR_OF_OPSET[opset])
        plans.append((smallest_plan(array, target), array))
    found = [(plan[0], array) for plan, array in plans if plan is not None]
    assert len(found) > len(EXAMPLES) / 2
    onnx.checker.check_model(model_of(*zip(*found, strict=True)), full_check=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_choice_is_the_smallest_of_all(name):
    array, target = EXAMPLES[name], target_at(17)
    sizes = [option.build().size() for option in all_options(array, target)]
    found = smallest_plan(array, target)
    assert found is not None
    assert found[1] == found[0].size() == min(sizes) < dense_bytes(array, target)


def test_the_sparse_example_of_a_megabyte_matrix_is_forty_times_smaller():
    weight = sparse_weight((1024, 1024), 0.08)
    found = smallest_plan(weight, target_at(17))
    assert found is not None
    assert found[1] < 98_000  # 4-bit gaps with fillers take 114,275 bytes
    entropy = -1024 * 1024 * (0.08 * np.log2(0.08) + 0.92 * np.log2(0.92)) / 8 + 0.08 * 1024 * 1024 / 2
    assert found[1] < 1.03 * entropy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("codebook per 6 rows", "codebook of 16 for every 6 slices, 4-bit index"),
        ("codebook per 6 columns", "codebook of 16 for every 6 slices, 4-bit index"),
        ("int8 per row", "8-bit integers, scale per axis 0"),
        ("int4 per column", "4-bit integers, scale per axis 1"),
        ("uint8 per column", "8-bit integers, scale per axis 1"),
    ],
)
def test_structure_of_values_is_found(name, expected):
    found = smallest_plan(EXAMPLES[name], target_at(17))
    assert found is not None
    assert found[0].encoding == expected


def test_a_grid_that_one_value_leaves_is_not_used():
    array = EXAMPLES["int8 per row"].copy()
    array[5, 5] = np.nextafter(array[5, 5], np.float32(1))
    assert not list(grid_options(Facts(array), target_at(17)))


def test_random_floats_are_left_dense():
    assert smallest_plan(sparse_weight(density=1.0, values=0), target_at(17)) is None


def test_an_option_that_decodes_to_something_else_is_never_chosen(monkeypatch):
    array = EXAMPLES["half"]

    def wrong(facts, target):
        def build():
            plan = Plan(target, "wrong")
            plan.op("Cast", plan.tensor("narrow", np.zeros(array.shape, np.int8)), to=TensorProto.FLOAT)
            return plan.finish()

        return [Option(1, build)]

    monkeypatch.setattr(encoding_choice, "FAMILIES", (wrong,))
    assert smallest_plan(array, target_at(17)) is None


@pytest.mark.parametrize("name", ["negative zero", "NaN with a payload", "signalling NaN"])
def test_patterns_that_a_cast_may_lose_are_not_cast(name):
    array = np.zeros(4000, np.float32)
    array.view(np.uint32)[7] = SPECIAL[name]
    kinds = narrow_types(array)
    assert TensorProto.INT8 not in kinds
    assert (TensorProto.FLOAT16 in kinds) == (name == "negative zero")
    found = smallest_plan(array, target_at(17))
    assert found is not None
    assert same_bits(found[0].decode(), array)


@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 2**32))
def test_pack_takes_the_bytes_it_says(width, count, seed):
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    packed = pack(values, width)
    assert packed.dtype == np.uint8
    assert packed.size == packed_bytes(count, width)
    bits = np.unpackbits(packed)
    if 8 % width:
        planes = bits.reshape(width, -1)[:, :count]
        back = (1 << np.arange(width - 1, -1, -1)) @ planes
    else:
        back = bits.reshape(-1, width)[:count] @ (1 << np.arange(width - 1, -1, -1))
    assert (back == values).all()


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(0, 8))
def test_rice_code_gives_the_distances_back(distances, low):
    positions = np.concatenate([[0], np.cumsum(distances)])
    coded = distances_of(positions, int(positions[-1]) + 1)
    bitmap, rest = rice_code(coded, low)
    assert rice_bits(coded, low) == len(coded) * low + bitmap.size
    ones = np.flatnonzero(bitmap)
    assert (rest < 1 << low).all()
    steps = np.diff(ones, append=bitmap.size)
    assert ((steps << low) - rest == coded).all()


@given(st.integers(1, 400), st.integers(0, 2**32))
def test_best_low_is_the_best_of_all(mean, seed):
    distances = np.random.default_rng(seed).geometric(1 / mean, 400)
    best = min(rice_bits(distances, low) for low in range(9))
    assert rice_bits(distances, best_low(distances)) <= 1.02 * best


@settings(deadline=None)
@given(st.sampled_from([8, 16, 32, 64]), st.integers(1, 300), st.integers(0, 2**32))
@example(32, 256, 0)
@example(32, 257, 0)
def test_palette_agrees_with_unique(width, count, seed):
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 1 << width, count, dtype=np.dtype(f"u{width // 8}"))
    bits = rng.choice(pool, 40_000)
    bits[-1] = pool[0]
    expected = np.unique(bits)
    palette = find_palette(bits)
    assert (palette is None) == (len(expected) > 256)
    if palette is not None:
        assert (palette.values == expected).all()
        assert (palette.values[palette.index] == bits).all()
        assert (palette.counts == np.unique(bits, return_counts=True)[1]).all()


def test_facts_are_computed_on_the_bits():
    facts = Facts(np.array([[0.0, -0.0]], np.float32))
    assert facts.palette is not None
    assert len(facts.palette.values) == 2
    assert bit_view(facts.array).tolist() == [[0, 0x80000000]]


def test_index_width_and_message_size():
    assert [index_width(count) for count in (1, 2, 3, 256)] == [1, 1, 2, 8]
    assert message(200) == 203
