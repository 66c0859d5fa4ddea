"""Structured pruning: which slices of which tensors go together, which of them matter least, and their removal."""
