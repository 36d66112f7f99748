"""Measure a model: bits per byte of held-out text, multiple-choice tasks, samples."""
