"""Check a pass on a pair of models in ONNX's textual syntax: their structure, and what they compute.

`check(FuseBatchnorm(), before, after)` applies the pass to `before`, compares the result with `after` up to
the names of inner values and the order of nodes, runs both on onnxruntime with optimizations off, and applies
the pass again, which must change nothing. `after=None` says that the pass must leave the model as it is.

A text that does not begin with "<" gets the header HEADER. Functions follow the graph, as ONNX writes them.
"""

from __future__ import annotations

import atexit
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.sessions import Runner

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
Feed = dict[str, Any]


def check(
    step: Pass,
    before: str | ModelProto | Graph,
    after: str | ModelProto | Graph | None = None,
    *,
    feeds: Sequence[Feed] | None = None,
    dims: Mapping[str, int] | None = None,
    run: bool = True,
    relative: float = 1e-5,
    context: Context | None = None,
) -> Outcome:
    """Apply the pass and assert the result; return its outcome.

    Args:
        step: The pass.
        before: The model it is given.
        after: The expected result; None when nothing may change.
        feeds: Inputs to run on; by default two random ones made from the input types.
        dims: Sizes of symbolic dimensions of random inputs (default 2 and 3 in the two feeds).
        run: Whether to run on onnxruntime (False where the model cannot be run).
        relative: Largest relative difference of the outputs.
        context: What the pass is given besides the graph.
    """
    original, result = load(before), load(before)
    outcome = step.run(result, context or Context())
    assert_same_structure(result, original if after is None else load(after))
    if after is None:
        assert not outcome.changes, f"nothing should change, but: {outcome.changes}"
    else:
        assert outcome.changes, "a change that the outcome does not tell"
    onnx.checker.check_model(result.to_model())
    assert_settled(step, result, context)
    if run:
        assert_equal_outputs(original, result, feeds, dims=dims, relative=relative)
    return outcome


def load(model: str | ModelProto | Graph) -> Graph:
    """Return a Graph of its own from text, a ModelProto or another Graph."""
    if isinstance(model, Graph):
        return model.copy()
    if isinstance(model, ModelProto):
        return Graph.load(model)
    return Graph.parse(model if model.lstrip().startswith("<") else HEADER + model)


def assert_settled(step: Pass, graph: Graph, context: Context | None = None) -> None:
    """Assert that the pass, applied once more, changes nothing and says so."""
    version, content = graph.version, graph.to_model()
    again = step.run(graph, context or Context())
    assert not again.changes, f"a second run changed {again.changes}"
    assert graph.to_model() == content, "a second run changed the model and did not say so"
    assert graph.version == version, "a second run edited the graph to the same content"


def assert_same_structure(result: Graph, expected: Graph) -> None:
    """Assert that two models are the same up to inner names and node order."""
    have, want = describe(result), describe(expected)
    shown = "\n".join(difflib.unified_diff(want, have, "expected", "result", lineterm="", n=50))
    assert have == want, "\n" + shown


def assert_equal_outputs(
    original: Graph,
    result: Graph,
    feeds: Sequence[Feed] | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    relative: float = 1e-5,
) -> None:
    """Assert that two models give the same outputs on onnxruntime with optimizations off."""
    if feeds is None:
        feeds = [random_feed(original, seed, dims or {}) for seed in (0, 1)]
    first = runner().run(original, feeds, optimization="off")
    second = runner().run(result, feeds, optimization="off")
    for one, two in zip(first, second, strict=True):
        assert list(one) == list(two)
        for name, value in one.items():
            if isinstance(value, np.ndarray):
                assert (value.dtype, value.shape) == (two[name].dtype, two[name].shape), name
    for error in compare_outputs(first, second):
        assert error.equal or (error.floating and not error.nonfinite and error.relative <= relative), error


@functools.cache
def runner() -> Runner:
    """Return the one onnxruntime child of the test process."""
    made = Runner(threads=1)
    atexit.register(made.close)
    return made


def random_feed(graph: Graph, seed: int, dims: Mapping[str, int]) -> Feed:
    """Return random inputs of a model's declared types; a symbolic dimension is 2 + seed unless `dims` says."""
    random = np.random.default_rng(seed)
    feed = {}
    for name, kind in graph.input_types().items():
        if name in graph.initializers:
            continue
        tensor = kind.tensor_type
        shape = [
            d.dim_value if d.HasField("dim_value") else dims.get(d.dim_param, 2 + seed)
            for d in tensor.shape.dim
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if tensor.elem_type == TensorProto.BOOL:
            feed[name] = random.random(shape) < 0.5
        elif dtype.kind in "iu":
            feed[name] = random.integers(0, 3, shape).astype(dtype)
        else:
            feed[name] = random.normal(size=shape).astype(dtype)
    return feed


def describe(model: Graph) -> list[str]:
    """Return lines that are equal for models that are equal up to inner names and node order."""
    lines = _describe(model, {}, "")
    for key in sorted(model.functions):
        lines += [f"function {key}", *_describe(model.functions[key], {}, "  ")]
    return lines


def _describe(graph: Graph, outer: dict[str, str], indent: str) -> list[str]:
    """Describe one graph: nodes depth first from the outputs, values numbered in that order."""
    names = {name: name for name in graph.inputs} if graph.parent is None else {}
    names |= {name: f"{indent}in{i}" for i, name in enumerate(graph.inputs) if graph.parent is not None}
    declared = graph.output_types() if graph.parent is None else {}
    lines = [
        f"{indent}inputs {[names[name] for name in graph.inputs]} outputs {list(declared) or len(graph.outputs)}"
    ]
    done: set[int] = set()
    roots = [name for name in graph.outputs if name]
    dead = [node for node in graph.nodes if not any(name and graph.use_count(name) for name in node.output)]
    roots += [next(filter(None, node.output), "") for node in dead]
    stack = [(name, False) for name in reversed(roots)]
    while stack:
        value, ready = stack.pop()
        node = graph.producer(value)
        if node is None or id(node) in done or _constant(graph, value):
            continue
        if not ready:
            stack.append((value, True))
            reads = [*node.input, *sorted(_captures(graph, node))]
            stack += [(name, False) for name in reversed(reads) if name]
            continue
        done.add(id(node))
        for name in filter(None, node.output):
            names[name] = f"{indent}v{len(names)}"
        known = {**outer, **names}
        made = ", ".join(names.get(name, "''") for name in node.output)
        read = ", ".join(_name(graph, known, name) for name in node.input)
        lines.append(f"{indent}{made} = {domain_of(node.domain)}:{node.op_type}{_attributes(node)}({read})")
        for key, bodies in sorted(graph.bodies(node).items()):
            for body in bodies:
                lines += [f"{indent}  {key}", *_describe(body, known, indent + "    ")]
    known = {**outer, **names}
    lines += [f"{indent}out {_name(graph, known, name)}" for name in graph.outputs]
    made = [name for node in graph.nodes for name in node.output if node.op_type == "Constant"]
    lines.append(f"{indent}constants {len(graph.initializers) + len(made)}")
    for name in (*graph.initializers, *graph.sparse_initializers):
        if not graph.use_count(name):
            lines.append(f"{indent}unused initializer {_constant(graph, name) or name}")
    return lines


def _captures(graph: Graph, node: NodeProto) -> set[str]:
    return {name for bodies in graph.bodies(node).values() for body in bodies for name in body.captured()}


def _name(graph: Graph, known: Mapping[str, str], value: str) -> str:
    return "''" if not value else _constant(graph, value) or known.get(value, value)


def _constant(graph: Graph, value: str) -> str:
    found = graph.constant_type(value)
    if found is None:
        return ""
    values = graph.constant(value)
    assert values is not None
    shown = np.array2string(values.reshape(-1), threshold=40, separator=",", precision=6)
    return f"{TensorProto.DataType.Name(found[0])}{list(found[1])}{shown}"


def _attributes(node: NodeProto) -> str:
    shown = []
    for item in sorted(node.attribute, key=lambda item: item.name):
        if item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            continue
        value = f"@{item.ref_attr_name}" if item.ref_attr_name else helper.get_attribute_value(item)
        shown.append(f"{item.name}={value}")
    return f"<{', '.join(shown)}>" if shown else ""
