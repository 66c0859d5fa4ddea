"""Symbolic shapes and small integer tensors of a whole model, in one pass over its nodes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.nodes import domain_of
from onnxslim_lab.symbols import layer_rules as layer_shape_rules
from onnxslim_lab.symbols import value_rules
from onnxslim_lab.symbols.facts import Constants, Elements, Facts, ImpossibleError, Shape, Step

BRANCHES = {True: "then_branch", False: "else_branch"}
MOST_VISITS = 20_000  # nodes visited again, at most, to try out conditions

Way = tuple[tuple[int, str, int], ...]  # from the main graph to a body: node id, attribute, position


def propagate(graph: Graph) -> Facts:
    """Return what is known of a graph's values, bodies included (`Facts.bodies`).

    Types come from `Graph.infer`, which callers run first when they have edited the graph. A symbolic
    name that several inputs share is one size, as ONNX specifies; every other unknown size is its own.

    A condition is also decided (`Facts.decided`) when one of its branches must fail, or when assuming one
    outcome makes a node fail that runs whenever the If runs: exporters write `If(size == 1)` with a result
    of rank 2 or 3 that goes into an LSTM, which only takes one of them.
    """
    facts = _propagate(graph, None, {})
    visits = sum(len(inner) for inner in graph.walk()) + 1
    tries = MOST_VISITS // visits
    decided: dict[int, bool] = {}
    tried: set[int] = set()
    while tries >= 2:
        key, way = next((found for found in _open_conditions(facts) if found[0] not in tried), (0, ()))
        if not key:
            break
        tried.add(key)
        tries -= 2
        for outcome in (True, False):
            if not facts.impossible and _fails(
                _propagate(graph, None, {**decided, key: outcome}, facts.constants), way
            ):
                decided[key] = not outcome
                facts = _propagate(graph, None, decided, facts.constants)
                tries -= 1
                break
    return facts


def _propagate(
    graph: Graph, parent: Facts | None, assumed: dict[int, bool], constants: Constants | None = None
) -> Facts:
    """Visit the nodes once, with the outcomes of some conditions given by the id of their If."""
    facts = Facts(graph, parent, constants)
    for node in graph.nodes:
        standard = domain_of(node.domain) == ""
        bodies = graph.bodies(node)
        if bodies and not (standard and node.op_type == "If"):
            facts.bodies[id(node)] = {
                name: tuple(_propagate(body, facts, assumed) for body in inner)
                for name, inner in bodies.items()
            }
        if standard and node.op_type != "Constant":
            try:
                _learn(facts, node, assumed)
            except ImpossibleError:
                facts.impossible = True
    return facts


def _learn(facts: Facts, node: NodeProto, assumed: dict[int, bool]) -> None:
    """Apply the rules for a node's operator and record its outputs.

    Raises:
        ImpossibleError: the node fails on every input.
    """
    step = Step(facts, node)
    shapes: list[Shape | None] = []
    values: list[Elements | None] = []
    if node.op_type == "If":
        shapes, values = _branches(facts, node, assumed)
    else:
        shape_rule, value_rule = (
            layer_shape_rules.RULES.get(node.op_type),
            value_rules.RULES.get(node.op_type),
        )
        if shape_rule:
            shapes = shape_rule(step) or []
            for name, shape in zip(node.output, shapes, strict=False):
                if name:
                    facts.know(name, shape, None)
        if value_rule:
            values = list(value_rule(step) or [])
    for index, name in enumerate(node.output):
        shape = shapes[index] if index < len(shapes) else None
        if name and (index < len(values) or node.op_type == "If"):
            facts.know(name, shape, values[index] if index < len(values) else None)


def _branches(
    facts: Facts, node: NodeProto, assumed: dict[int, bool]
) -> tuple[list[Shape | None], list[Elements | None]]:
    """Return what the branches of an If that may run agree on, and note the condition when it is decided.

    Raises:
        ImpossibleError: the branch that runs, or each of them, fails.
    """
    condition = facts.values(node.input[0])
    known = condition.item() if condition is not None and condition.size == 1 else None
    outcomes = [bool(known)] if isinstance(known, int) else [True, False]
    if id(node) in assumed:
        outcomes = [outcome for outcome in outcomes if outcome == assumed[id(node)]]
    graphs = facts.graph.bodies(node)
    branches = {outcome: _propagate(graphs[BRANCHES[outcome]][0], facts, assumed) for outcome in outcomes}
    facts.bodies[id(node)] = {BRANCHES[outcome]: (branch,) for outcome, branch in branches.items()}
    outcomes = [outcome for outcome in outcomes if not branches[outcome].impossible]
    if not outcomes:
        raise ImpossibleError
    if len(outcomes) == 1:
        facts.decided[id(node)] = outcomes[0]
    chosen = [branches[outcome] for outcome in outcomes]
    shapes: list[Shape | None] = []
    values: list[Elements | None] = []
    for index in range(len(node.output)):
        names = [(body, body.graph.outputs[index]) for body in chosen]
        shapes.append(_common_shape(facts, [body.shape(name) for body, name in names]))
        arrays = [body.values(name) for body, name in names]
        first = arrays[0]
        same = first is not None and all(
            array is not None and array.shape == first.shape and bool((array == first).all())
            for array in arrays
        )
        values.append(first if same else None)
    return shapes, values


def _common_shape(facts: Facts, shapes: list[Shape | None]) -> Shape | None:
    """Return the shape with fresh sizes where the shapes differ; None when their ranks do."""
    found = [shape for shape in shapes if shape is not None]
    if len(found) < len(shapes) or len({len(shape) for shape in found}) != 1:
        return None
    return tuple(column[0] if len(set(column)) == 1 else facts.fresh() for column in zip(*found, strict=True))


def _open_conditions(facts: Facts, way: Way = ()) -> Iterator[tuple[int, Way]]:
    """Yield the ids of Ifs whose condition is open and whose branches differ in rank, outer ones first."""
    inner: list[tuple[Facts, Way]] = []
    for node in facts.graph.nodes:
        bodies = facts.bodies.get(id(node), {})
        decided = facts.decided.get(id(node))
        if node.op_type == "If" and len(bodies) == len(BRANCHES) and decided is None:
            then, other = (bodies[name][0] for name in BRANCHES.values())
            shapes = [
                (then.shape(first), other.shape(second))
                for first, second in zip(then.graph.outputs, other.graph.outputs, strict=False)
            ]
            if any(
                first is not None and second is not None and len(first) != len(second)
                for first, second in shapes
            ):
                yield id(node), way
        for name, children in bodies.items():
            if decided is not None and name != BRANCHES[decided]:
                continue
            inner += [(child, (*way, (id(node), name, index))) for index, child in enumerate(children)]
    for child, below in inner:
        yield from _open_conditions(child, below)


def _fails(facts: Facts, way: Way) -> bool:
    """Whether one of the graphs on the way to a body, or the body, must fail."""
    failed = facts.impossible
    for owner, name, index in way:
        facts = facts.bodies[owner][name][index]
        failed = failed or facts.impossible
    return failed
