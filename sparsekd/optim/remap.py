"""Optimizer state that follows its weight through a rewire."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekd.errors import OptimizerStateError, ShapeError
from sparsekd.optim.fresh import fresh_state
from sparsekd.optim.placement import placement
from sparsekd.topology import Topology, TopologyDelta


@torch.no_grad()
def remap_(optimizer: Optimizer, param: Parameter, delta: TopologyDelta) -> None:
    """Move the optimizer state of `param` along `delta`, in place.

    Every state tensor with one entry per weight (momentum, second moment) is carried: survivors
    keep their entry, grown weights get the one that a new parameter starts from, which is 0 for
    momenta, the learning rate for Rprop's step sizes, `initial_accumulator_value` for Adagrad's
    sums. Step counters and the state of other parameters stay as they are. If any piece of state
    cannot follow, nothing changes.

    Args:
        optimizer: any optimizer whose state tensors have the shape of their parameter.
        param: the values of a sparse module, already rewired.
        delta: what `module.rewire(mask)` returned.

    Shape:
        - param: `[delta.new.nnz]`
        - its state tensors before: `[delta.old.nnz]`; after: `[delta.new.nnz]`

    Raises:
        ShapeError: `param` does not have one entry per nonzero of the new topology.
        OptimizerStateError: `optimizer` does not hold `param`, a piece of state has another shape
            (factored or quantised moments, L-BFGS histories) or lives on another rank (ZeRO), or it
            is known to belong to another topology than `delta.old`, as after a rewire without
            `remap_`.

    Source: Rigging the Lottery (arXiv 1911.11134), released code: momentum of new weights is zero.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(2, 8)).sum().backward(); opt.step()
        >>> delta = layer.rewire(~layer.topology.mask())
        >>> skd.optim.remap_(opt, layer.values, delta)
        >>> opt.state[layer.values]["momentum_buffer"].abs().sum().item()
        0.0
    """
    if param.shape != (delta.new.nnz,):
        raise ShapeError(
            f"param: expected shape [{delta.new.nnz}], one entry per nonzero of the new topology, "
            f"got {list(param.shape)}; rewire the module before its optimizer state"
        )
    check_held(optimizer, param, "param")
    state = dict(_per_weight(optimizer, param, delta.old.nnz))
    if state:
        _check_placed(optimizer, param, delta.old)
    fresh = fresh_state(optimizer, param) if state and bool(delta.grown.any()) else {}
    # Built completely before the first assignment: an error leaves the state as it was.
    carried = {
        key: (tensor, delta.carry(tensor, fill=fresh.get(key, 0))) for key, tensor in state.items()
    }
    for key, (tensor, new) in carried.items():
        # The same tensor where it fits: a recorded CUDA graph knows it by its address.
        optimizer.state[param][key] = tensor.copy_(new) if tensor.shape == new.shape else new
    placement(optimizer).put(param, delta.new)


def check_remappable(optimizer: Optimizer, param: Parameter, name: str = "param") -> None:
    """Check, before a rewire, that `remap_` will succeed after it.

    Args:
        optimizer: any optimizer.
        param: the values of a sparse module, not yet rewired.
        name: of the parameter, for the message.

    Raises:
        OptimizerStateError: as `remap_`.
    """
    check_held(optimizer, param, name)
    for _ in _per_weight(optimizer, param, param.numel()):
        pass


def holds(optimizer: Optimizer, param: Parameter) -> bool:
    """Return whether `param` is in one of the groups of `optimizer`."""
    return any(param is held for group in optimizer.param_groups for held in group["params"])


def check_held(optimizer: Optimizer, param: Parameter, name: str) -> None:
    """Check that `optimizer` holds `param`.

    Raises:
        OptimizerStateError: it does not.
    """
    if not holds(optimizer, param):
        raise OptimizerStateError(
            f"{name}: expected a parameter of this {type(optimizer).__name__}, "
            f"got one of shape {list(param.shape)} that it does not hold"
        )


def _check_placed(optimizer: Optimizer, param: Parameter, old: Topology) -> None:
    known = placement(optimizer).get(param)
    if known is None or known is old:
        return
    # What a capturable module had before is overwritten by what it has.
    told = known.accept_if_equal() and old.accept_if_equal()
    if told and known != old:
        raise OptimizerStateError(
            f"delta: expected one from the topology that the state of param belongs to, {known}, "
            f"got one from {old}, which has other positions; call remap_ after every rewire, or "
            "put them into `with skd.optim.follow(...)`"
        )


def _per_weight(optimizer: Optimizer, param: Parameter, nnz: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the state tensors with one entry per weight; raise where there is another kind."""
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise OptimizerStateError(
            "LBFGS keeps one history over all parameters, which cannot follow single weights; "
            "use an optimizer whose state tensors have the shape of their parameter"
        )
    if _is_zero(optimizer):
        raise OptimizerStateError(
            "ZeroRedundancyOptimizer keeps the state of a parameter on one rank, where it cannot "
            "follow single weights; a static topology may have it, others need the optimizer itself"
        )
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.shape == (nnz,):
            yield key, value
        elif not _is_shared(value):
            raise OptimizerStateError(
                f"{type(optimizer).__name__}.state[{key!r}]: expected a tensor of shape [{nnz}] "
                f"like its parameter or a counter, got {_describe(value)}"
            )


def _is_zero(optimizer: Optimizer) -> bool:
    zero = sys.modules.get("torch.distributed.optim")  # none has been made where it is not loaded
    return zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer)


def _is_shared(value: Any) -> bool:
    """Return whether a piece of state is shared by all weights of a parameter."""
    if isinstance(value, Tensor):
        return value.ndim == 0
    return value is None or isinstance(value, bool | int | float | str)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
