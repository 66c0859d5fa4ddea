"""The parts of the NumPy interpreter."""
