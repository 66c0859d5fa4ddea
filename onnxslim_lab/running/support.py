"""What the NumPy runtime cannot run, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import AttributeProto, NodeProto, TensorProto, TypeProto, helper

from onnxslim_lab.errors import UnsupportedError, quote
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.kernels import lookup
from onnxslim_lab.running import functions as runtime_functions
from onnxslim_lab.running.control import CONTROL
from onnxslim_lab.running.program import label

_DEEPEST = 8  # function bodies within function bodies


@dataclass(frozen=True)
class Missing:
    """An operator without kernel and function body, at one node.

    Attributes:
        domain: The operator's domain, "" for ai.onnx.
        op_type: The operator.
        version: The version of the domain that the model imports.
        node: What errors call the node.
    """

    domain: str
    op_type: str
    version: int
    node: str

    def __str__(self) -> str:
        version = f"version {self.version}" if self.version else "not imported"
        return f"operator {quote(self.op_type)} of domain {quote(self.domain or 'ai.onnx')} ({version}), {self.node}"


def supports(graph: Graph) -> list[Missing]:
    """Return what is missing to run a model, in the order of its nodes; nothing runs.

    Bodies and local functions count. An operator whose body in the specification depends on the types
    of its inputs is looked at with the types that inference gives, float32 where it gives none.
    """
    return [missing for part in _reachable(graph) for missing in _missing(part, 0)]


def _reachable(graph: Graph) -> Iterator[Graph]:
    """Yield the main graph, its bodies, and the functions that are called from these and from functions."""
    waiting, seen = [graph], {id(graph)}
    while waiting:
        top = waiting.pop(0)
        for part in top.walk():
            if part.root is not top:
                continue  # a function: only when it is called
            yield part
            for node in part.nodes:
                called = graph.functions.get((domain_of(node.domain), node.op_type, node.overload))
                if called is not None and id(called) not in seen:
                    seen.add(id(called))
                    waiting.append(called)


def require(graph: Graph) -> None:
    """Raise an error that names everything that is missing.

    Raises:
        UnsupportedError: Something is.
    """
    found = supports(graph)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UnsupportedError(f"the NumPy runtime lacks {'; '.join(map(str, found[:5]))}{more}")


def _missing(graph: Graph, depth: int) -> Iterator[Missing]:
    """Yield what one graph's own nodes lack."""
    for node in graph.nodes:
        domain = domain_of(node.domain)
        version = graph.opset(domain)
        if (domain, node.op_type, node.overload) in graph.functions:
            continue
        if graph.bodies(node) or (domain, node.op_type) in CONTROL:
            known = (domain, node.op_type) in CONTROL and version > 0 and not _refers_to_body(node)
        else:
            known = lookup(node.op_type, domain, version) is not None or _has_body(node, graph, depth)
        if not known:
            yield Missing(domain, node.op_type, version, label(node))


def _refers_to_body(node: NodeProto) -> bool:
    """Whether a body comes from the call of the function around the node."""
    return any(item.ref_attr_name and item.type == AttributeProto.GRAPH for item in node.attribute)


def _has_body(node: NodeProto, graph: Graph, depth: int) -> bool:
    """Whether the specification gives a body for a node, all of whose nodes can be computed."""
    schema = runtime_functions.schema_of(node, graph)
    if schema is None or depth >= _DEEPEST:
        return False
    plain = NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, output=node.output)
    plain.attribute.extend(item for item in node.attribute if not item.ref_attr_name)
    types = None if schema.has_function else [_type(name, graph) for name in node.input]
    try:
        body = runtime_functions.body(schema, plain, graph.opset(node.domain), types)
    except RuntimeError:  # what onnx raises where its builder cannot cope
        return False
    if body is None:
        return False
    return all(next(_missing(part, depth + 1), None) is None for part in body.walk())


def _type(name: str, graph: Graph) -> TypeProto:
    if not name:
        return TypeProto()
    return graph.type_of(name) or helper.make_tensor_type_proto(TensorProto.FLOAT, None)
