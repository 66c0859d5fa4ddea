"""Kernels against the specification's schemas and the official backend node tests."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels import kernel, lookup, run, sizes
from onnxslim_lab.kernels.dtypes import DTYPES, NUMBERS
from onnxslim_lab.kernels.registry import IGNORED, kernels
from onnxslim_lab.passes.fold_constants import FoldConstants

HISTORY = {}
for schema in onnx.defs.get_all_schemas_with_history():
    HISTORY.setdefault((schema.domain, schema.name), []).append(schema)

HALF = (
    "the reference rounds sums of half types at every step; MatMul here adds in float32, as onnxruntime does"
)
DRAWN = "the values are drawn at random"
EXCLUDED = {
    "test_bernoulli": DRAWN,
    "test_bernoulli_double": DRAWN,
    "test_bernoulli_seed": DRAWN,
    "test_bernoulli_expanded": DRAWN,
    "test_bernoulli_double_expanded": DRAWN,
    "test_bernoulli_seed_expanded": DRAWN,
    "test_training_dropout": DRAWN,
    "test_training_dropout_default": DRAWN,
    "test_training_dropout_default_mask": DRAWN,
    "test_training_dropout_mask": DRAWN,
    "test_attention_4d_causal_bf16": HALF,
    "test_attention_4d_causal_fp16": HALF,
    "test_attention_4d_padded_kv_bf16": HALF,
    "test_attention_4d_causal_padded_kv_bf16": HALF,
    "test_attention_4d_attn_mask_causal_bf16": HALF,
    "test_attention_3d_causal_bf16": HALF,
    "test_attention_3d_causal_bf16_expanded": HALF,
    "test_attention_4d_attn_mask_causal_bf16_expanded": HALF,
    "test_attention_4d_causal_bf16_expanded": HALF,
    "test_attention_4d_causal_fp16_expanded": HALF,
    "test_attention_4d_causal_padded_kv_bf16_expanded": HALF,
    "test_attention_4d_padded_kv_bf16_expanded": HALF,
}


def covered(known):
    """Yield the schemas a kernel answers for: from its own version to before the next kernel's."""
    for schema in HISTORY[known.domain, known.op_type]:
        if lookup(known.op_type, known.domain, schema.since_version) is known:
            yield schema


SPECIFIED = [known for known in kernels() if (known.domain, known.op_type) in HISTORY]


@pytest.mark.parametrize("known", SPECIFIED, ids=lambda known: f"{known.op_type}-{known.since}")
def test_signature_is_the_schemas(known):
    schemas = list(covered(known))
    assert any(schema.since_version == known.since for schema in schemas)
    for schema in schemas:
        parameters = inspect.signature(known.function).parameters
        inputs = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
        named = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        named.pop("output_count", None)
        assert [p.name for p in inputs] == [i.name for i in schema.inputs]
        for parameter, formal in zip(inputs, schema.inputs, strict=True):
            option = onnx.defs.OpSchema.FormalParameterOption
            variadic = formal.option == option.Variadic
            assert (parameter.kind is parameter.VAR_POSITIONAL) == variadic
            expected = None if formal.option == option.Optional else parameter.empty
            if known.op_type != "OptionalHasElement":  # optional from opset 18 on
                assert parameter.default is expected
        attributes = {name: attribute for name, attribute in schema.attributes.items() if name not in IGNORED}
        clash = {i.name for i in schema.inputs} & set(attributes)
        assert set(named) >= set(attributes) - clash
        for name, parameter in named.items():
            if name not in attributes:  # a later version's attribute with a default that changes nothing
                assert (known.op_type, name) in {("SpaceToDepth", "mode"), ("DepthToSpace", "mode")}
                continue
            attribute = attributes[name]
            if attribute.required:
                assert parameter.default is parameter.empty
            elif not attribute.default_value.name:
                assert parameter.default is None
            else:
                value = onnx.helper.get_attribute_value(attribute.default_value)
                value = value.decode() if isinstance(value, bytes) else value
                if isinstance(value, list):
                    value = tuple(item.decode() if isinstance(item, bytes) else item for item in value)
                assert parameter.default == (pytest.approx(value) if isinstance(value, float) else value)


def attribute_value(attribute):
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SparseTensorProto):
        dense = np.zeros(list(value.dims), numpy_helper.to_array(value.values).dtype)
        places = numpy_helper.to_array(value.indices)
        places = np.unravel_index(places, dense.shape) if places.ndim == 1 else tuple(places.T)
        dense[places] = numpy_helper.to_array(value.values)
        return dense
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [item.decode() for item in value]
    return value


def array(value):
    """Return a test's tensor as an array."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def evaluate(model, feeds):
    """Run a model with kernels only."""
    values = {i.name: array(value) for i, value in zip(model.graph.input, feeds, strict=False)}
    values |= {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    opsets = {o.domain: o.version for o in model.opset_import}
    for node in model.graph.node:
        found = lookup(node.op_type, node.domain, opsets.get(node.domain, 0))
        inputs = [values[name] if name else None for name in node.input]
        attributes = {a.name: attribute_value(a) for a in node.attribute}
        results = run(found, inputs, attributes, len(node.output))
        check_prediction(found, inputs, attributes, results)
        values.update(zip(node.output, results, strict=False))
    return [values[o.name] for o in model.graph.output]


def check_prediction(found, inputs, attributes, results):
    """Assert that what was predicted, from stand-ins where that is allowed, is what came out."""
    first = 0 if found.op_type in sizes.READS_FIRST else 1
    if found.op_type in sizes.READS_VALUES:
        given = [stand_in(value) if k < first else value for k, value in enumerate(inputs)]
    else:
        given = [stand_in(value) for value in inputs]
    predicted = sizes.predict(found, given, attributes, len(results))
    total = sum(map(sizes.stored_bytes, results))
    if predicted is None:
        assert found.op_type == "Constant" or sizes.bound(found, inputs, attributes) + 64 >= total
        return
    for guess, result in zip(predicted, results, strict=False):
        assert (guess.shape, guess.dtype) == (result.shape, result.dtype), found.op_type


def stand_in(value):
    return value if value is None or value.dtype == object else sizes.stand_in(value.shape, value.dtype)


def load_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    for case in cases:
        opsets = {o.domain: o.version for o in case.model.opset_import}
        nodes = case.model.graph.node
        found = [lookup(n.op_type, n.domain, opsets.get(n.domain, 0)) for n in nodes]
        if all(known and known.tensors for known in found) and not any(
            a.ref_attr_name for n in nodes for a in n.attribute
        ):
            yield case


def plain(value):
    """Return an array that NumPy can compare: the small types as float32."""
    value = np.asarray(value)
    if value.dtype in NUMBERS and value.dtype.kind == "V":
        return value.astype(np.float32)
    return value


def check(want, have, case):
    """Assert that a result has the type, the shape and the values wanted."""
    assert have.shape == want.shape
    if want.dtype == object or want.dtype.kind in "US":
        decoded = [text.decode() if isinstance(text, bytes) else text for text in want.reshape(-1).tolist()]
        assert have.reshape(-1).tolist() == decoded
    else:
        assert have.dtype == want.dtype, f"{have.dtype} is not {want.dtype}"
        np.testing.assert_allclose(plain(have), plain(want), rtol=case.rtol, atol=case.atol)


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in load_cases()}


def test_backend_node_tests(cases):
    assert len(cases) > 850
    failures = {}
    for name, case in cases.items():
        for feeds, wanted in case.data_sets:
            try:
                got = evaluate(case.model, feeds)
                for want, have in zip(map(array, wanted), got, strict=True):
                    check(want, have, case)
            except Exception as error:  # noqa: BLE001 - every case is run, then all that failed are shown
                failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    unexpected = {name: text for name, text in failures.items() if name not in EXCLUDED}
    assert not unexpected, "\n".join(f"{name}: {text}" for name, text in unexpected.items())
    assert set(EXCLUDED) <= set(failures), "an excluded test passes: take it off the list"


def test_bare_import_is_refused():
    code = "import sys; sys.path.insert(0, '.'); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import onnxslim_lab.kernels, not kernels" in done.stderr


def test_every_element_type_of_the_specification_has_a_dtype():
    numbers = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
    assert set(DTYPES) == numbers
    for number in numbers - {onnx.TensorProto.STRING}:
        assert DTYPES[number] == onnx.helper.tensor_dtype_to_np_dtype(number)


def test_no_kernel_is_registered_twice():
    with pytest.raises(ValueError, match="registered twice"):
        kernel("Identity", since=1)(np.copy)


def as_constants(model, feeds):
    """Return the model with its inputs turned into initializers."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.ir_version = max(made.ir_version, 4)
    if not any(opset.domain in {"", "ai.onnx"} for opset in made.opset_import):
        made.opset_import.append(onnx.helper.make_opsetid("", 21))
    for value, feed in zip(model.graph.input, feeds, strict=False):
        tensor = numpy_helper.from_array(array(feed), value.name)
        made.graph.initializer.append(tensor)
    made.graph.ClearField("input")
    return made


def test_backend_cases_of_constants_fold_to_the_expected_outputs(cases):
    random = {"test_bernoulli", "test_training_dropout_zero_ratio", "test_training_dropout_zero_ratio_mask"}
    folded, failures = 0, {}
    for name, case in cases.items():
        if name in EXCLUDED or name in random:
            continue
        feeds, wanted = case.data_sets[0]
        try:
            graph = Graph.load(as_constants(case.model, feeds))
            outcome = FoldConstants(allow_growth=True).run(graph)
            for want, output in zip(map(array, wanted), graph.outputs, strict=True):
                have = graph.constant(output)
                if have is None:
                    reasons = [refusal.reason for refusal in outcome.refusals]
                    assert any("quantization" in text or "memory" in text for text in reasons), outcome
                else:
                    check(want, have, case)
                    folded += 1
            onnx.checker.check_model(graph.to_model())
        except Exception as error:  # noqa: BLE001 - every case is run, then all that failed are shown
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    assert not failures, "\n".join(f"{name}: {text}" for name, text in failures.items())
    assert folded > 800
