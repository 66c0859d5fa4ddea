"""Inputs of models: reading them from files, and making random ones that a model accepts."""
