"""The kernels of kernels/: plans of tiles, launches, sizes tuned by measurement."""
