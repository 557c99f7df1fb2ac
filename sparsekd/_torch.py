"""Private names of torch, each behind a name that says what it is for.

`tests/test_torch_names.py` has a test for each, which fails by name once a torch changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

_peek = torch._C._functorch.peek_interpreter_stack
_set_single_level = torch._C._functorch.set_single_level_autograd_function_allowed
_get_single_level = torch._C._functorch.get_single_level_autograd_function_allowed

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_compiling


def in_transform() -> bool:
    """Return whether a transform of torch.func is at work: grad, vmap, jvp and what they make."""
    return _peek() is not None


def in_forward_ad() -> bool:
    """Return whether tensors may have tangents, those of torch.func.jvp included."""
    return forward_ad._current_level >= 0


def transformed(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` may have a tangent, or be one of a batch that a transform hides.

    Batches are made by torch.func.vmap and, another kind, by `is_grads_batched` and
    `vectorize=True` of torch.autograd.
    """
    return in_transform() or in_forward_ad() or (not _is_compiling() and _is_legacy_batched(tensor))


def apply_at_this_level(node: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd.Function inside an Autograd kernel, for the transform at hand alone.

    That is how torch's own kernels differentiate: the call that the forward makes of its op goes to
    the next transform by itself. `Function.apply` sends the whole Function through all transforms,
    which an Autograd kernel, having been sent through them already, must not.
    """
    before = _get_single_level()
    _set_single_level(True)
    try:
        return super(torch.autograd.Function, node).apply(*args)  # type: ignore[misc]
    finally:
        _set_single_level(before)


def without_tangent(tensor: Any) -> Any:
    """Return a tensor without its tangent of the innermost level; anything else as it is."""
    return forward_ad.unpack_dual(tensor).primal if isinstance(tensor, torch.Tensor) else tensor


@contextmanager
def derivatives_of_outer_levels() -> Iterator[None]:
    """Record derivatives in an autograd.Function, where torch turns that off.

    Inside a transform, what its forward and its jvp call belongs to the transforms around, which
    differentiate it too.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield
