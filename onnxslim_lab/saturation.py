"""Saturation: where sums of two products of 8-bit integers leave 16 bits, as a bound and as it happens.

x86 CPUs without VNNI multiply unsigned by signed bytes with VPMADDUBSW, which adds two neighbouring products
and clamps the sum to [-32768, 32767] before it is widened (onnxruntime documentation, "Quantize ONNX Models",
data type selection). onnxruntime's products of such types are wrong there, and exact everywhere else.
Neighbours are along the summed axis; in a convolution these are neighbouring channels at one tap of the
kernel, for onnxruntime runs it with channels last; depthwise kernels widen before they add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.targets.qdq import is_dequantize, parameters
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value

Ints = npt.NDArray[np.int32]

PRODUCTS: Mapping[str, tuple[int, int]] = {
    "Conv": (0, 1),
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "DynamicQuantizeMatMul": (0, 1),
}
"""Operators that multiply, with the places of the activations and of the weights among their inputs."""
_SHIFTS = {"ConvInteger": 2, "MatMulInteger": 2, "MatMulIntegerToFloat": 4}  # place of the input's zero point
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")

_LOW, _HIGH = -(1 << 15), (1 << 15) - 1
_ROWS = 512  # rows of a layer's input looked at for each feed
_CHUNK = 1 << 24  # pair sums held at a time


@dataclass(frozen=True)
class Product:
    """A layer in integers.

    Attributes:
        graph: Its graph.
        node: The layer.
        codes, weight: Names of the values that hold the codes of its input and of its weight.
        shift: Name of its input's zero point, "" for none.
    """

    graph: Graph
    node: NodeProto
    codes: str
    weight: str
    shift: str

    def matrices(self, codes: Array, weight: Array) -> Iterator[tuple[slice, Array, Array]]:
        """Yield output channels, rows (n, in) and matrix (out, in) of each group, neighbours side by side."""
        node = self.node
        if node.op_type not in _CONVOLUTIONS:
            if weight.ndim == 2 and not attribute(node, "transA", 0):
                matrix = weight if attribute(node, "transB", 0) else weight.T
                yield slice(None), _thinned(codes.reshape(-1, codes.shape[-1])), matrix
            return
        groups = int(attribute(node, "group", 1))
        channels = weight.shape[1]
        if groups > 1 and channels == 1:
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
        zero = self.graph.constant(self.shift) if self.shift else None
        shift = np.int16(0 if zero is None else int(zero.reshape(())))
        rows = kind.rows(codes.astype(np.int16) - shift) + shift  # padding is the zero point
        matrix = kind.matrix(weight)
        for index in range(groups):
            out = slice(index * matrix.shape[1], (index + 1) * matrix.shape[1])
            yield (
                out,
                _channels_last(_thinned(rows[index]), channels),
                _channels_last(matrix[index], channels),
            )


def product(graph: Graph, node: NodeProto) -> Product | None:
    """Return a node as a layer in integers, behind DequantizeLinear or not; None when it is none."""
    if node.op_type not in PRODUCTS or domain_of(node.domain) not in ("", "com.microsoft"):
        return None
    codes, weight = (node.input[place] for place in PRODUCTS[node.op_type])
    place = _SHIFTS.get(node.op_type, 2 if node.op_type.startswith("Q") else 0)
    shift = node.input[place] if 0 < place < len(node.input) else ""
    makers = [graph.producer(name) for name in (codes, weight)]
    if all(maker is not None and is_dequantize(maker) for maker in makers):
        first, second = (maker for maker in makers if maker is not None)
        return Product(graph, node, first.input[0], second.input[0], (*first.input, "")[2])
    if any(is_dequantize(maker) for maker in makers) or node.op_type in ("Conv", "MatMul", "Gemm"):
        return None
    return Product(graph, node, codes, weight, shift)


def overflow(graph: Graph, node: NodeProto, values: Mapping[str, Value]) -> int:
    """Return a bound on the sums of two neighbouring products of a node where it exceeds 16 bits, else 0.

    The bound takes the range of the activations by column; where they are not known, all that unsigned bytes
    can be.

    Args:
        graph: The node's graph.
        node: One of `PRODUCTS`, or any other, for which the answer is 0.
        values: Known values by name; constants need not be among them.
    """
    layer = product(graph, node)
    weight = _known(graph, layer.weight, values) if layer is not None else None
    if layer is None or weight is None or weight.dtype != np.int8 or weight.ndim < 2:
        return 0
    x = _known(graph, layer.codes, values)
    if x is None or x.dtype not in (np.uint8, np.int8) or not x.size:
        largest = np.sort(np.abs(weight.astype(np.int64)).reshape(-1))[-2:]
        return _over(int(largest.sum()) * 255)
    unsigned = x.astype(np.int16) + np.int16(
        128 if x.dtype == np.int8 else 0
    )  # signed bytes are shifted first
    most = 0
    for _, rows, matrix in layer.matrices(unsigned, weight):
        ends = [matrix.astype(np.int64) * end for end in (rows.min(0, initial=255), rows.max(0, initial=0))]
        reach = np.maximum(*ends), np.minimum(*ends)
        odd = [(0, 0), (0, matrix.shape[1] % 2)]
        up, down = (np.pad(side, odd).reshape(len(matrix), -1, 2).sum(-1) for side in reach)
        most = max(most, int(up.max(initial=0)), int(-down.min(initial=0)))
    return _over(most)


def _over(most: int) -> int:
    return most if most > _HIGH else 0


def _known(graph: Graph, name: str, values: Mapping[str, Value]) -> Array | None:
    found = values.get(name)
    return found if isinstance(found, np.ndarray) else graph.constant(name)


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
    input are looked at for each feed. Layers are those of the main graph.

    Args:
        model: The main graph of a quantized model.
        feeds: Inputs to run.
        progress: Told how many feeds are done.

    Raises:
        UnsupportedError: The NumPy runtime lacks an operator of the model.
    """
    found = [(layer, weight) for node in model.nodes for layer, weight in _saturable(model, node)]
    if not found:
        return []
    results = [Saturation(layer.node.name or layer.node.output[0], layer.node.op_type) for layer, _ in found]
    interpreter = Interpreter(model)
    names = list(dict.fromkeys(layer.codes for layer, _ in found))
    inputs = [*feeds]
    for done, feed in enumerate(inputs):
        progress(done, len(inputs), "looking for saturation")
        values = interpreter.run(feed, names)
        for (layer, weight), result in zip(found, results, strict=True):
            codes = np.asarray(values[layer.codes])
            for out, rows, matrix in layer.matrices(codes, weight) if codes.dtype == np.uint8 else ():
                result.add(rows, matrix, out.start or 0)
    return results


def _saturable(graph: Graph, node: NodeProto) -> Iterator[tuple[Product, Array]]:
    """Yield a node as a layer with its weight, when that is constant int8 and its input is not int8."""
    layer = product(graph, node)
    weight = graph.constant(layer.weight) if layer is not None and layer.weight else None
    if layer is None or weight is None or weight.dtype != np.int8 or weight.ndim < 2:
        return
    maker = graph.producer(node.input[PRODUCTS[node.op_type][0]])
    if is_dequantize(maker) and maker is not None and parameters(graph, maker).type_name != "uint8":
        return
    if not graph.is_constant(layer.codes) and not attribute(node, "transA", 0):
        yield layer, weight


def _thinned(rows: Array) -> Array:
    """Return at most 512 rows, evenly spread."""
    step = max(1, -(-rows.shape[0] // _ROWS))
    return rows[::step]


def _channels_last(columns: Array, channels: int) -> Array:
    """Return columns (n, channels * taps) in the order in which the kernel adds them: tap by tap."""
    return columns.reshape(columns.shape[0], channels, -1).swapaxes(1, 2).reshape(columns.shape)
