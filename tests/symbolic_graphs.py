"""Random graphs that compute with shapes, and the value of a symbolic size for given symbols."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.symbols.dimensions import Size


def value_of(size: Size, symbols: dict[str, int]) -> int:
    """Evaluate a size through its text: atoms are written as Python expressions of their symbols."""
    if isinstance(size, int):
        return size
    names = {name: Fraction(number) for name, number in symbols.items()}
    functions = {
        "floor": math.floor,
        "trunc": math.trunc,
        "mod": lambda first, second: first % second,
        "min": min,
        "max": max,
        "equal": lambda first, second: int(first == second),
        "less": lambda first, second: int(first < second),
        "true": lambda item: int(item != 0),
        "where": lambda condition, first, second: first if condition else second,
    }
    result = eval(str(size), {"__builtins__": {}}, {**names, **functions})
    assert result == int(result)
    return int(result)


class Chains:
    """Builds a random graph over inputs x[n, 4, s] and y[n, s]: some tensors, some vectors of sizes."""

    def __init__(self, draw: st.DrawFn, opset: int) -> None:
        self.draw = draw
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.tensors: list[tuple[str, int]] = [("x", 3), ("y", 2)]  # name, rank
        self.vectors: list[tuple[str, int]] = []  # name, length
        self.flags: list[str] = []

    def add(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def ints(self, values: list[int]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def pick(self, items: list) -> object:
        return self.draw(st.sampled_from(items))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def step(self) -> None:
        """Add one operation that is possible now."""
        getattr(self, self.pick(self.SIZES if self.number(0, 2) or not self.vectors else self.TENSORS))()

    def shape(self) -> None:
        tensor, rank = self.pick(self.tensors)
        if self.opset >= 15 and rank > 1 and self.number(0, 1):
            start = self.number(0, rank - 1)
            self.vectors.append((self.add("Shape", [tensor], start=start), rank - start))
        else:
            self.vectors.append((self.add("Shape", [tensor]), rank))

    def gather(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            picks = [self.number(-length, length - 1) for _ in range(self.number(1, 3))]
            self.vectors.append((self.add("Gather", [vector, self.ints(picks)], axis=0), len(picks)))

    def scalar_and_back(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            index = f"c{len(self.constants)}"
            self.constants.append(
                numpy_helper.from_array(np.array(self.number(0, length - 1), np.int64), index)
            )
            scalar = self.add("Gather", [vector, index], axis=0)
            self.vectors.append((self.add("Unsqueeze", [scalar, self.ints([0])]), 1))

    def slice(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            start = self.number(0, length - 1)
            end = self.number(start + 1, length)
            bounds = [
                self.ints([start]),
                self.ints([end if self.number(0, 1) else end - length or 2**31]),
                self.ints([0]),
            ]
            self.vectors.append((self.add("Slice", [vector, *bounds]), end - start))

    def concat(self) -> None:
        if self.vectors:
            picked = [self.pick(self.vectors) for _ in range(self.number(1, 3))]
            names = [name for name, _ in picked]
            length = sum(length for _, length in picked)
            if self.number(0, 1):
                names.append(self.ints([self.number(-1, 4)]))
                length += 1
            if length <= 6:
                self.vectors.append((self.add("Concat", names, axis=0), length))

    def arithmetic(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            op_type = self.pick(["Add", "Sub", "Mul", "Div", "Mod", "Min", "Max"])
            others = [name for name, other in self.vectors if other == length]
            constant = self.ints([self.number(1, 4)])
            other = constant if op_type in ("Div", "Mod") or self.number(0, 1) else self.pick(others)
            self.vectors.append((self.add(op_type, [vector, other]), length))

    def choose(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            test = self.pick(["Equal", "Less", "Greater"])
            flag = self.add(test, [vector, self.ints([self.number(-1, 4)])])
            self.flags.append(flag)
            self.vectors.append((self.add("Where", [flag, vector, self.ints([self.number(1, 3)])]), length))

    def product(self) -> None:
        if self.vectors:
            vector, _ = self.pick(self.vectors)
            op_type = self.pick(["ReduceProd", "ReduceMax"])
            self.vectors.append((self.add(op_type, [vector], keepdims=1), 1))

    def cast(self) -> None:
        if self.vectors:
            vector, length = self.pick(self.vectors)
            narrow = self.add("Cast", [vector], to=TensorProto.INT32)
            self.vectors.append((self.add("Cast", [narrow], to=TensorProto.INT64), length))

    def reshape(self) -> None:
        tensor, _ = self.pick(self.tensors)
        if self.vectors and self.number(0, 2) == 0:
            vector, length = self.pick(self.vectors)
            self.tensors.append((self.add("Reshape", [tensor, vector]), length))
            return
        shape = self.add("Shape", [tensor])
        first = self.add("Gather", [shape, self.ints([0])], axis=0)
        kind = self.number(0, 3)
        ends = [[-1], [-1, 2], [4, -1], [1, -1, 1]][kind]
        self.tensors.append(
            (
                self.add("Reshape", [tensor, self.add("Concat", [first, self.ints(ends)], axis=0)]),
                1 + len(ends),
            )
        )

    def views(self) -> None:
        tensor, rank = self.pick(self.tensors)
        kind = self.number(0, 3)
        if kind == 0 and rank < 5:
            self.tensors.append(
                (self.add("Unsqueeze", [tensor, self.ints([self.number(0, rank)])]), rank + 1)
            )
        elif kind == 1:
            order = self.draw(st.permutations(range(rank)))
            self.tensors.append((self.add("Transpose", [tensor], perm=list(order)), rank))
        elif kind == 2:
            self.tensors.append((self.add("Flatten", [tensor], axis=self.number(0, rank)), 2))
        else:
            self.tensors.append((self.add("Relu", [tensor]), rank))

    def cut(self) -> None:
        tensor, rank = self.pick(self.tensors)
        axis = self.number(0, rank - 1)
        bounds = [self.number(-3, 3), self.number(-2, 5) or 2**63 - 1, axis, self.pick([1, 1, 1, 2, -1])]
        name = self.add("Slice", [tensor, *(self.ints([bound]) for bound in bounds)])
        if self.number(0, 2) == 0:
            name = self.add(
                "Slice",
                [name, self.ints([0]), self.ints([self.number(1, 9)]), self.ints([self.number(0, rank - 1)])],
            )
        self.tensors.append((name, rank))

    def drop(self) -> None:
        tensor, rank = self.pick(self.tensors)
        if rank > 1:
            start = self.number(-1, 1)
            axis = self.number(0, rank - 1)
            end = start + 1 if start >= 0 else 2**31 - 1
            cut = self.add("Slice", [tensor, self.ints([start]), self.ints([end]), self.ints([axis])])
            self.tensors.append((self.add("Squeeze", [cut, self.ints([axis])]), rank - 1))

    def stack(self) -> None:
        tensor, rank = self.pick(self.tensors)
        if rank < 4:
            axis = self.number(0, rank)
            parts = [
                self.add("Unsqueeze", [self.add(op, [tensor]), self.ints([axis])]) for op in ("Relu", "Neg")
            ]
            self.tensors.append((self.add("Concat", parts, axis=axis), rank + 1))

    def expand(self) -> None:
        tensor, rank = self.pick(self.tensors)
        shape = self.add("Shape", [tensor])
        if self.number(0, 1):
            one = self.add(
                "ConstantOfShape", [shape], value=numpy_helper.from_array(np.array([2.0], np.float32))
            )
            self.tensors.append((self.add("Mul", [tensor, one]), rank))
        else:
            self.tensors.append((self.add("Expand", [tensor, shape]), rank))

    def attention(self) -> None:
        """Reshape to joined axes, Transpose, Reshape back."""
        shape = self.add("Shape", ["x"])
        n, s = (self.add("Gather", [shape, self.ints([axis])], axis=0) for axis in (0, 2))
        four = self.add("Reshape", ["x", self.add("Concat", [n, self.ints([2, 2]), s], axis=0)])
        joined = self.add("Reshape", [four, self.add("Concat", [self.ints([-1, 2]), s], axis=0)])
        turned = self.add("Transpose", [joined], perm=[0, 2, 1])
        self.tensors.append(
            (
                self.add(
                    "Reshape", [turned, self.add("Concat", [n, self.ints([2]), s, self.ints([2])], axis=0)]
                ),
                4,
            )
        )

    SIZES = (
        "shape",
        "gather",
        "scalar_and_back",
        "slice",
        "concat",
        "arithmetic",
        "choose",
        "product",
        "cast",
    )
    TENSORS = ("reshape", "views", "cut", "drop", "stack", "expand", "reshape", "attention")

    def model(self) -> onnx.ModelProto:
        names = [name for name, _ in self.tensors[-4:]] + [name for name, _ in self.vectors[-3:]]
        # Outputs through an operator of their own, so that the values themselves can be replaced.
        outputs = [self.add("Abs", [name]) for name in dict.fromkeys(names)]
        kinds = {name: (TensorProto.FLOAT, [None] * rank) for name, rank in self.tensors}
        kinds |= {name: (TensorProto.INT64, [None]) for name, _ in self.vectors}
        graph = helper.make_graph(
            self.nodes,
            "chains",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "s"]),
                helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "s"]),
            ],
            [
                helper.make_tensor_value_info(output, *kinds[name])
                for output, name in zip(outputs, dict.fromkeys(names), strict=True)
            ],
            self.constants,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)])


@st.composite
def shape_models(draw: st.DrawFn) -> onnx.ModelProto:
    """Return a random model that computes with shapes."""
    chains = Chains(draw, draw(st.sampled_from([13, 17])))
    chains.shape()
    for _ in range(draw(st.integers(3, 14))):
        chains.step()
    return chains.model()
