"""Encodings of tensors in plain ONNX: what each stores, how it decodes, and which is smallest."""
