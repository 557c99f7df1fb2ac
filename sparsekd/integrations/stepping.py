"""What the callbacks share: an update of the topology in place of the optimizer's step."""

from __future__ import annotations

from typing import Any

from sparsekd.errors import UnsupportedError


def update_instead_of_step(method: Any) -> bool:
    """Update the topology if it is due, and then leave the optimizer nothing to step on.

    The framework steps anyway. An optimizer of torch passes over parameters without a gradient:
    no weight, no momentum, no weight decay of them moves.

    Args:
        method: an updater of `sparsekd.dst`, or what has its `step` and `optimizer`.

    Returns:
        Whether the topology was updated.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> method = skd.dst.SET(layer, optimizer, drop_fraction=0.5, every=1, until=9)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> update_instead_of_step(method), layer.values.grad
        (True, None)
    """
    if not method.step():
        return False
    method.optimizer.zero_grad(set_to_none=True)
    return True


def refuse_scaler(scaler: Any, framework: str) -> None:
    """Refuse a GradScaler, which fails where an optimizer has no gradient at all.

    Args:
        scaler: the framework's, None where gradients are not scaled.
        framework: its name.

    Raises:
        UnsupportedError: there is one.

    Example:
        >>> refuse_scaler(None, "Lightning")
    """
    if scaler is not None:
        raise UnsupportedError(
            f"{framework}: scales gradients (float16), and its scaler cannot leave out a step; use "
            "bfloat16, or a loop of your own with scaler.step(opt) under `if not dst.step()`"
        )
