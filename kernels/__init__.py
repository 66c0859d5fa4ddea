"""Operator kernels in plain NumPy, one module per family; import as `onnxslim_lab.kernels`.

A kernel is a function: positional parameters are the operator's inputs (an absent optional input is
None), keyword parameters are its attributes with the defaults of the specification. Tensors are NumPy
arrays: ml_dtypes for the small types, object arrays of str for strings. Kernels never change their inputs;
a result may be a read-only view of an input.
"""

if __name__ != "onnxslim_lab.kernels":
    msg = "the kernels are a part of onnxslim_lab: import onnxslim_lab.kernels, not kernels"
    raise ImportError(msg)

from onnxslim_lab.kernels import (
    activation,
    arithmetic,
    cast,
    elementwise,
    generator,
    indexing,
    integer,
    inverse,
    linear,
    logical,
    loss,
    machines,
    ml,
    optional,
    pad,
    quantize,
    random_draws,
    reduction,
    scatter,
    selection,
    sequence,
    shape,
    spectral,
    strings,
    tfidf,
    tree_operators,
)
from onnxslim_lab.kernels.registry import Kernel, kernel, lookup, run

__all__ = [
    "Kernel",
    "activation",
    "arithmetic",
    "cast",
    "elementwise",
    "generator",
    "indexing",
    "integer",
    "inverse",
    "kernel",
    "linear",
    "logical",
    "lookup",
    "loss",
    "machines",
    "ml",
    "optional",
    "pad",
    "quantize",
    "random_draws",
    "reduction",
    "run",
    "scatter",
    "selection",
    "sequence",
    "shape",
    "spectral",
    "strings",
    "tfidf",
    "tree_operators",
]
