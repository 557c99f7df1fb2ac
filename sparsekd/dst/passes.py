"""The backward passes that a parameter's `.grad` adds up, so that other sums can follow it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparsekd._torch import at_end_of_pass, current_pass, version_of
from sparsekd.dst import replicas

_Part = TypeVar("_Part")


class Passes(Generic[_Part]):
    """The backward passes that count for `values.grad`, tracked while growth collects operands.

    A pass that runs a layer's weight gradient need not end in `.grad`: `autograd.grad` returns its
    result instead. So the parts of a pass are pending until torch has accumulated into `.grad`, and
    dropped if it never does. Between two passes the loop may set `.grad` to None, zero it, scale it
    (clipping, unscaling) or write something else; comparing with a copy of what the last pass left
    shows which.

    Args:
        values: the parameter.
        commit: takes the parts of a pass that has accumulated into `values.grad`.
    """

    def __init__(self, values: Tensor, commit: Callable[[list[_Part]], None]) -> None:
        self.values, self._commit = values, commit
        self.left: Tensor | None = None
        """What the passes that count have left in `.grad`, None where there are none."""
        self.foreign = False
        """Whether `.grad` holds something that neither these passes nor a factor explain."""
        self._pending: dict[int, list[_Part]] = {}
        self._noted: tuple[Tensor, int] | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def known(self, backward_pass: int) -> bool:
        """Return whether a part of this pass has been added."""
        return backward_pass in self._pending

    def add(self, backward_pass: int, part: _Part) -> None:
        """Add a part of the running pass; it is pending until the pass is known to count."""
        if not (self.values.requires_grad and self.values.is_leaf):
            return  # the call was with other values, so no pass ends here
        me = weakref.ref(self)
        if self._hook is None:

            def accumulated(_: Tensor) -> None:
                passes = me()
                if passes is not None:
                    passes._accumulated()

            self._hook = self.values.register_post_accumulate_grad_hook(accumulated)
        if backward_pass not in self._pending:
            self._pending[backward_pass] = []

            def ended() -> None:
                passes = me()
                if passes is not None:
                    passes._pending.pop(backward_pass, None)

            at_end_of_pass(ended)
        self._pending[backward_pass].append(part)

    def follow(self) -> float:
        """Return the factor by which `.grad` has changed since the last pass or call.

        It is 0 where `.grad` was zeroed or no pass counts, 1 where nothing has happened. Something
        else than a factor makes `foreign` true, until the next zero.
        """
        grad = self.values.grad
        factor = self._factor(grad)
        if factor == 0.0:
            # Nobody's pass: what is there before the first one was left by an earlier iteration.
            self.foreign = grad is not None and self.left is None and bool(grad.any())
            self.left = self._noted = None
        elif factor is None:
            self.foreign = True
        if factor != 0.0 and factor != 1.0 and grad is not None:
            self._note(grad)
        return 1.0 if factor is None else factor

    def renew(self) -> None:
        """Note the current `.grad` as what the passes have left there."""
        if self.left is not None and self.values.grad is not None:
            self._note(self.values.grad)

    def close(self) -> None:
        """Stop watching; what has been committed stays."""
        self._pending.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _accumulated(self) -> None:
        parts = self._pending.pop(current_pass(), None)
        grad = self.values.grad
        if parts is None or grad is None:
            return
        self._note(grad)
        self._commit(parts)

    def _note(self, grad: Tensor) -> None:
        self.left = grad.detach().clone()
        self._noted = (grad, version_of(grad))

    def _factor(self, grad: Tensor | None) -> float | None:
        """Return the factor from the noted gradient to `grad`, or None if it is no multiple."""
        if grad is None or self.left is None or self._noted is None:
            return 0.0
        if torch.equal(grad.detach(), self.left):
            tensor, version = self._noted
            written = grad is not tensor or version_of(grad) != version
            # A gradient of exactly 0 that was written to: zeroed, as far as anybody can tell.
            return 0.0 if written and not self.left.any() else 1.0
        if not grad.any():
            return 0.0
        if not grad.isfinite().all():
            return 1.0  # ranks nothing: updates are skipped for it
        # Of several processes one cannot tell an exchange of gradients from other changes; what
        # growth ranks is compared once it is exchanged as well.
        return 1.0 if replicas.several() else multiple(grad.detach(), self.left)


def multiple(tensor: Tensor, of: Tensor) -> float | None:
    """Return the factor by which `tensor` is a multiple of `of` but for rounding, or None.

    Example:
        >>> one = torch.tensor([1.0, -2.0, 3.0])
        >>> multiple(0.5 * one, one), multiple(one.abs(), one)
        (0.5, None)
    """
    if (
        tensor.shape != of.shape
        or not len(of)
        or not tensor.isfinite().all()
        or not of.isfinite().all()
    ):
        return None
    wide, base = tensor.double(), of.double()
    length = base.abs().max()
    if length == 0:
        return None
    base = base / length  # so that no square overflows or vanishes
    factor = torch.dot(wide, base) / torch.dot(base, base)
    kind = torch.finfo(tensor.dtype)
    # Clipping after unscaling rounds twice; small numbers are rounded to the grid of the smallest.
    allowed = 4 * kind.eps * wide.abs() + 2 * kind.smallest_normal * kind.eps
    if factor == 0 or bool(((wide - factor * base).abs() > allowed).any()):
        return None
    return float(factor / length)
