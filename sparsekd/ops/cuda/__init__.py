"""The backend "cuda": the kernels of csrc/cuda."""
