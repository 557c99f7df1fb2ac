"""The kernels of csrc/cuda, and the plans that all GPU kernels read."""
