"""The choice of an encoding: the exact smallest of all that apply to a tensor."""

from __future__ import annotations

from collections.abc import Iterable

from onnxslim_lab.encodings.facts import Facts
from onnxslim_lab.encodings.grid import grid_options
from onnxslim_lab.encodings.groups import group_options
from onnxslim_lab.encodings.options import Option, cast_options, codebook_options, repeat_options
from onnxslim_lab.encodings.plan import Array, Plan, Target, onnx_type, same_bits, tensor_bytes
from onnxslim_lab.encodings.sparse import sparse_options

FIRST_ENCODING_OPSET = 7  # below, onnxruntime does not vouch for what operators do

FAMILIES = (repeat_options, cast_options, codebook_options, group_options, grid_options, sparse_options)


def all_options(array: Array, target: Target) -> Iterable[Option]:
    """Yield every encoding that applies to the array."""
    facts = Facts(array)
    for family in FAMILIES:
        yield from family(facts, target)


def dense_bytes(array: Array, target: Target) -> int:
    """Return the bytes the array takes in the file as it is."""
    return tensor_bytes(target.name, array.shape, onnx_type(array.dtype), target)


def smallest_plan(array: Array, target: Target, saving: int = 1) -> tuple[Plan, int] | None:
    """Return the decoder with the fewest bytes, and their number; None when none saves `saving` bytes.

    Options are built in the order of their data's size until that alone exceeds the best exact size, so
    that the result is the smallest of all. It has been decoded in NumPy and equals the array bit for bit.
    """
    best: Plan | None = None
    limit = dense_bytes(array, target) - saving + 1
    for option in sorted(all_options(array, target), key=lambda item: item.payload):
        if option.payload >= limit:
            break
        plan = option.build()
        size = plan.size()
        if size < limit and same_bits(plan.decode(), array):
            best, limit = plan, size
    return None if best is None else (best, limit)
