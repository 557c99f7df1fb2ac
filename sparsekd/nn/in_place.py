"""Rewire a module so that whatever knows its tensors by their addresses goes on with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparsekd import ops
from sparsekd.errors import UnsupportedError
from sparsekd.topology import TopologyDelta

if TYPE_CHECKING:
    from sparsekd.nn.base import SparseModule


def rewire_in_place(module: SparseModule, delta: TopologyDelta, grad: Tensor | None) -> None:
    """Write a new topology, and what survives, into the tensors of a capturable module.

    Args:
        module: whose topology is `delta.old`.
        delta: the way to the new topology.
        grad: of the new values, if there is one.

    Raises:
        UnsupportedError: a tensor would not keep its place; nothing has changed then.
    """
    new = delta.new
    if new.nnz != delta.old.nnz:
        raise _refusal(module, f"it keeps its {delta.old.nnz} nonzeros, got {new.nnz}")
    indices = module.crow_indices, module.col_indices
    try:
        # first, as this alone may be refused
        ops.overwrite_indices(*indices, new.crow_indices, new.col_indices)
    except UnsupportedError as error:
        raise _refusal(module, str(error)) from None
    module.values.copy_(delta.carry(module.values.detach()))
    if grad is not None:
        assert module.values.grad is not None
        module.values.grad.copy_(grad)
    module._topology = new._moved(*indices)


def _refusal(module: SparseModule, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"mask: capturable {module} cannot take it in place: {problem}. Nothing has changed; call "
        "make_capturable(model, False), drop the CUDA graphs, rewire, and record anew"
    )
