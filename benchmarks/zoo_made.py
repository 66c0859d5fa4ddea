"""Models the zoo makes itself: classical learners on scikit-learn's digits, by the public converters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from sklearn.datasets import load_digits

OPSET = {"": 17, "ai.onnx.ml": 3}


@dataclass(frozen=True)
class Maker:
    """How a model is made, and the modules that making it needs."""

    needs: tuple[str, ...]
    make: Callable[[], onnx.ModelProto]


def _from_sklearn(learner: Any) -> onnx.ModelProto:
    """Fit on the first 1,200 digits and convert; ZipMap stays, so the second output is a sequence of maps."""
    x, y = load_digits(return_X_y=True)
    learner.fit(x[:1200], y[:1200])
    sample = x[:1].astype(np.float32)
    model = importlib.import_module("skl2onnx").to_onnx(learner, sample, target_opset=OPSET)
    assert isinstance(model, onnx.ModelProto)
    return model


def _mlp() -> onnx.ModelProto:
    pipeline = importlib.import_module("sklearn.pipeline").make_pipeline
    scaler = importlib.import_module("sklearn.preprocessing").StandardScaler()
    network = importlib.import_module("sklearn.neural_network").MLPClassifier(
        (64,), random_state=0, max_iter=300
    )
    return _from_sklearn(pipeline(scaler, network))


def _forest() -> onnx.ModelProto:
    ensemble = importlib.import_module("sklearn.ensemble")
    return _from_sklearn(ensemble.RandomForestClassifier(20, random_state=0))


def _svc() -> onnx.ModelProto:
    return _from_sklearn(importlib.import_module("sklearn.svm").SVC(random_state=0))


def _lightgbm() -> onnx.ModelProto:
    x, y = load_digits(return_X_y=True)
    learner = importlib.import_module("lightgbm").LGBMClassifier(n_estimators=10, random_state=0, verbose=-1)
    learner.fit(x[:1200], y[:1200])
    types = importlib.import_module("onnxmltools.convert.common.data_types")
    convert = importlib.import_module("onnxmltools.convert").convert_lightgbm
    features = [("X", types.FloatTensorType([None, x.shape[1]]))]
    model = convert(learner, initial_types=features, target_opset=15)
    assert isinstance(model, onnx.ModelProto)
    return model


MADE = {
    "digits_mlp": Maker(("skl2onnx",), _mlp),
    "digits_forest": Maker(("skl2onnx",), _forest),
    "digits_svc": Maker(("skl2onnx",), _svc),
    "digits_lightgbm": Maker(("onnxmltools", "skl2onnx", "lightgbm"), _lightgbm),
}
