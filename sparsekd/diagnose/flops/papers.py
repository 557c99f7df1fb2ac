"""The cost of a training step of each method, as papers count it."""

from __future__ import annotations

from sparsekd.dst.registry import METHODS


def published(method: str, sparse: float, dense: float, every: int = 100) -> float:
    """Return the operations of one training step as the papers count them.

    With f_S a forward pass of the sparse network and f_D one of the dense network, backward costs
    twice as much as forward; BatchNorm, the loss and the selection of weights are left out:

    | dense gradients of the method, see `sparsekd.dst.Method` | step |
    |---|---|
    | (dense training) | 3 f_D |
    | never | 3 f_S |
    | at every step | 2 f_S + f_D |
    | at updates | (3 f_S every + 2 f_S + f_D) / (every + 1) |

    If the number of weights changes (gmp, granet, acdc, mest, redistribution), `sparse` is the mean
    over training, which assumes that kernels save the work of every weight that is pruned. The
    kernels here do; what they compute is `FlopCount.train` of each step's own topology.

    Args:
        method: "dense", or a name from `sparsekd.dst.METHODS`.
        sparse: f_S, per image or per batch.
        dense: f_D, likewise.
        every: iterations from one update to the next.

    Returns:
        Operations of a step, the mean where steps differ.

    Raises:
        ValueError: there is no such method, or its step is none of the above: it has a teacher, or
            trains weights that it does not compute with (Top-KAST).

    Source: Evci et al., Rigging the Lottery (2020), appendix H; the last line's last four by the
        same reasoning.

    Example:
        >>> published("rigl", sparse=10.0, dense=100.0, every=99)
        30.9
    """
    if method == "dense":
        return 3 * dense
    row = METHODS.get(method)
    if row is None or row.distil or row.dense_gradients == "partly":
        known = [r.name for r in METHODS.values() if not r.distil and r.dense_gradients != "partly"]
        raise ValueError(f"method: expected one of dense, {', '.join(known)}, got {method!r}")
    with_growth = 2 * sparse + dense
    match row.dense_gradients:
        case "steps":
            return with_growth
        case "updates":
            return (3 * sparse * every + with_growth) / (every + 1)
    return 3 * sparse
