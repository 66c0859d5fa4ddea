"""Equalization and bias correction: which channels scale together, by how much, and where biases sit."""
