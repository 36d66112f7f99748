"""The transformer, written like a math paper: no environment, no process groups, no precision, no quantization."""
