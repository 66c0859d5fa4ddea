"""Replace calls of local functions by their nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import onnx
from onnx import AttributeProto, NodeProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.graph import FunctionKey, Graph, domain_of
from onnxslim_lab.rewriting.inlining import replace_node
from onnxslim_lab.rewriting.removal import label

MOST_NODES = (
    1_000_000  # a few functions that call each other twice can stand for more nodes than memory holds
)


class InlineFunctions(Pass):
    """Replace calls of local functions by their nodes, also in bodies and in other functions.

    before: y = my.gelu(x)
    after:  a = Erf(x); b = Mul(x, a); ... y = ...

    References to the call's attributes take its values or the function's defaults; inputs the call leaves
    out are left out. Functions that nothing calls any more go.

    refuses: a function written for another version of an operator set, where an operator it uses differs
    between the two; calls that pass a graph as an attribute.

    Raises ModelError for functions that call themselves, directly or through others.

    >>> InlineFunctions.pass_name()
    'inline-functions'
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Inline into the main graph first, then into functions that had to stay."""
        outcome = Outcome()
        if not graph.functions:
            return outcome
        _check_size(graph)
        _inline_all(graph, outcome)
        _drop_uncalled(graph)
        for function in list(graph.functions.values()):
            _inline_all(function, outcome)
        _drop_uncalled(graph)
        return outcome


def _key(node: NodeProto) -> FunctionKey:
    return domain_of(node.domain), node.op_type, node.overload


def _all_nodes(graph: Graph) -> Iterator[tuple[Graph, NodeProto]]:
    """Yield the nodes of a graph and of its bodies, with the graph of each."""
    for node in graph.nodes:
        yield graph, node
        for bodies in graph.bodies(node).values():
            for body in bodies:
                yield from _all_nodes(body)


def _check_size(graph: Graph) -> None:
    """Raise ModelError when functions are recursive or stand for too many nodes."""
    sizes: dict[FunctionKey, int] = {}
    calls = {
        key: [_key(node) for _, node in _all_nodes(function)] for key, function in graph.functions.items()
    }
    for first in calls:
        stack = [first]
        open_calls: set[FunctionKey] = set()
        while stack:
            key = stack[-1]
            if key in sizes:
                stack.pop()
                continue
            open_calls.add(key)
            waiting = [callee for callee in calls[key] if callee in calls and callee not in sizes]
            if waiting:
                if waiting[0] in open_calls:
                    raise ModelError(
                        f"function {quote(waiting[0][1])} calls itself, directly or through others"
                    )
                stack.append(waiting[0])
                continue
            sizes[key] = sum(sizes.get(callee, 1) for callee in calls[key])
            open_calls.discard(key)
            stack.pop()
    total = sum(sizes.get(_key(node), 1) for _, node in _all_nodes(graph))
    if total > MOST_NODES:
        raise ModelError(f"with its functions inlined the model has {total} nodes, more than {MOST_NODES}")


def _inline_all(top: Graph, outcome: Outcome) -> None:
    """Inline the calls of a graph and its bodies, and the calls that this brings."""
    reasons: dict[FunctionKey, str] = {}
    waiting = [item for item in _all_nodes(top) if _key(item[1]) in top.functions][::-1]
    while waiting:
        graph, node = waiting.pop()
        key = _key(node)
        function = top.functions[key]
        if key not in reasons:
            reasons[key] = _obstacle(graph, function)
        reason = reasons[key]
        if any(item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for item in node.attribute):
            reason = "the call passes a graph as an attribute"
        if reason:
            outcome.refuse(label(node), reason)
            continue
        outcome.change(label(node), f"replaced by the nodes of function {key[1]}")
        waiting += [item for item in _inline(graph, node, function) if _key(item[1]) in top.functions][::-1]


def _obstacle(graph: Graph, function: Graph) -> str:
    """Return why a function cannot stand in a graph, "" when it can; import what the graph lacks."""
    missing: dict[str, int] = {}
    for _, node in _all_nodes(function):
        domain = domain_of(node.domain)
        theirs, ours = function.opset(domain), graph.opset(domain)
        if _key(node) in graph.functions or theirs in (0, ours):
            continue
        if ours == 0 and missing.setdefault(domain, theirs) == theirs:
            continue
        try:
            same = _since(node, theirs) == _since(node, ours)
        except onnx.defs.SchemaError:
            same = False
        if not same:
            return (
                f"function {quote(function.name)} uses {node.op_type} of operator set {domain or 'ai.onnx'} "
                f"{theirs}, the model has {ours}"
            )
    for domain, version in missing.items():
        graph.set_opset(domain, version)
    return ""


def _since(node: NodeProto, version: int) -> int:
    return int(onnx.defs.get_schema(node.op_type, version, domain_of(node.domain)).since_version)


def _inline(graph: Graph, node: NodeProto, function: Graph) -> list[tuple[Graph, NodeProto]]:
    """Put a function's nodes in the place of a call; return them, with those in their bodies."""
    formal = function.inputs
    actual = [*node.input, *[""] * (len(formal) - len(node.input))]
    made = [next(filter(None, inner.output), "") for inner in function.nodes]
    names = graph.absorb(function, dict(zip(formal, actual, strict=False)))
    values = {item.name: item for item in node.attribute}
    for name, item in function.attribute_defaults().items():
        values.setdefault(name, item)
    added: list[tuple[Graph, NodeProto]] = []
    for name in filter(None, made):
        copy = graph.producer(names[name])
        assert copy is not None
        added.append((graph, copy))
        for bodies in graph.bodies(copy).values():
            for body in bodies:
                added += _all_nodes(body)
    for home, inner in added:
        _bind(home, inner, values)
    replace_node(graph, node, [names[result] for result in function.outputs])
    return added


def _bind(graph: Graph, node: NodeProto, values: dict[str, AttributeProto]) -> None:
    """Replace references to the function's attributes by values; without one the attribute is absent."""
    for item in list(node.attribute):
        if item.ref_attr_name:
            name, value = item.name, values.get(item.ref_attr_name)
            if value is None:
                graph.remove_attribute(node, name)
            else:
                graph.set_attribute(node, name, value)


def _drop_uncalled(graph: Graph) -> None:
    """Remove functions that neither the main graph nor another function calls, until all left are called."""
    while True:
        called = {_key(node) for _, node in _all_nodes(graph)}
        for key, function in graph.functions.items():
            called |= {_key(node) for _, node in _all_nodes(function)} - {key}
        unused = [key for key in graph.functions if key not in called]
        for key in unused:
            graph.remove_function(key)
        if not unused:
            return
