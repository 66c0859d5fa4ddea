"""Random small valid ONNX models for property tests, as hypothesis strategies.

`models()` gives ModelProtos of opset 17 with one or two float inputs of symbolic batch size N, a boolean input
when a body depends on one, and up to three outputs. They mix no-ops, equal computations, shared values,
constants as initializers and as nodes, convolutions and If bodies: what exact passes look for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Shape = tuple[int | str, ...]
Draw = Callable[..., object]

UNARY = ("Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Identity", "Dropout", "Softplus", "Clip")
STEPPED = ("Floor", "Round", "Ceil", "Sign")
LARGEST = 600  # elements of a value at batch 1


@st.composite
def models(draw: Draw, *, most: int = 12, stepped: bool = True, bodies: bool = True) -> ModelProto:
    """Draw a model.

    Args:
        draw: Given by hypothesis.
        most: Nodes at most, about.
        stepped: Whether to use operators that jump (Floor, Cast to integers): a pass that rounds differently
            gives another result behind them.
        bodies: Whether to use If.
    """
    builder = Builder(draw, stepped=stepped, bodies=bodies)
    rank = draw(st.sampled_from([2, 3, 4, 4]))
    for name in ("x", "z")[: draw(st.integers(1, 2))]:
        builder.values.append((name, ("N", 2, 4, 4)[:rank] if rank != 3 else ("N", 3, 4)))
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in builder.values]
    for _ in range(draw(st.integers(1, most))):
        builder.step()
    if builder.needs_condition:
        inputs.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
    return builder.model(inputs)


@dataclass
class Builder:
    """A model under construction; every step adds a node or two of a drawn kind."""

    draw: Draw
    stepped: bool
    bodies: bool
    values: list[tuple[str, Shape]] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    needs_condition: bool = False
    count: int = 0

    def pick(self, options: object) -> object:
        return self.draw(st.sampled_from(options))

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: np.ndarray) -> str:
        """Store an array as an initializer or a Constant node."""
        name = self.fresh()
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self.draw(st.booleans()):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.tensors.append(tensor)
        return name

    def weight(self, *shape: int) -> str:
        """Store small weights drawn from few seeds, so that some are equal."""
        random = np.random.default_rng(self.draw(st.integers(0, 1)))
        return self.constant((random.integers(-8, 9, shape) / 16).astype(np.float32))

    def add(self, op_type: str, inputs: list[str], shape: Shape, **attributes: object) -> str:
        name = self.fresh()
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"n{self.count}", **attributes))
        self.values.append((name, shape))
        return name

    def step(self) -> None:
        """Add one operation on a drawn value; kinds that do not fit it add an Identity."""
        name, shape = self.pick(self.values)
        kinds = [self.unary, self.unary, self.cast, self.constant_operand, self.two, self.transpose]
        kinds += [self.transpose, self.reshape, self.reshape, self.axes, self.concat, self.split, self.slice]
        kinds += [self.pad, self.spread, self.reduce, self.linear, self.linear, self.repeat]
        if self.bodies:
            kinds.append(self.branch)
        kind = self.pick(kinds)
        kind(name, shape)

    def unary(self, name: str, shape: Shape) -> None:
        op_type = self.pick(UNARY + (STEPPED if self.stepped else ()))
        inputs = [name]
        if op_type == "Clip":
            inputs += [self.constant(np.float32(self.pick([-1.0, 0.0]))), self.constant(np.float32(6.0))]
        self.add(op_type, inputs[: self.draw(st.integers(1, 3))], shape)

    def cast(self, name: str, shape: Shape) -> None:
        kinds = [TensorProto.FLOAT, TensorProto.DOUBLE] + ([TensorProto.INT32] if self.stepped else [])
        middle = self.add("Cast", [name], shape, to=self.pick(kinds))
        self.values.pop()  # later steps take floats
        self.add("Cast", [middle], shape, to=TensorProto.FLOAT)

    def constant_operand(self, name: str, shape: Shape) -> None:
        op_type, number = self.pick(
            [("Add", 0), ("Sub", 0), ("Mul", 1), ("Div", 1), ("Pow", 1), ("Add", 2), ("Mul", 3)]
        )
        last = shape[-1:] if shape and isinstance(shape[-1], int) else ()
        size = self.pick([(), (1,), last, (1,) * (len(shape) + 1)])
        inputs = [name, self.constant(np.full(size, number, np.float32))]
        if op_type in ("Add", "Mul") and self.draw(st.booleans()):
            inputs.reverse()
        if len(size) <= 4:
            self.add(op_type, inputs, (1,) * (len(size) - len(shape)) + shape)

    def two(self, name: str, shape: Shape) -> None:
        same = [other for other, its in self.values if its == shape]
        inputs = [name, self.pick(same)]
        self.add(self.pick(["Add", "Sub", "Mul", "Max"]), inputs, shape)

    def transpose(self, name: str, shape: Shape) -> None:
        perm = self.draw(st.permutations(range(len(shape))))
        self.add("Transpose", [name], tuple(shape[axis] for axis in perm), perm=perm)

    def reshape(self, name: str, shape: Shape) -> None:
        if not shape or shape[0] != "N":
            self.add("Identity", [name], shape)
            return
        count = math.prod(shape[1:])
        kind = self.pick(["same", "matrix", "pair", "flatten"])
        if kind == "flatten":
            self.add("Flatten", [name], ("N", count))
            return
        divisor = self.pick([d for d in range(1, count + 1) if count % d == 0])
        wanted = {"same": shape[1:], "matrix": (count,), "pair": (divisor, count // divisor)}[kind]
        target = [self.pick([0, -1]), *wanted]
        if target[0] == 0 and self.draw(st.booleans()):
            target[-1] = -1 if len(target) > 1 else 0
        self.add("Reshape", [name, self.constant(np.array(target, np.int64))], ("N", *wanted))

    def axes(self, name: str, shape: Shape) -> None:
        """Squeeze or Unsqueeze."""
        ones = [axis for axis, dim in enumerate(shape) if dim == 1]
        if ones and self.draw(st.booleans()):
            axis = self.pick(ones)
            self.add("Squeeze", [name, self.constant(np.array([axis]))], shape[:axis] + shape[axis + 1 :])
        elif len(shape) < 4:
            axis = self.draw(st.integers(0, len(shape)))
            self.add("Unsqueeze", [name, self.constant(np.array([axis]))], (*shape[:axis], 1, *shape[axis:]))

    def concat(self, name: str, shape: Shape) -> None:
        axis = self.fixed_axis(shape)
        same = [other for other, its in self.values if its == shape]
        inputs = [name, *self.draw(st.lists(st.sampled_from(same), max_size=2))]
        if axis is not None and shape[axis] * len(inputs) <= 16:
            self.add(
                "Concat", inputs, (*shape[:axis], shape[axis] * len(inputs), *shape[axis + 1 :]), axis=axis
            )

    def split(self, name: str, shape: Shape) -> None:
        axis = self.fixed_axis(shape)
        if axis is None:
            return
        count = 2 if shape[axis] % 2 == 0 and self.draw(st.booleans()) else 1
        part = (*shape[:axis], shape[axis] // count, *shape[axis + 1 :])
        made = [self.fresh() for _ in range(count)]
        self.nodes.append(helper.make_node("Split", [name], made, axis=axis))
        if self.draw(st.booleans()):
            self.add("Concat", made, shape, axis=axis - len(shape))
        self.values += [(item, part) for item in made]

    def slice(self, name: str, shape: Shape) -> None:
        axis = self.fixed_axis(shape)
        if axis is None:
            return
        size = shape[axis]
        start, end = self.pick(
            [(0, 2**63 - 1), (0, size), (-size, size), (size // 2, size), (0, -(-size // 2))]
        )
        left = len(range(size)[start:end])
        inputs = [name, *(self.constant(np.array([number])) for number in (start, end, axis))]
        self.add("Slice", inputs, (*shape[:axis], left, *shape[axis + 1 :]))

    def pad(self, name: str, shape: Shape) -> None:
        pads = np.zeros((2, len(shape)), np.int64)
        axis = self.fixed_axis(shape)
        if axis is not None and self.draw(st.booleans()) and shape[axis] < 8:
            pads[self.draw(st.integers(0, 1)), axis] = 1
        grown = tuple(dim + int(more) if more else dim for dim, more in zip(shape, pads.sum(0), strict=True))
        self.add("Pad", [name, self.constant(pads.reshape(-1))], grown)

    def spread(self, name: str, shape: Shape) -> None:
        """Expand or Tile to the shape at hand."""
        sizes = [dim if isinstance(dim, int) else 1 for dim in shape]
        if self.draw(st.booleans()):
            self.add("Expand", [name, self.constant(np.array(sizes, np.int64))], shape)
        else:
            self.add("Tile", [name, self.constant(np.ones(len(shape), np.int64))], shape)

    def reduce(self, name: str, shape: Shape) -> None:
        axis = self.fixed_axis(shape)
        if axis is not None:
            keep = self.draw(st.booleans())
            left = (*shape[:axis], *((1,) if keep else ()), *shape[axis + 1 :])
            self.add(self.pick(["ReduceMean", "ReduceMax"]), [name], left, axes=[axis], keepdims=int(keep))

    def linear(self, name: str, shape: Shape) -> None:
        """Conv and BatchNormalization, Gemm or MatMul, as the rank allows."""
        if len(shape) == 4 and shape[0] == "N" and all(isinstance(dim, int) for dim in shape[1:]):
            channels, out = shape[1], self.pick([1, 2, 3])
            inputs = [name, self.weight(out, channels, 1, 1)] + (
                [self.weight(out)] if self.draw(st.booleans()) else []
            )
            made = self.add("Conv", inputs, (shape[0], out, *shape[2:]))
            if self.draw(st.booleans()):
                variance = self.constant(np.full(out, 0.5, np.float32))
                extra = [self.weight(out), self.weight(out), self.weight(out), variance]
                self.add("BatchNormalization", [made, *extra], (shape[0], out, *shape[2:]))
        elif len(shape) == 2 and isinstance(shape[1], int) and self.draw(st.booleans()):
            turned = self.draw(st.integers(0, 1))
            weight = self.weight(*((3, shape[1]) if turned else (shape[1], 3)))
            self.add("Gemm", [name, weight], (shape[0], 3), transB=turned)
        elif len(shape) >= 2 and isinstance(shape[-1], int):
            self.add("MatMul", [name, self.weight(shape[-1], 4)], (*shape[:-1], 4))

    def repeat(self, name: str, shape: Shape) -> None:
        """Add a copy of an earlier node."""
        several = [node for node in self.nodes if len(node.output) == 1 and node.op_type != "Constant"]
        known = dict(self.values)
        several = [node for node in several if node.output[0] in known]
        if not several:
            self.add("Identity", [name], shape)
            return
        old = self.pick(several)
        copy = NodeProto()
        copy.CopyFrom(old)
        copy.output[0] = self.fresh()
        copy.name = f"n{self.count}"
        for attribute in copy.attribute:
            if attribute.name.endswith("_branch"):
                return
        self.nodes.append(copy)
        self.values.append((copy.output[0], known[old.output[0]]))

    def branch(self, name: str, shape: Shape) -> None:
        """If with a constant condition or with the input `cond`; its branches capture values."""
        same = [other for other, its in self.values if its == shape]
        if self.draw(st.booleans()):
            condition = self.constant(np.array(self.draw(st.booleans())))
        else:
            condition, self.needs_condition = "cond", True
        graphs = []
        for _ in range(2):
            nodes, last = [], name
            for _ in range(self.draw(st.integers(1, 3))):
                made = self.fresh()
                op_type = self.pick(["Relu", "Neg", "Identity", "Add"])
                inputs = [last, self.pick(same)] if op_type == "Add" else [last]
                nodes.append(helper.make_node(op_type, inputs, [made]))
                last = made
            out = helper.make_tensor_value_info(last, 1, shape)
            graphs.append(helper.make_graph(nodes, f"body{self.count}", [], [out]))
        self.add("If", [condition], shape, then_branch=graphs[0], else_branch=graphs[1])

    def fixed_axis(self, shape: Shape) -> int | None:
        """Draw an axis of known size."""
        fixed = [axis for axis, dim in enumerate(shape) if isinstance(dim, int)]
        return self.pick(fixed) if fixed else None

    def model(self, inputs: list[ValueInfoProto]) -> ModelProto:
        made = [item for item in self.values if item[0] not in {value.name for value in inputs}]
        if not made:
            self.unary(*self.values[0])
            made = self.values[-1:]
        chosen = self.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
        outputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in {made[-1], *chosen}]
        graph = helper.make_graph(
            self.nodes, "random", inputs, sorted(outputs, key=lambda v: v.name), self.tensors
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
