"""Triton kernels of sparsekd, imported as ``sparsekd.kernels``."""

if __name__ != "sparsekd.kernels":
    # Under a second name every op in here would be registered twice.
    raise ImportError("import these kernels as sparsekd.kernels, not as a top-level package")

from .table import Kernel, instances

__all__ = ["Kernel", "instances"]
