"""Data from npz files and npy folders, cut into feeds of the model's batch size."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from onnxslim_lab.errors import DataError, ParameterError, quote
from onnxslim_lab.inputs.model_inputs import ModelInput, as_dtype, check_feed, check_names, optional_names
from onnxslim_lab.worker.messages import Array, Value

LABELS = "labels"


@dataclass(frozen=True)
class Batches(Sequence[dict[str, Value]]):
    """Feeds cut from arrays when they are read.

    Attributes:
        arrays: Samples along the first axis.
        whole: Inputs whose every sample is a feed of its own, without a batch axis to cut.
        samples: Number of samples used.
        batch: Samples for each feed.
        empty: Optional inputs, fed as None.
    """

    arrays: dict[str, Array]
    whole: frozenset[str]
    samples: int
    batch: int
    empty: tuple[str, ...] = ()

    def __len__(self) -> int:
        return (self.samples + self.batch - 1) // self.batch

    @overload
    def __getitem__(self, index: int) -> dict[str, Value]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Value]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Value] | list[dict[str, Value]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = (index % len(self)) * self.batch
        stop = min(start + self.batch, self.samples)
        feed: dict[str, Value] = dict.fromkeys(self.empty)
        return feed | {
            name: np.asarray(array[start]) if name in self.whole else np.asarray(array[start:stop])
            for name, array in self.arrays.items()
        }


def _read_npy(path: Path) -> Array:
    """Return an array file, memory-mapped."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {quote(str(path))}: {_reason(error)}") from error
    return array


def _reason(error: Exception) -> str:
    if "allow_pickle" in str(error):
        return "it holds Python objects, which are not loaded; save plain arrays (strings as dtype 'U')"
    return str(error) or type(error).__name__


def _input_named(stem: str, inputs: dict[str, ModelInput]) -> str:
    """Return the input a file name stands for: characters that files cannot have are written "_".

    >>> _input_named("a_b", {"a/b": None})
    'a/b'
    """
    if stem in inputs:
        return stem
    matches = [name for name in inputs if re.sub(r'[<>:"/\\|?*]', "_", name) == stem]
    return matches[0] if len(matches) == 1 else stem


def load_arrays(path: Path, inputs: dict[str, ModelInput]) -> tuple[dict[str, Array], Array | None]:
    """Return the arrays of an npz file or a folder of npy files by input name, and the labels.

    Raises:
        DataError: Not readable, or names that are not inputs.
    """
    if path.is_dir():
        arrays = {_input_named(file.stem, inputs): _read_npy(file) for file in sorted(path.glob("*.npy"))}
    else:
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                arrays = {_only_input(inputs, path): loaded}
            else:
                with loaded:
                    arrays = {name: loaded[name] for name in loaded.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read {quote(str(path))}: {_reason(error)}") from error
    labels = None if LABELS in inputs else arrays.pop(LABELS, None)
    check_names(arrays, inputs, str(path))
    return arrays, labels


def _only_input(inputs: dict[str, ModelInput], path: Path) -> str:
    """Return the input that a file without names must mean."""
    required = [name for name, info in inputs.items() if info.required]
    if len(required) != 1:
        raise DataError(
            f"{quote(str(path))} is one array, but the model has {len(required)} inputs; "
            "save them by name with numpy.savez"
        )
    return required[0]


def load_sample_folders(
    path: Path, inputs: dict[str, ModelInput], limit: int | None
) -> tuple[list[dict[str, Value]], Array | None]:
    """Return one feed for each subfolder with NAME.npy files, in natural order, and labels.npy beside them.

    Raises:
        DataError: There is no such folder, or a file is not what its input takes.
    """
    folders = [f for f in path.iterdir() if f.is_dir() and any(f.glob("*.npy"))]
    folders.sort(key=lambda f: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", f.name)])
    if not folders:
        raise DataError(
            f"folder {quote(str(path))} holds no data: expected NAME.npy files, folders of them, or "
            "test_data_set_* folders"
        )
    feeds: list[dict[str, Value]] = []
    for folder in folders[:limit]:
        files = {_input_named(f.stem, inputs): f for f in sorted(folder.glob("*.npy"))}
        feeds.append(check_feed({n: _read_npy(f) for n, f in files.items()}, inputs, str(folder)))
    labels = path / f"{LABELS}.npy"
    return feeds, _read_npy(labels)[:limit] if labels.exists() else None


def _fit(array: Array, info: ModelInput, where: str) -> tuple[Array, bool]:
    """Return the array in the input's dtype and whether each sample is a whole feed."""
    if not info.element:
        raise DataError(
            f"{where}: input {quote(info.name)} takes {info}, which arrays cannot hold; use an ONNX test set "
            "or module:function"
        )
    array = as_dtype(array, info, where)
    if not array.ndim:
        raise DataError(f"{where}: input {quote(info.name)} got a scalar; samples go along a first axis")
    if info.shape is None:
        return array, False
    rank = len(info.shape)
    whole = array.ndim == rank + 1
    if not whole and array.ndim != rank:
        raise DataError(
            f"{where}: input {quote(info.name)} takes {info}, got shape {list(array.shape)}: "
            f"expected rank {rank} (batches of samples) or {rank + 1} (a whole feed for each sample)"
        )
    given = array.shape[1:]
    for size, expected in zip(given, info.shape if whole else info.shape[1:], strict=True):
        if isinstance(expected, int) and size != expected:
            raise DataError(
                f"{where}: input {quote(info.name)} takes {info}, got samples of shape {list(given)}: "
                f"{size} must be {expected}"
            )
    return array, whole


def cut(
    arrays: dict[str, Array],
    labels: Array | None,
    inputs: dict[str, ModelInput],
    *,
    where: str,
    batch: int | None,
    limit: int | None,
) -> tuple[Batches, Array | None, list[str]]:
    """Cut arrays with samples along the first axis into feeds.

    An array with as many axes as its input is cut into batches; one with an axis more holds a whole feed
    for each sample, and then every feed is one sample.

    Args:
        arrays: By input name.
        labels: One for each sample, or None.
        inputs: The model's inputs.
        where: What errors call the data.
        batch: Samples for each feed where the model leaves it open.
        limit: Use at most so many samples.

    Returns:
        Feeds, labels of the samples used, notes on what was left out.
    """
    fitted = {name: _fit(array, inputs[name], where) for name, array in arrays.items()}
    whole = frozenset(name for name, (_, is_whole) in fitted.items() if is_whole)
    counts = {name: array.shape[0] for name, (array, _) in fitted.items()}
    if labels is not None:
        if not labels.ndim:
            raise DataError(f"{where}: {LABELS} must have one entry for each sample, got a scalar")
        counts[LABELS] = labels.shape[0]
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{where}: arrays have different numbers of samples along the first axis: "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
        )
    total = next(iter(counts.values()), 0)
    fixed = _fixed_batch({n: inputs[n] for n in arrays if n not in whole}, where)
    size = fixed or (1 if whole else batch or 1)
    if (whole and size != 1) or (batch is not None and batch != size):
        raise ParameterError(
            f"{where}: the {'data' if whole and not fixed else 'model'} fixes {size} samples for each feed"
            + (f", not {batch}" if batch is not None else "; give every input a whole feed for each sample")
        )
    used = min(total, limit or total)
    notes = []
    if fixed and used % fixed:
        rest = used % fixed
        used -= rest
        notes.append(f"{rest} samples left out: the model takes exactly {fixed} at a time")
    if not used:
        raise DataError(f"{where}: {total} samples are fewer than the {size} the model takes at a time")
    used_arrays = {name: array for name, (array, _) in fitted.items()}
    found = Batches(used_arrays, whole, used, size, tuple(optional_names(inputs)))
    return found, None if labels is None else labels[:used], notes


def _fixed_batch(inputs: dict[str, ModelInput], where: str) -> int | None:
    """Return the first dimension that the model fixes; None when it is open."""
    fixed = {n: i.shape[0] for n, i in inputs.items() if i.shape and isinstance(i.shape[0], int)}
    if len(set(fixed.values())) > 1:
        raise DataError(
            f"{where}: the inputs' first dimensions differ ("
            + ", ".join(f"{name} {size}" for name, size in fixed.items())
            + "): give the arrays a further first axis, one whole feed for each sample"
        )
    size = next(iter(fixed.values()), None)
    return size if isinstance(size, int) and size > 0 else None
