"""Rewires in place, after which a recorded CUDA graph, which knows addresses, stays valid."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparsekd import ops
from sparsekd.errors import UnsupportedError
from sparsekd.nn import copies
from sparsekd.nn.stored import StoredWeight
from sparsekd.topology import TopologyDelta


def make_capturable(
    model: nn.Module, capturable: bool = True, *, may_move: bool = False
) -> nn.Module:
    """Make rewires of a model write into its tensors instead of replacing them.

    `sparsekd.cuda.graphed` does this, records and replays; this is for graphs of your own.

    A training step that was recorded as a CUDA graph can then be replayed after a rewire: values,
    indices, gradients, optimizer state and the plans of the GPU kernels stay where they are, and
    only what is in them changes. A rewire for which one of them would have to move raises
    UnsupportedError, says which, and changes nothing of its module: the number of nonzeros stays as
    it is (GMP, GraNet, AC/DC and redistribution change it), and so do the tiles that the kernels
    compute. What to do then: take it back, rewire, and record anew. A `state_dict` of another
    topology replaces tensors as ever; record anew after loading one.

    An iteration in which a method of `sparsekd.dst` updates the topology (`dst.due`) runs outside
    the graph, as its dense gradients are formed by other kernels. A `state_dict` taken before a
    rewire shows the rewired state after it, as it shows every step of the optimizer; copy it.

    Args:
        model: any module with sparse modules.
        capturable: False takes it back.
        may_move: replace the tensors of a module that cannot keep them instead of raising. Graphs
            recorded before such a rewire must not be replayed after it.

    Returns:
        The model.

    Raises:
        ValueError: `model` has no sparse module.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.make_capturable(skd.nn.SparseLinear(8, 4, sparsity=0.5))
        >>> place = layer.values.data_ptr()
        >>> delta = layer.rewire(~layer.topology.mask())
        >>> layer.values.data_ptr() == place, layer.topology.version
        (True, 1)
    """
    found = [module for module in model.modules() if isinstance(module, StoredWeight)]
    if not found:
        raise ValueError(f"model: expected sparse modules, got a {type(model).__name__} without")
    for module in found:
        module.capturable, module.may_move = capturable, may_move
    return model


def prepare_in_place(module: StoredWeight, delta: TopologyDelta) -> Callable[[], None] | None:
    """Return a function that writes a new topology, and the survivors, into a module's tensors.

    Args:
        module: whose topology is `delta.old`.
        delta: the way to the new topology.

    Returns:
        The function; None if the module replaces its tensors.

    Raises:
        UnsupportedError: a tensor would not keep its place, and may not move.
    """
    if not module.capturable:
        return None
    try:
        return _prepare(module, delta)
    except UnsupportedError:
        if module.may_move:
            return None
        raise


def _prepare(module: StoredWeight, delta: TopologyDelta) -> Callable[[], None]:
    new = delta.new
    if new.nnz != delta.old.nnz:
        raise _refusal(module, f"it keeps its {delta.old.nnz} nonzeros, got {new.nnz}")
    crow, col = module.crow_indices, module.col_indices
    try:
        move_plans = ops.prepare_plans(crow, col, new.crow_indices, new.col_indices)
    except UnsupportedError as error:
        raise _refusal(module, str(error)) from None

    def write() -> None:
        crow.copy_(new.crow_indices)
        col.copy_(new.col_indices)
        move_plans()
        values = module.values
        values.copy_(delta.carry(values.detach()))
        if values.grad is not None:
            values.grad.copy_(delta.carry(values.grad))
        module._topology = new._moved(crow, col)
        copies.moved(module)

    return write


def _refusal(module: StoredWeight, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"mask: capturable {module} cannot take it in place: {problem}. Nothing has changed; call "
        "make_capturable(model, False), drop the CUDA graphs, rewire, and record anew"
    )
