"""Calibration and evaluation data: npz files, folders of npy, ONNX test sets, Python functions."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_lab.errors import DataError, ParameterError, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.arrays import cut, load_arrays, load_sample_folders
from onnxslim_lab.inputs.model_inputs import ModelInput, check_feed, model_inputs
from onnxslim_lab.inputs.onnx_test_sets import is_test_sets, load_test_sets
from onnxslim_lab.user_code import is_function_spec, load_function
from onnxslim_lab.worker.messages import Array, Value


@dataclass(frozen=True)
class Dataset:
    """Feeds for a model.

    Attributes:
        feeds: One dict for each run, inputs by name; can be read any number of times.
        labels: One for each sample, in order, or None.
        source: Where the data came from, for reports.
        random: Whether it was made up; figures on such data say nothing about the task.
        notes: What a reader of the figures must know: samples left out, how ranges were chosen.
        dims: Sizes chosen for the model's open dimensions, where the data was made for the model.
    """

    feeds: Sequence[dict[str, Value]]
    labels: Array | None = None
    source: str = "memory"
    random: bool = False
    notes: list[str] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.feeds)


def load_data(
    spec: str | os.PathLike[str], graph: Graph, *, limit: int | None = None, batch: int | None = None
) -> Dataset:
    """Return the data that `spec` names, checked against the model's inputs.

    Args:
        spec: One of
            an .npz file with one array for each input, samples along the first axis, and optional `labels`
            (or an .npy file, for a model with one input);
            a folder of NAME.npy files of the same kind (memory-mapped);
            a folder of folders, one for each feed, with NAME.npy inside;
            an ONNX test set: a folder with test_data_set_* folders of input_N.pb, or one of these;
            'module:function', called with nothing or with the model's inputs by name, that gives dicts or
            (dict, label) pairs.
        graph: The model.
        limit: Use at most so many samples; needed for functions that never end.
        batch: Samples for each feed where the model leaves it open; 1 when not given. Where the model
            fixes its first dimension, that is taken.

    Raises:
        DataError: Not found, not readable, or not what the inputs take.
        ParameterError: limit or batch is less than 1, or batch is not what the model fixes.
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise ParameterError(f"{name} must be 1 or more, not {value}")
    inputs = model_inputs(graph)
    text = os.fspath(spec)
    path = Path(text)
    if path.is_dir():
        if is_test_sets(path):
            return Dataset(load_test_sets(path, inputs, limit), source=text)
        if not any(path.glob("*.npy")):
            folders, labels = load_sample_folders(path, inputs, limit)
            return Dataset(folders, labels, text)
    elif not path.exists():
        if is_function_spec(text):
            return _from_function(text, inputs, limit)
        raise DataError(
            f"no data at {quote(text)}: give an .npz file, a folder of .npy files, a folder with "
            "test_data_set_* or module:function"
        )
    arrays, labels = load_arrays(path, inputs)
    feeds, labels, notes = cut(arrays, labels, inputs, where=text, batch=batch, limit=limit)
    return Dataset(feeds, labels, text, notes=notes)


def _from_function(spec: str, inputs: dict[str, ModelInput], limit: int | None) -> Dataset:
    """Call a user's function and check what it gives."""
    function = load_function(spec, DataError)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin
        parameters = []
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    wanted = [p for p in parameters if p.default is p.empty and p.kind in positional]
    if len(wanted) > 1:
        raise DataError(f"{quote(spec)} must take no argument, or the inputs by name; it takes {len(wanted)}")
    try:
        given: Iterable[Any] = function(dict(inputs)) if wanted else function()
        items = list(itertools.islice(given, limit))
    except Exception as error:
        raise DataError(f"{quote(spec)} failed: {type(error).__name__}: {error}") from error
    feeds: list[dict[str, Value]] = []
    labels: list[Array] = []
    for number, item in enumerate(items):
        feed = item
        if isinstance(item, tuple) and len(item) == 2:
            feed, label = item
            labels.append(np.atleast_1d(np.asarray(label)))
        feeds.append(check_feed(feed, inputs, f"{quote(spec)}, item {number}"))
    if not feeds:
        raise DataError(f"{quote(spec)} gave no data")
    if labels and len(labels) != len(feeds):
        raise DataError(
            f"{quote(spec)} gave labels for {len(labels)} of {len(feeds)} items; give all or none"
        )
    return Dataset(feeds, np.concatenate(labels) if labels else None, spec)
