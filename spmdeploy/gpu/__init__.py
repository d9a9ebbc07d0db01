"""CUDA devices, memory and kernels."""
