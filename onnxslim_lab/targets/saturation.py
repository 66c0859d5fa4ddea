"""Saturation shown: which layers' int8 products overflow int16 on x86 CPUs without VNNI, and how often.

There onnxruntime multiplies uint8 activations by int8 weights with VPMADDUBSW, which adds two neighbouring
products and clamps the sum to [-32768, 32767] before it is widened (onnxruntime documentation, "Quantize
ONNX Models", data type selection). Neighbours are along the summed axis; in a convolution
these are neighbouring channels at one tap of the kernel, for onnxruntime runs it with channels last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.targets.group import Group
from onnxslim_lab.targets.qdq import parameters
from onnxslim_lab.worker.messages import Value

Ints = npt.NDArray[np.int32]

_LOW, _HIGH = -(1 << 15), (1 << 15) - 1
_ROWS = 512  # rows of a layer's input looked at for each feed
_CHUNK = 1 << 24  # pair sums held at a time


@dataclass
class Saturation:
    """How often the pair sums of one layer leave int16.

    Attributes:
        node: Name of the layer.
        op_type: Its operator.
        pairs: Sums of two products looked at.
        clamped: Sums of these beyond int16.
        rows: Output values looked at.
        wrong: Output values that a clamped sum changes.
        largest_error: Largest change of an output, in quantized products.
        channels: Output channels with a clamped sum, most frequent first.
    """

    node: str
    op_type: str
    pairs: int = 0
    clamped: int = 0
    rows: int = 0
    wrong: int = 0
    largest_error: int = 0
    channels: list[int] = field(default_factory=list)
    _hits: Ints = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)

    @property
    def rate(self) -> float:
        """The share of sums that are clamped."""
        return self.clamped / self.pairs if self.pairs else 0.0

    def add(self, rows: Ints, matrix: Ints, first: int = 0) -> None:
        """Count over rows (n, in) of codes against a matrix (out, in) for output channels from `first` on."""
        pairs, over, error = pair_sums(rows, matrix)
        self.pairs += pairs
        self.clamped += int(over.sum())
        self.rows += error.size
        self.wrong += int(np.count_nonzero(error))
        self.largest_error = max(self.largest_error, int(np.abs(error).max(initial=0)))
        missing = first + over.size - self._hits.size
        self._hits = np.pad(self._hits, (0, max(0, missing)))
        self._hits[first : first + over.size] += over
        order = np.argsort(-self._hits, kind="stable")
        self.channels = [int(i) for i in order if self._hits[i]]


def pair_sums(rows: Ints, matrix: Ints) -> tuple[int, Ints, Ints]:
    """Return what VPMADDUBSW makes of rows (n, in) of uint8 codes times a matrix (out, in) of int8 codes.

    Returns:
        The number of pair sums, how many of them are clamped for each output channel (out,), and the error of
        each accumulated output (n, out).

    >>> pairs, clamped, error = pair_sums(np.array([[255, 255]]), np.array([[127, 127], [63, 63]]))
    >>> pairs, clamped.tolist(), error.tolist()
    (2, [1, 0], [[-32003, 0]])
    """
    rows, matrix = rows.astype(np.int32), matrix.astype(np.int32)
    if rows.shape[1] % 2:
        rows, matrix = np.pad(rows, ((0, 0), (0, 1))), np.pad(matrix, ((0, 0), (0, 1)))
    out, half = matrix.shape[0], matrix.shape[1] // 2
    clamped = np.zeros(out, np.int32)
    error = np.zeros((rows.shape[0], out), np.int32)
    # Only channels with two neighbouring weights that can overflow at all are worth the work.
    risky = np.flatnonzero((np.abs(matrix).reshape(out, half, 2).sum(2) * 255 > _HIGH).any(1))
    step = max(1, _CHUNK // max(1, rows.shape[0] * half))
    for start in range(0, risky.size, step):
        chosen = risky[start : start + step]
        products = rows[:, None, :] * matrix[None, chosen, :]
        sums = products.reshape(rows.shape[0], chosen.size, half, 2).sum(3)
        excess = np.clip(sums, _LOW, _HIGH) - sums
        clamped[chosen] = np.count_nonzero(excess, axis=(0, 2))
        error[:, chosen] = excess.sum(2)
    return rows.shape[0] * out * half, clamped, error


def find_saturation(
    model: Graph, feeds: Iterable[Mapping[str, Value]], *, progress: Progress = silent
) -> list[Saturation]:
    """Return the layers with uint8 activations and int8 weights, with how often they saturate.

    The codes are those that the NumPy runtime computes, which are exact; at most 512 rows of each layer's
    input are looked at for each feed. Layers are those of the main graph, as QDQ groups, QLinearConv,
    QLinearMatMul, MatMulInteger and ConvInteger.

    Args:
        model: The main graph of a quantized model.
        feeds: Inputs to run.
        progress: Told how many feeds are done.

    Raises:
        UnsupportedError: The NumPy runtime lacks an operator of the model.
    """
    found = [layer for node in model.nodes if (layer := _layer(model, node)) is not None]
    if not found:
        return []
    results = [Saturation(_name(layer.node), layer.node.op_type) for layer in found]
    interpreter = Interpreter(model)
    names = list(dict.fromkeys(layer.codes for layer in found))
    inputs = [*feeds]
    for done, feed in enumerate(inputs):
        progress(done, len(inputs), "looking for saturation")
        values = interpreter.run(feed, names)
        for layer, result in zip(found, results, strict=True):
            for out, rows, matrix in _matrices(model, layer, np.asarray(values[layer.codes])):
                result.add(rows, matrix, out.start or 0)
    return results


@dataclass(frozen=True)
class _Integer:
    """A layer in integers: the values that hold its input and weight codes and the input's zero point."""

    node: NodeProto
    codes: str
    weight: str
    shift: str

    def zero_point(self, graph: Graph) -> npt.NDArray[Any]:
        """Return the zero point of the input, 0 when there is none or it is computed."""
        found = graph.constant(self.shift) if self.shift else None
        return np.zeros((), np.int64) if found is None else found


def _name(node: NodeProto) -> str:
    return node.name or node.output[0]


def _layer(graph: Graph, node: NodeProto) -> _Integer | None:
    """Return a node as a layer of uint8 activations and int8 weights, None when it is none."""
    if node.op_type in ("QLinearConv", "QLinearMatMul"):
        codes, weight, shift = node.input[0], node.input[3], node.input[2]
    elif node.op_type in ("MatMulInteger", "ConvInteger"):
        codes, weight, shift = node.input[0], node.input[1], (*node.input, "", "")[2]
    elif is_op(node, "Conv") or is_op(node, "MatMul") or is_op(node, "Gemm"):
        group = Group(graph, node)
        if 0 not in group.activations or graph.producer(node.input[0]) is not group.dequantizers[0]:
            return None
        if 1 not in group.dequantizers or parameters(graph, group.activations[0]).type_name != "uint8":
            return None
        codes, weight = (group.dequantizers[slot].input[0] for slot in (0, 1))
        shift = (*group.dequantizers[0].input, "")[2]
    else:
        return None
    kind = graph.constant_type(weight) if weight else None
    if kind is None or kind[0] != TensorProto.INT8 or len(kind[1]) < 2:
        return None
    if attribute(node, "transA", 0):
        return None
    return _Integer(node, codes, weight, shift)


def _matrices(graph: Graph, layer: _Integer, codes: npt.NDArray[Any]) -> Iterator[tuple[slice, Ints, Ints]]:
    """Yield output channels, rows (n, in) and matrix (out, in) of each group of a layer for one input."""
    weight, node = graph.constant(layer.weight), layer.node
    assert weight is not None
    if codes.dtype != np.uint8:
        return
    if "Conv" not in node.op_type:
        if weight.ndim == 2:
            matrix = weight if node.op_type == "Gemm" and attribute(node, "transB", 0) else weight.T
            yield slice(None), _thinned(codes.reshape(-1, codes.shape[-1])), matrix
        return
    groups = int(attribute(node, "group", 1))
    channels = weight.shape[1]
    if groups > 1 and channels == 1:  # depthwise kernels widen before they add
        return
    rank = weight.ndim - 2
    kind = ConvKind(
        weight.shape,
        groups=groups,
        strides=tuple(attribute(node, "strides", [1] * rank)),
        dilations=tuple(attribute(node, "dilations", [1] * rank)),
        pads=tuple(attribute(node, "pads", [0] * (2 * rank))),
        auto_pad=attribute(node, "auto_pad", "NOTSET"),
    )
    shift = int(np.reshape(layer.zero_point(graph), ()))
    rows = kind.rows(codes.astype(np.int16) - np.int16(shift)) + np.int16(shift)  # padding is the zero point
    matrix = kind.matrix(weight)
    for index in range(groups):
        out = slice(index * matrix.shape[1], (index + 1) * matrix.shape[1])
        yield out, _channels_last(_thinned(rows[index]), channels), _channels_last(matrix[index], channels)


def _thinned(rows: npt.NDArray[Any]) -> Ints:
    """Return at most 512 rows, evenly spread."""
    step = max(1, -(-rows.shape[0] // _ROWS))
    return rows[::step]


def _channels_last(columns: npt.NDArray[Any], channels: int) -> Ints:
    """Return columns (n, channels * taps) in the order in which the kernel adds them: tap by tap."""
    return columns.reshape(columns.shape[0], channels, -1).swapaxes(1, 2).reshape(columns.shape)
