"""What CUDA tensors get: Triton's kernels where a weight has structure for them, else CUDA's.

Tiles, and columns shared by groups of rows where there are tensor cores for their dtype, pay on
Triton's; rows without structure on the gather kernels of csrc/cuda. Where only one backend can run
it runs everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsekd.ops import backends

_found = {name: backends.load(name) for name in ("cuda", "triton")}
if all(loaded is None for loaded, _ in _found.values()):
    raise ImportError("; ".join(reason for _, reason in _found.values()))
_cuda, _triton = (_found[name][0] for name in ("cuda", "triton"))


def backend_of(op: str, args: tuple[Any, ...]) -> Any:
    """Return the module that runs a product on these operands.

    Args:
        op: its name.
        args: those of its schema.
    """
    if _cuda is None or _triton is None:
        return _cuda or _triton
    return _triton if _triton.suits(op, args) else _cuda


def _product(op: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        return getattr(backend_of(op, args), op)(*args)

    return run


conv2d, conv2d_dgrad, conv2d_wgrad, linear, linear_dgrad, linear_wgrad = map(
    _product,
    ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad"),
)
LargestK = (_cuda or _triton).LargestK
