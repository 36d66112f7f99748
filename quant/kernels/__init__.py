"""Triton kernels for CUDA, each with a twin in PyTorch that is its oracle and what CPUs run.

They are imported where they are used, because Triton is there on GPUs alone. With `TRITON_INTERPRET=1` they run on a
CPU, step by step, which is how they are tested without a GPU.
"""
