"""Rewire a module so that whatever knows its tensors by their addresses goes on with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekd import ops
from sparsekd.errors import UnsupportedError
from sparsekd.nn import copies
from sparsekd.topology import TopologyDelta

if TYPE_CHECKING:
    from sparsekd.nn.base import SparseModule


def prepare_in_place(module: SparseModule, delta: TopologyDelta) -> Callable[[], None]:
    """Return what writes a new topology, and what survives, into the tensors of a module.

    Args:
        module: whose topology is `delta.old`.
        delta: the way to the new topology.

    Raises:
        UnsupportedError: a tensor would not keep its place.
    """
    new = delta.new
    if new.nnz != delta.old.nnz:
        raise _refusal(module, f"it keeps its {delta.old.nnz} nonzeros, got {new.nnz}")
    crow, col = module.crow_indices, module.col_indices
    try:
        adopt_plans = ops.prepare_plans(crow, col, new.crow_indices, new.col_indices)
    except UnsupportedError as error:
        raise _refusal(module, str(error)) from None

    def write() -> None:
        crow.copy_(new.crow_indices)
        col.copy_(new.col_indices)
        adopt_plans()
        values = module.values
        values.copy_(delta.carry(values.detach()))
        if values.grad is not None:
            values.grad.copy_(delta.carry(values.grad))
        module._topology = new._moved(crow, col)
        copies.moved(module)

    return write


def _refusal(module: SparseModule, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"mask: capturable {module} cannot take it in place: {problem}. Nothing has changed; call "
        "make_capturable(model, False), drop the CUDA graphs, rewire, and record anew"
    )
