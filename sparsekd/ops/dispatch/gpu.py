"""What CUDA tensors get: the kernels of csrc/cuda or Triton's, whichever `gpu_chooser` chooses.

Where only one of them can run it runs everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsekd.ops.dispatch import backends
from sparsekd.ops.dispatch.single import Single

_found = {name: backends.load(name) for name in ("cuda", "triton")}
if all(loaded is None for loaded, _ in _found.values()):
    raise ImportError("; ".join(reason for _, reason in _found.values()))
_modules = {name: loaded for name, (loaded, _) in _found.items() if loaded is not None}


@Single
def chooser() -> Any:
    """Return what chooses in this process, None where there is no choice."""
    if len(_modules) < len(_found):
        return None
    from sparsekd.ops.dispatch import gpu_chooser  # which needs Triton

    return gpu_chooser.chooser(_modules)


def backend_of(op: str, args: tuple[Any, ...]) -> Any:
    """Return the module that runs a product on these operands.

    Args:
        op: its name.
        args: those of its schema.
    """
    choice = chooser()
    if choice is None:
        return next(iter(_modules.values()))
    return _modules[choice.choose(op, args)]


def choices() -> dict[str, Any]:
    """Return the path of the file of choices and how many are known; empty without a choice."""
    choice = chooser()
    return {} if choice is None else choice.store.info()


def _product(op: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        return getattr(backend_of(op, args), op)(*args)

    return run


conv2d, conv2d_dgrad, conv2d_wgrad, linear, linear_dgrad, linear_wgrad = map(
    _product,
    ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad"),
)
LargestK = next(iter(_modules.values())).LargestK
