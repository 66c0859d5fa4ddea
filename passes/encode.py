"""Store each large tensor in the smallest standard-ONNX encoding of its exact values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from onnx import TensorProto
from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.encodings.choice import FIRST_ENCODING_OPSET, dense_bytes, smallest_plan
from onnxslim_lab.encodings.plan import STEM, Plan, Target
from onnxslim_lab.encodings.sparse import FIRST_OPSET as FULL_OPSET
from onnxslim_lab.encodings.stems import free_stems
from onnxslim_lab.errors import ModelError
from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.opset import raise_opset

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
INTEGERS = (
    *(TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
    *(TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64),
)
_OWN_NAME = re.compile(rf"{STEM}\d*\.")  # of the tensors that decoders are made of


class Encode(Pass):
    """Store each large tensor in the smallest exact encoding; the model decodes itself at load.

    Value passes (prune, share, ...) leave dense tensors; this one makes the file small. Each tensor is
    replaced by smaller ones and by standard nodes that compute it from them, bit for bit. onnxruntime folds
    these nodes once when it loads the model, so that inference is as fast as before and takes as much
    memory as before.

        before: W (initializer)           after: index, codebook -> Cast -> Gather -> Reshape -> W

    The encoding with the fewest bytes, protobuf framing counted, is taken: narrower storage (Cast); equal
    slices (Expand); a codebook with packed 1- to 8-bit indices, one for the tensor or for each group of
    slices (Gather); an integer grid with scales per tensor, axis or block (Cast, Mul); sparse with a bitmap
    or Rice-coded gaps, and a codebook or full values (CumSum, ScatterElements). Sparse ones need opset 11.

    Refuses: graph outputs, inputs with a default value, and tensors that no encoding makes smaller. Says
    nothing of tensors too small to save `min_saving` bytes, nor of integers that constant nodes decode.

    >>> graph = Graph.parse('<ir_version: 8, opset_import: ["" : 17]> g (float[1, 64] x) => (float[1, 64] y)'
    ...                     '<float[64, 64] w = {' + ','.join((['1', '0', '-2'] * 1366)[:4096]) + '}>'
    ...                     '{ y = MatMul (x, w) }')
    >>> Encode().run(graph).changes[0].what
    'encoded as codebook of 3, 2-bit index'
    """

    exact: ClassVar[bool] = True
    scope: ClassVar[Literal["graph", "model"]] = "model"

    min_saving: int = Field(256, ge=1, description="bytes an encoding must save to be worth its nodes")
    raise_opset: bool = Field(
        True,
        description=f"raise an opset below {FULL_OPSET}, which sparse encodings need, if the run allows raising",
    )

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Encode the tensors of the whole model in place."""
        outcome = Outcome()
        if context.allow_opset_raise and self.raise_opset and 0 < graph.opset() < FULL_OPSET:
            self._raise(graph, outcome)
        work = list(self._large(graph))
        stems = free_stems(graph, STEM)
        shared: dict[int, tuple[str, set[str]]] = {}
        for done, (inner, name) in enumerate(work):
            context.progress(done, len(work), f"encode {name}")
            if id(inner) not in shared:
                shared[id(inner)] = next(stems), set()
            common = shared[id(inner)]
            target = Target(
                name=name,
                stem=next(stems),
                shared_stem=common[0],
                opset=inner.opset(),
                ir_version=inner.ir_version,
                in_function=inner.is_function,
                present=common[1],
            )
            common[1].update(self._encode(inner, target, context, outcome))
        if work:
            context.progress(len(work), len(work), "encode")
        return outcome

    def _large(self, model: Graph) -> Iterator[tuple[Graph, str]]:
        """Yield the constants, with their graph, that are large enough and not the storage of a decoder."""
        for graph in model.walk():
            if graph.opset() < FIRST_ENCODING_OPSET:
                continue
            large: list[tuple[str, int]] = []
            constants = [node.output[0] for node in graph.nodes if is_op(node, "Constant") and node.output]
            for name in (*graph.initializers, *constants):
                found = _stored(graph, name)
                if found is None or found[1] <= self.min_saving:
                    continue
                if found[0] in FLOATS + INTEGERS:
                    large.append((name, found[0]))
            folded = _folded(graph) if large else set()
            for name, kind in large:
                decoded = any(set(node.output) <= folded for node in graph.consumers(name))
                if not (decoded and (kind in INTEGERS or _OWN_NAME.match(name))):
                    yield graph, name

    def _encode(self, graph: Graph, target: Target, context: Context, outcome: Outcome) -> Iterable[str]:
        """Encode one tensor; return the shared tensors its decoder uses."""
        name = target.name
        if not graph.is_constant(name):
            outcome.refuse(name, "it is an input with a default value, which a caller may override")
            return ()
        if graph.is_output(name):
            outcome.refuse(name, "it is an output of the graph")
            return ()
        array = graph.constant(name)
        assert array is not None
        found = smallest_plan(array, target, self.min_saving)
        if found is None:
            outcome.refuse(name, self._why_not(array.nbytes, target, context))
            return ()
        plan, after = found
        before = dense_bytes(array, replace(target, in_function=graph.producer(name) is not None))
        write(plan, graph)
        outcome.changes.append(
            Change(
                name,
                f"encoded as {plan.encoding}",
                weights=(name,),
                bytes_before=before,
                bytes_after=after,
                detail={"encoding": plan.encoding},
            )
        )
        return plan.shared

    def _why_not(self, size: int, target: Target, context: Context) -> str:
        reason = f"no exact encoding saves {self.min_saving} of its {size} bytes"
        if target.opset >= FULL_OPSET or context.allow_opset_raise:
            return reason
        return f"{reason} at opset {target.opset}; sparse ones need opset {FULL_OPSET}: allow raising it"

    def _raise(self, graph: Graph, outcome: Outcome) -> None:
        """Raise the opset when an encoding that needs it saves more than those that do not."""
        gain = 0
        for inner, name in self._large(graph):
            array = inner.constant(name)
            if array is None or inner.is_output(name):
                continue
            sizes = []
            for opset in (graph.opset(), FULL_OPSET):
                found = smallest_plan(array, Target(name, opset=opset, ir_version=graph.ir_version))
                sizes.append(array.nbytes if found is None else found[1])
            gain += sizes[0] - sizes[1]
        if gain < self.min_saving:
            return
        before = graph.opset()
        try:
            raise_opset(graph, FULL_OPSET)
        except ModelError as error:
            outcome.refuse(graph.name, f"the opset stays at {before}: {error}")
        else:
            outcome.change(graph.name, f"raised the opset from {before} to {FULL_OPSET}")


def write(plan: Plan, graph: Graph) -> None:
    """Put a decoder in the place of the constant it makes."""
    graph.remove_constant(plan.target.name)
    for word, (array, data_type) in (plan.tensors | plan.shared).items():
        if word not in plan.shared or word not in plan.target.present:
            graph.set_constant(plan.full_name(word), array, data_type)
    for step in plan.steps:
        graph.adopt(plan.node(step))


def _stored(graph: Graph, name: str) -> tuple[int, int] | None:
    """Return the type and bytes of a tensor this graph stores, overridable inputs included."""
    found = graph.constant_type(name)
    if found is None and graph.is_input(name) and name in graph.initializers:
        shape = [size for size in graph.shape_of(name) or () if isinstance(size, int)]
        count = 1
        for size in shape:
            count *= size
        return graph.dtype_of(name), 4 * count
    return None if found is None else (found[0], found[2])


def _folded(graph: Graph) -> set[str]:
    """Return the values that nodes of this graph compute from constants alone."""
    folded: set[str] = set()
    for node in graph.nodes:
        known = all(not name or name in folded or graph.is_constant(name) for name in node.input)
        if known and node.input and not graph.bodies(node):
            folded.update(node.output)
    return folded
