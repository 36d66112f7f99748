"""Quantization that attaches to a finished module from outside."""
