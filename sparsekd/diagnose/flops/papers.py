"""What papers say that a training step of each method costs."""

from __future__ import annotations

from collections.abc import Callable


def published(method: str, sparse: float, dense: float, every: int = 100) -> float:
    """Return the operations of one training step as the papers count them.

    With f_S a forward pass of the sparse network and f_D one of the dense network, backward costs
    twice as much as forward; BatchNorm, the loss and the selection of weights are left out:

    | method | step |
    |---|---|
    | dense | 3 f_D |
    | static, small-dense, snip, grasp, synflow, set, itop, mest, gmp, acdc | 3 f_S |
    | snfs | 2 f_S + f_D |
    | rigl, rigl-sg, rigl-sm, granet, srigl | (3 f_S every + 2 f_S + f_D) / (every + 1) |

    Where the number of weights changes (gmp, granet, acdc, mest, redistribution), `sparse` is the
    mean over training, which assumes that kernels profit from every weight that goes. These here
    do; what they compute is `FlopCount.train`, at each step that of its own topology.

    Args:
        method: one of the above.
        sparse: f_S, per image or per batch.
        dense: f_D, likewise.
        every: iterations from one update to the next.

    Returns:
        Operations of a step, the mean where steps differ.

    Raises:
        ValueError: the method is not among the above.

    Source: Evci et al., Rigging the Lottery (2020), appendix H; the last line's last four by the
        same reasoning.

    Example:
        >>> published("rigl", sparse=10.0, dense=100.0, every=99)
        30.9
    """
    if method not in _STEPS:
        raise ValueError(f"method: expected one of {', '.join(_STEPS)}, got {method!r}")
    return _STEPS[method](sparse, dense, every)


def _rigl_step(sparse: float, dense: float, every: int) -> float:
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


_PRUNED = ("static", "small-dense", "snip", "grasp", "synflow", "gmp", "acdc")
_RANDOM = ("set", "itop", "mest")
_BY_GRADIENT = ("rigl", "rigl-sg", "rigl-sm", "granet", "srigl")
_STEPS: dict[str, Callable[[float, float, int], float]] = {
    "dense": lambda sparse, dense, every: 3 * dense,
    **dict.fromkeys(_PRUNED + _RANDOM, lambda sparse, dense, every: 3 * sparse),
    "snfs": lambda sparse, dense, every: 2 * sparse + dense,
    **dict.fromkeys(_BY_GRADIENT, _rigl_step),
}
