"""Models in 16-bit floats: what can be converted, what must stay float32, and the conversion itself."""
