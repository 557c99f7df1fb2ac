"""Triton kernels of sparsekd, imported as ``sparsekd.kernels``."""

if __name__ == "sparsekd.kernels":
    from .table import Kernel, instances

    __all__ = ["Kernel", "instances"]
else:
    # Under a second name every op in here would be registered twice, so there is nothing to import
    # but this empty module: a checkout on sys.path must not end the search of other packages
    # (transformers) for a package `kernels` of that name.
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"kernels.{name}: import these kernels as sparsekd.kernels")
