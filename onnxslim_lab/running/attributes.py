"""A node's attributes as the keywords of its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, SparseTensorProto, helper

from onnxslim_lab.kernels.registry import IGNORED
from onnxslim_lab.weights import Array, WeightStore, to_array

Bound = Mapping[str, AttributeProto]
"""The attributes of the call around a function's nodes."""

_BODIES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def resolve(node: NodeProto, bound: Bound) -> dict[str, AttributeProto]:
    """Return a node's attributes with references replaced by what the call gives; without those it does not.

    Attributes that are bodies are left out: graphs keep them apart.
    """
    found = {}
    for item in node.attribute:
        if not item.ref_attr_name:
            if item.type not in _BODIES:
                found[item.name] = item
        elif item.ref_attr_name in bound:
            given = AttributeProto()
            given.CopyFrom(bound[item.ref_attr_name])
            given.name = item.name
            found[item.name] = given
    return found


def keywords(node: NodeProto, bound: Bound, store: WeightStore) -> dict[str, Any]:
    """Return a node's attributes as Python values: tensors as arrays, strings decoded."""
    return {name: value_of(item, store) for name, item in resolve(node, bound).items() if name not in IGNORED}


def value_of(item: AttributeProto, store: WeightStore) -> Any:
    """Return an attribute's value."""
    if item.type == AttributeProto.TENSOR:
        return to_array(item.t, store)
    if item.type == AttributeProto.SPARSE_TENSOR:
        return dense(item.sparse_tensor, store)
    if item.type == AttributeProto.TENSORS:
        return [to_array(tensor, store) for tensor in item.tensors]
    if item.type == AttributeProto.STRING:
        return item.s.decode("utf-8", "replace")
    if item.type == AttributeProto.STRINGS:
        return [text.decode("utf-8", "replace") for text in item.strings]
    value = helper.get_attribute_value(item)
    return list(value) if item.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value


def dense(sparse: SparseTensorProto, store: WeightStore) -> Array:
    """Return a sparse tensor as a read-only dense array.

    Raises:
        ValueError, IndexError: The indices do not fit the shape.
    """
    values, places = to_array(sparse.values, store), to_array(sparse.indices, store)
    shape = tuple(sparse.dims)
    result = np.zeros(shape, values.dtype)
    if values.dtype == object:
        result.fill("")
    where = np.unravel_index(places, shape) if places.ndim == 1 else tuple(places.T)
    result[where] = values
    result.flags.writeable = False
    return result
