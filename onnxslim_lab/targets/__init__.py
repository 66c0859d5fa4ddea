"""Facts about the runtimes that quantized models are made for: data, no code."""
