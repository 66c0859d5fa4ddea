"""Raise the opset of a whole model, bodies and functions included; weights and interface untouched."""

from __future__ import annotations

from onnx import NodeProto, defs

from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.opset_place import Place, StepError
from onnxslim_lab.opset_steps import STEPS


def raise_opset(graph: Graph, version: int) -> None:
    """Convert the model's standard operators to a newer opset, in place.

    Node by node, the operators whose meaning changed between the two opsets are rewritten where they stand
    (see `opset_steps`): in the main graph, in the bodies of If, Loop and Scan, and in local functions, each from
    the opset it is written in. Everything else stays as it is: weights, names, types and order of inputs and
    outputs, metadata, other domains. What was an attribute and has become an input is a Constant node.

    Args:
        graph: The main graph of the model.
        version: The opset to raise to; a model or function of an equal or newer one is left as it is.

    Raises:
        ModelError: a node cannot be written in that opset; it is named, and nothing was changed.
    """
    tops = [graph, *graph.functions.values()]
    if all(top.opset() >= version or not top.opset() for top in tops):
        return
    newest = defs.onnx_opset_version()
    if version > newest:
        raise ModelError(f"opset {version} is not known to the installed onnx; the newest is {newest}")
    _raise(graph.copy(), version)  # whatever cannot be converted fails here
    _raise(graph, version)


def _raise(root: Graph, version: int) -> None:
    root.infer()
    for top in [root, *root.functions.values()]:
        before = top.opset()
        if not 0 < before < version:
            continue
        for graph in _below(top):
            _raise_graph(Place(graph, root, version), before)
        top.set_opset("", version)


def _below(top: Graph) -> list[Graph]:
    """Return a graph and the bodies in it, without the model's functions."""
    return [graph for graph in top.walk() if graph.root is top]


def _raise_graph(place: Place, before: int) -> None:
    version = place.target
    for original in place.graph.nodes:
        node = original
        if domain_of(node.domain):
            continue
        op_type, name = node.op_type, node.name or next(iter(node.output), "")
        try:
            for opset in range(before + 1, version + 1):
                step = STEPS.get((node.op_type, opset)) or STEPS.get(("*", opset))
                if step is not None:
                    node = step(place, node) or node
            _check(node, version)
        except StepError as error:
            raise ModelError(
                f"node {quote(name)} ({op_type}) cannot be raised from opset {before} to {version}: {error}"
            ) from error


def _check(node: NodeProto, version: int) -> None:
    """Check a converted node against its operator's schema; what onnx does not know is another's."""
    try:
        schema = defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return
    if schema.deprecated:
        raise StepError(f"{node.op_type} does not exist there any more")
    for item in node.attribute:
        if item.name not in schema.attributes and schema.name != "Constant":
            raise StepError(f"it has no attribute {quote(item.name)} there")
    if not schema.min_input <= len(node.input) <= schema.max_input:
        raise StepError(f"it takes {schema.min_input} to {schema.max_input} inputs, not {len(node.input)}")
    if not schema.min_output <= len(node.output) <= schema.max_output:
        raise StepError(f"it has at most {schema.max_output} outputs, not {len(node.output)}")
