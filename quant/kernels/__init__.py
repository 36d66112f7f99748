"""Kernels in Triton for CUDA and in C for CPUs with AVX2, each with a twin in PyTorch that gives the same bits.

They are imported where they are used: Triton is there on GPUs alone, and C is compiled at its first call. With
`TRITON_INTERPRET=1` those in Triton run on a CPU, step by step, which is how they are tested without a GPU.
"""
