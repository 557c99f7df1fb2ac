"""Layers and training steps against cuDNN and cuBLAS: `python -m benchmarks.gpu`."""
