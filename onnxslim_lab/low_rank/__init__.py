"""Weights as products of thinner ones: the best bases, what they lose at the layer's output, and the nodes."""
