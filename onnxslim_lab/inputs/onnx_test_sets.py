"""ONNX test sets: folders test_data_set_* with input_N.pb files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import OptionalProto, SequenceProto, TensorProto, TypeProto, numpy_helper

from onnxslim_lab.errors import DataError, quote
from onnxslim_lab.inputs.model_inputs import ModelInput, check_feed, check_value
from onnxslim_lab.worker.messages import Value


def _files(folder: Path) -> list[Path]:
    """Return input_0.pb, input_1.pb ... in order of their number."""
    found = [
        (int(m.group(1)), f) for f in folder.iterdir() if (m := re.fullmatch(r"input_(\d+)\.pb", f.name))
    ]
    return [file for _, file in sorted(found)]


def _folders(path: Path) -> list[Path]:
    found = [
        (int(m.group(1)), f) for f in path.iterdir() if (m := re.fullmatch(r"test_data_set_(\d+)", f.name))
    ]
    return [folder for _, folder in sorted(found)] or ([path] if _files(path) else [])


def is_test_sets(path: Path) -> bool:
    """Whether a folder is an ONNX test set or holds some."""
    return bool(_folders(path))


def load_test_sets(path: Path, inputs: dict[str, ModelInput], limit: int | None) -> list[dict[str, Value]]:
    """Return one feed for each test set, in order of their number.

    The files stand for the model's inputs in order, initializers left out unless there are as many files
    as inputs; a tensor that carries the name of an input is that input.

    Raises:
        DataError: A file is damaged, is not what its input takes, or the numbers of files and inputs differ.
    """
    feeds: list[dict[str, Value]] = []
    for folder in _folders(path)[:limit]:
        files = _files(folder)
        infos = list(inputs.values())
        if len(files) != len(infos):
            infos = [info for info in infos if info.required]
        if len(files) > len(infos):
            raise DataError(
                f"{quote(str(folder))} has {len(files)} input files; the model has {len(infos)} inputs"
            )
        feed: dict[str, Value] = {}
        for file, info in zip(files, infos, strict=False):
            name, value = _read(file, info.type)
            target = inputs.get(name, info)
            feed[target.name] = check_value(value, target, str(file))
        feeds.append(check_feed(feed, inputs, str(folder)))
    return feeds


def _read(path: Path, kind: TypeProto) -> tuple[str, Any]:
    """Return the name and value of a file, read as the input's type says."""
    message: TensorProto | SequenceProto | OptionalProto
    if kind.HasField("optional_type"):
        message = OptionalProto()
    elif kind.HasField("sequence_type"):
        message = SequenceProto()
    else:
        message = TensorProto()
    try:
        message.ParseFromString(path.read_bytes())
        _refuse_external(message, path)
        if isinstance(message, OptionalProto):
            return message.name, numpy_helper.to_optional(message)
        if isinstance(message, SequenceProto):
            return message.name, numpy_helper.to_list(message)
        return message.name, numpy_helper.to_array(message)
    except (OSError, DecodeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise DataError(f"cannot read {quote(str(path))}: {error}") from error


def _refuse_external(message: Any, path: Path) -> None:
    """Raise DataError for tensors that point to other files."""
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL:
            raise DataError(f"{quote(str(path))} points to data in another file, which is not followed")
        return
    if isinstance(message, OptionalProto):
        _refuse_external(message.tensor_value, path)
        _refuse_external(message.sequence_value, path)
        return
    for tensor in message.tensor_values:
        _refuse_external(tensor, path)
