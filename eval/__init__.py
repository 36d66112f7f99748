"""Measures a model: held-out text in bits per byte, samples."""
