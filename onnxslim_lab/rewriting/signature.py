"""Keys that are equal for nodes, and for bodies, that compute the same from the same values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from onnx import AttributeProto, NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.rewriting.certain import all_equal

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
COMMUTATIVE = frozenset(
    {"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Max", "Min"}
)
COUNTED = frozenset({"Split", "If", "Loop", "Scan"})  # the number of outputs is part of what they do

Names = Mapping[str, Hashable]


def is_random(graph: Graph, node: NodeProto) -> bool:
    """Whether two runs of a node may differ: random numbers, also in its bodies or its function.

    Operators of unknown domains count as random: they may have state.
    """
    domain = domain_of(node.domain)
    function = graph.functions.get((domain, node.op_type, node.overload))
    if function is not None:
        return any(is_random(function, inner) for inner in function.nodes)
    if domain not in {"", "ai.onnx.ml"} or node.op_type in RANDOM:
        return True
    if node.op_type == "Dropout":
        if any(item.ref_attr_name for item in node.attribute):
            return True
        if graph.opset() < 7:
            return not attribute(node, "is_test", 0)
        training = node.input[2] if len(node.input) > 2 else ""
        return training != "" and not all_equal(graph, training, 0)
    bodies = (body for group in graph.bodies(node).values() for body in group)
    return any(is_random(body, inner) for body in bodies for inner in body.nodes)


def node_key(graph: Graph, node: NodeProto, names: Names | None = None) -> Hashable:
    """Return a key of what a node computes: operator, attributes, bodies and inputs, not its outputs' names.

    Args:
        graph: The graph of the node.
        node: The node.
        names: What stands for a value's name where another name may stand for the same.
    """
    names = names or {}
    domain = domain_of(node.domain)
    inputs: list[Hashable] = [names.get(name, name) for name in node.input]
    while inputs and inputs[-1] == "":
        inputs.pop()
    if not domain and node.op_type in COMMUTATIVE and len(inputs) == 2 and graph.opset() >= 7:
        inputs.sort(key=repr)
    bodies = graph.bodies(node)
    attributes: list[tuple[str, Hashable]] = []
    for item in sorted(node.attribute, key=lambda item: item.name):
        if item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) and item.name in bodies:
            attributes.append((item.name, tuple(body_key(body, names) for body in bodies[item.name])))
        else:
            attributes.append((item.name, item.SerializeToString(deterministic=True)))
    count = len(node.output) if domain or node.op_type in COUNTED else 0
    return domain, node.op_type, node.overload, tuple(inputs), tuple(attributes), count


def body_key(body: Graph, names: Names) -> Hashable:
    """Return a key of what a body computes, equal up to the names of what it defines.

    Args:
        body: The body of a control-flow node.
        names: As for `node_key`, of the graphs around the body.
    """
    known: dict[str, Hashable] = dict(names)
    known |= {name: ("input", index, len(names)) for index, name in enumerate(body.inputs)}
    known |= {name: ("constant", body.constant_key(name)) for name in body.initializers}
    known |= {name: ("sparse", name) for name in body.sparse_initializers}
    nodes: list[Hashable] = []
    for node in body.nodes:
        nodes.append((node_key(body, node, known), tuple(map(bool, node.output))))
        known |= {name: ("node", len(nodes), index, len(names)) for index, name in enumerate(node.output)}
    types = tuple(kind.SerializeToString(deterministic=True) for kind in body.output_types().values())
    return len(body.inputs), tuple(nodes), tuple(known.get(name, name) for name in body.outputs), types
