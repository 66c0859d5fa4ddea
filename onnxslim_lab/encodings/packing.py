"""Integers of 1 to 8 bits packed into bytes, and the nodes that unpack them at any opset."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from onnxslim_lab.encodings.facts import narrow_types
from onnxslim_lab.encodings.plan import Array, Plan, Target, numpy_type, tensor_bytes

NATIVE_FIELDS = {4: (TensorProto.UINT4, 21, 10), 2: (TensorProto.UINT2, 25, 13)}  # width: type, opset, IR


def index_width(count: int, target: Target | None = None) -> int:
    """Return the bits that tell `count` values apart, at least 1; before opset 11 a divisor of 8.

    >>> index_width(15), index_width(16), index_width(17)
    (4, 4, 5)
    """
    width = max(1, (count - 1).bit_length())
    if target is not None and target.opset < 11:
        return 1 << (width - 1).bit_length()
    return width


def pack(values: Array, width: int) -> Array:
    """Pack integers of `width` bits, shape [n], into bytes, most significant first.

    A width that divides 8 gives consecutive fields; another gives bit planes (all highest bits, then all
    second ones, ...), each a whole number of bytes.
    """
    values = values.astype(np.uint8, copy=False)
    if width == 8:
        return values
    if 8 % width:
        padded = np.pad(values, (0, -values.size % 8))
        return np.concatenate([np.packbits((padded >> bit) & 1) for bit in range(width - 1, -1, -1)])
    per_byte = 8 // width
    fields = np.pad(values, (0, -values.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(fields), np.uint8)
    for position in range(per_byte):
        packed |= fields[:, position] << np.uint8(8 - width * (position + 1))
    return packed


def packed_bytes(count: int, width: int) -> int:
    """Return the size of what `pack` makes of `count` integers."""
    return -(-count // 8) * width if 8 % width else -(-count * width // 8)


def unpack(plan: Plan, word: str, values: Array, width: int) -> str:
    """Add integers in packed form, and the nodes that unpack them.

    Args:
        plan: Takes the tensor and the nodes.
        word: Name of the tensor.
        values: Integers from 0 to 2**width - 1, of any shape.
        width: Bits of an integer: 1 to 8, before opset 11 a divisor of 8.

    Returns:
        The local name of the integers, int32 in the shape of `values`.
    """
    opset, count = plan.target.opset, values.size
    kind, first_opset, first_ir = NATIVE_FIELDS.get(width, (TensorProto.UINT8, 99, 99))
    if width == 8 or (opset >= first_opset and plan.target.ir_version >= first_ir):
        stored = plan.tensor(word, values.astype(np.uint8), kind)
        return plan.op("Cast", stored, to=TensorProto.INT32)
    packed = pack(values.reshape(-1), width)
    column = plan.tensor(word, packed.reshape(-1, 1))
    if 8 % width:
        value = plan.op("MatMulInteger", binary_weights(plan, width), unpack_bits(plan, column, width))
    elif opset >= 11:
        shifts = plan.share(f"shift{width}", np.arange(8 - width, -1, -width, dtype=np.uint8))
        value = plan.op("BitShift", column, shifts, direction="RIGHT")
        value = plan.op("Mod", value, plan.share(f"mod{width}", np.array(1 << width, np.uint8)))
    else:
        value = _old_fields(plan, column, width)
    if packed.size * 8 // width > count:
        value = plan.op("Reshape", value, plan.share("flat", np.array([-1], np.int64)))
        value = trim(plan, value, count)
    value = plan.op("Reshape", value, plan.tensor(f"{word}_shape", np.array(values.shape, np.int64)))
    if 8 % width or opset < 11:
        return value
    return plan.op("Cast", value, to=TensorProto.INT32)


def binary_weights(plan: Plan, width: int, before: int = 0, after: int = 0) -> str:
    """Add the row that a matrix of bits is multiplied with to make integers; uint8 [1, rows].

    Args:
        plan: Takes the tensor.
        width: Rows of bits that make the integer, highest first.
        before: Rows above them that belong to something else.
        after: Likewise below.
    """
    weights = np.zeros((1, before + width + after), np.uint8)
    weights[0, before : before + width] = 1 << np.arange(width - 1, -1, -1)
    return plan.share(f"bits{before}.{width}.{after}", weights)


def _old_fields(plan: Plan, column: str, width: int) -> str:
    """Split bytes [n, 1] into fields of `width` bits, int32 [n, 8 / width], with the operators of opset 7."""
    radix = 1 << width
    wide = plan.op("Cast", column, to=TensorProto.INT32)
    powers = np.array([radix**power for power in range(8 // width - 1, -1, -1)], np.int32)
    shifted = plan.op("Div", wide, plan.share(f"div{width}", powers))
    base = plan.share(f"radix{width}", np.array(radix, np.int32))
    return plan.op("Sub", shifted, plan.op("Mul", plan.op("Div", shifted, base), base))


def unpack_bits(plan: Plan, column: str, rows: int) -> str:
    """Add the nodes that make single bits (uint8 [rows, -1], [-1] for no rows) from bytes [n, 1]."""
    if plan.target.opset >= 11:
        shifts = plan.share("shift1", np.arange(7, -1, -1, dtype=np.uint8))
        bits = plan.op("BitShift", column, shifts, direction="RIGHT")
        bits = plan.op("Mod", bits, plan.share("mod1", np.array(2, np.uint8)))
    else:
        bits = plan.op("Cast", _old_fields(plan, column, 1), to=TensorProto.UINT8)
    if not rows:
        return plan.op("Reshape", bits, plan.share("flat", np.array([-1], np.int64)))
    return plan.op("Reshape", bits, plan.share(f"rows{rows}", np.array([rows, -1], np.int64)))


def trim(plan: Plan, value: str, count: int, axis: int = 0) -> str:
    """Add the node that keeps the first `count` elements along an axis."""
    if plan.target.opset < 10:
        return plan.op("Slice", value, starts=[0], ends=[count], axes=[axis])
    start = plan.share("start", np.array([0], np.int64))
    along = plan.share(f"axis{axis}", np.array([axis], np.int64))
    return plan.op(
        "Slice", value, start, plan.tensor(f"end{len(plan.steps)}", np.array([count], np.int64)), along
    )


def codebook_of(values: Array, data_type: int, plan: Plan, index: str) -> str:
    """Add the codebook, in the narrowest exact type, and the nodes that look `index` up in it."""
    codebook = values.view(numpy_type(data_type))
    smaller = [
        kind for kind in narrow_types(codebook) if kind != TensorProto.BFLOAT16 or plan.target.opset >= 13
    ]
    wide = tensor_bytes("codebook", codebook.shape, data_type, plan.target)
    if smaller and wide - codebook.size * numpy_type(smaller[0]).itemsize > 64:  # a Cast takes about 40 bytes
        narrow = plan.tensor("codebook", codebook.astype(numpy_type(smaller[0])))
        return plan.op("Cast", plan.op("Gather", narrow, index), to=data_type)
    return plan.op("Gather", plan.tensor("codebook", codebook), index)
