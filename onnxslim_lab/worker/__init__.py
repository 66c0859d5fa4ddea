"""The child process that runs onnxruntime, and how it is talked to."""
