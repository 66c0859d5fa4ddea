"""Quantization: types and grids, ranges of activations, rounding of weights, plans and their writing."""
