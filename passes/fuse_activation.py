"""fuse-activation: activations that exporters spell out become the operator of that name."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.patterns import (
    clip_bounds,
    enclosed,
    factor,
    near,
    replace_pattern,
    scalar,
    sole_reader,
    with_scalar,
)

_SIXTH = 1 / 6


class FuseActivation(Pass):
    """Replace spelt-out activations by HardSigmoid, HardSwish, Mish, Gelu and Clip.

    before: y = Div(Clip(Add(x, 3), 0, 6), 6)                  after: y = HardSigmoid<alpha = 1/6>(x)
    before: y = Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)          after: y = HardSwish(x)               opset 14
    before: y = Mul(x, Tanh(Softplus(x)))                      after: y = Mish(x)                    opset 18
    before: y = Mul(Mul(x, Add(Erf(Div(x, sqrt(2))), 1)), 0.5) after: y = Gelu(x)                    opset 20
    before: y = Clip(Relu(x), max = 6)                         after: y = Clip(x, 0, 6)

    Before opset 14 a hard swish becomes Mul(x, HardSigmoid(x)). The tanh form of Gelu is found too.

    refuses: inner values that something else reads, types other than float32, constants that differ from
    the operator's by more than rounding.
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, _context: Context) -> Outcome:
        """Replace every pattern of the graph until none is left."""
        outcome = Outcome()
        changed = True
        while changed:
            changed = False
            for node in graph.nodes:
                if node not in graph or domain_of(node.domain) or not all(node.input[:1]):
                    continue
                where = node.name or next(filter(None, node.output), node.op_type)
                found = _FUSIONS.get(node.op_type)
                for fusion in found or ():
                    made = fusion(graph, node)
                    if made:
                        outcome.change(where, f"became {made}")
                        changed = True
                        break
        return outcome


def hard_sigmoid(graph: Graph, node: NodeProto) -> str:
    """Clip(x + b, 0, h) * s with h * s = 1, and x times that; return the operator made, "" for none."""
    found = factor(graph, node)
    if found is None:
        return ""
    value, scale = found
    inner = graph.producer(value)
    product: list[NodeProto] = []
    factors = [value]
    if is_op(inner, "Mul") and inner is not None:
        product = [inner]
        factors = list(inner.input)
    for position, clipped in enumerate(factors):
        clip = graph.producer(clipped)
        bounds = clip_bounds(graph, clip) if is_op(clip, "Clip") else None
        if bounds is None or clip is None or bounds[1] != 0 or not near(bounds[2] * scale, 1):
            continue
        nodes, x, shift = [clip, *product, node], bounds[0], 0.0
        add = graph.producer(x)
        summed = with_scalar(graph, add, "Add")
        if summed and add is not None:
            nodes, (x, shift) = [add, *nodes], summed
        if product and factors[1 - position] != x:
            continue
        if not enclosed(graph, nodes, node.output[0]) or graph.dtype_of(x) != TensorProto.FLOAT:
            continue
        if not product:
            replace_pattern(graph, nodes, "HardSigmoid", [x], node.output[0], alpha=scale, beta=shift * scale)
            return "HardSigmoid"
        if graph.opset() >= 14 and near(shift, 3) and near(scale, _SIXTH):
            replace_pattern(graph, nodes, "HardSwish", [x], node.output[0])
            return "HardSwish"
        gate = graph.emit("HardSigmoid", [x], name=clip.name or None, alpha=scale, beta=shift * scale)
        graph.set_type(gate.output[0], TensorProto.FLOAT, graph.shape_of(x))
        replace_pattern(graph, nodes, "Mul", [x, gate.output[0]], node.output[0])
        return "Mul by HardSigmoid"
    return ""


def hard_swish(graph: Graph, node: NodeProto) -> str:
    """Mul(x, HardSigmoid(x)) with the constants of HardSwish."""
    for x, gate in itertools.permutations(node.input, 2):
        inner = graph.producer(gate)
        if inner is None or not is_op(inner, "HardSigmoid") or inner.input[0] != x or graph.opset() < 14:
            continue
        usual = near(attribute(inner, "alpha", 0.2), _SIXTH) and near(attribute(inner, "beta", 0.5), 0.5)
        usual = usual and not set_by_caller(inner)
        if usual and enclosed(graph, [inner, node], node.output[0]):
            replace_pattern(graph, [inner, node], "HardSwish", [x], node.output[0])
            return "HardSwish"
    return ""


def mish(graph: Graph, node: NodeProto) -> str:
    """Mul(x, Tanh(Softplus(x)))."""
    for x, gate in itertools.permutations(node.input, 2):
        tanh = graph.producer(gate)
        softplus = graph.producer(tanh.input[0]) if tanh is not None and is_op(tanh, "Tanh") else None
        if tanh is None or softplus is None or not is_op(softplus, "Softplus") or softplus.input[0] != x:
            continue
        nodes = [softplus, tanh, node]
        if graph.opset() < 18 or graph.dtype_of(x) != TensorProto.FLOAT:
            continue
        if enclosed(graph, nodes, node.output[0]):
            replace_pattern(graph, nodes, "Mish", [x], node.output[0])
            return "Mish"
    return ""


def gelu(graph: Graph, node: NodeProto) -> str:
    """0.5 x (1 + Erf(x / sqrt(2))) or 0.5 x (1 + Tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in any order."""
    if graph.opset() < 20:
        return ""
    found = _erf_argument(graph, node) if is_op(node, "Erf") else _tanh_argument(graph, node)
    if found is None:
        return ""
    x, nodes = found
    one = sole_reader(graph, node.output[0])
    plus = with_scalar(graph, one, "Add")
    if plus is None or one is None or plus[1] != 1 or graph.dtype_of(x) != TensorProto.FLOAT:
        return ""
    nodes += [node, one]
    half, times_x, last = False, False, one
    while not (half and times_x):
        product = sole_reader(graph, last.output[0])
        if product is None or not is_op(product, "Mul"):
            return ""
        other = product.input[1] if product.input[0] == last.output[0] else product.input[0]
        before = graph.producer(other)
        scaled = factor(graph, before)
        if scalar(graph, other) == 0.5 and not half:
            half = True
        elif other == x and not times_x:
            times_x = True
        elif scaled == (x, 0.5) and before is not None and not half and not times_x:
            half = times_x = True
            nodes.append(before)
        else:
            return ""
        nodes.append(product)
        last = product
    if not enclosed(graph, nodes, last.output[0]):
        return ""
    options = {"approximate": "tanh"} if is_op(node, "Tanh") else {}
    replace_pattern(graph, nodes, "Gelu", [x], last.output[0], **options)
    return "Gelu"


def _erf_argument(graph: Graph, node: NodeProto) -> tuple[str, list[NodeProto]] | None:
    before = graph.producer(node.input[0])
    found = factor(graph, before)
    if found is None or before is None or not near(found[1], math.sqrt(0.5), 1e-5):
        return None
    return found[0], [before]


def _tanh_argument(graph: Graph, node: NodeProto) -> tuple[str, list[NodeProto]] | None:
    outer = graph.producer(node.input[0])
    found = factor(graph, outer)
    if found is None or outer is None or not near(found[1], math.sqrt(2 / math.pi), 1e-5):
        return None
    total = graph.producer(found[0])
    if total is None or not is_op(total, "Add"):
        return None
    for x, cubic in ((total.input[0], total.input[1]), (total.input[1], total.input[0])):
        term = graph.producer(cubic)
        scaled = factor(graph, term)
        if scaled is None or term is None or not near(scaled[1], 0.044715, 1e-5):
            continue
        power = graph.producer(scaled[0])
        cube = with_scalar(graph, power, "Pow")
        if cube == (x, 3.0) and power is not None:
            return x, [power, term, total, outer]
    return None


def clip_chain(graph: Graph, node: NodeProto) -> str:
    """Clip after Relu or Clip, Relu after Clip: one Clip with the narrower bounds."""
    second = clip_bounds(graph, node)
    inner = graph.producer(node.input[0])
    first = clip_bounds(graph, inner)
    if second is None or first is None or inner is None or (is_op(node, "Relu") and is_op(inner, "Relu")):
        return ""
    low, high = max(first[1], second[1]), min(first[2], second[2])
    if low > high or not enclosed(graph, [inner, node], node.output[0]):
        return ""
    if graph.dtype_of(first[0]) != TensorProto.FLOAT:
        return ""
    inputs, attributes = [first[0]], {}
    if graph.opset() < 11:
        attributes = {name: bound for name, bound in (("min", low), ("max", high)) if math.isfinite(bound)}
    else:
        inputs += [_bound(graph, [node, inner], 1, low), _bound(graph, [node, inner], 2, high)]
    replace_pattern(graph, [inner, node], "Clip", inputs, node.output[0], **attributes)
    return "Clip"


def _bound(graph: Graph, nodes: list[NodeProto], position: int, bound: float) -> str:
    """Return a constant with a bound of Clip: one that is there, else a new one; "" for no bound."""
    if not math.isfinite(bound):
        return ""
    for node in nodes:
        name = node.input[position] if len(node.input) > position else ""
        known = graph.constant_type(name)
        if known and not known[1] and scalar(graph, name) == bound:
            return name
    name = graph.fresh_name("bound")
    graph.set_constant(name, _float32(bound))
    return name


def _float32(number: float) -> np.ndarray[tuple[()], np.dtype[np.float32]]:
    return np.array(number, np.float32)


_FUSIONS = {
    "Mul": (hard_sigmoid, hard_swish, mish),
    "Div": (hard_sigmoid,),
    "Erf": (gelu,),
    "Tanh": (gelu,),
    "Clip": (clip_chain,),
    "Relu": (clip_chain,),
}
