"""The transformer as a maths paper: no environment, no process groups, no precision, no quantization."""
