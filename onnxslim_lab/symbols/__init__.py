"""Symbolic sizes: their arithmetic, their propagation through a graph, and edits that follow from them."""
