"""Which onnxruntime is installed, for what its versions do differently."""

import onnxruntime

INSTALLED = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
