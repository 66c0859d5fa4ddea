"""Streaming statistics of activations: ranges, histograms, statistics per channel, Gram matrices."""

from onnxslim_lab.statistics.cache import default_folder
from onnxslim_lab.statistics.calibration import Calibration, gram_input, gram_source
from onnxslim_lab.statistics.collected import MissingStatistics, Statistics, Want
from onnxslim_lab.statistics.gram import Gram
from onnxslim_lab.statistics.values import Channels, Histogram, ValueStatistics

__all__ = [
    "Calibration",
    "Channels",
    "Gram",
    "Histogram",
    "MissingStatistics",
    "Statistics",
    "ValueStatistics",
    "Want",
    "default_folder",
    "gram_input",
    "gram_source",
]
