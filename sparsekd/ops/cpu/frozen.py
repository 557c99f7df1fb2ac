"""The compiled network of `sparsekd.frozen`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import UnavailableError
from sparsekd.ops.cpu.blocked_map import compiled

_Network = compiled("FrozenNetwork")


def frozen_network(
    records: list[list[int]], lists: list[dict[str, Tensor]], outputs: list[int]
) -> Any:
    """Return a network of the compiled core, which checks everything that it is given.

    Args:
        records: a row for each node, see `decode` in csrc/core/frozen/network.h.
        lists: the tensors of each node.
        outputs: numbers of the nodes that are returned.

    Raises:
        ShapeError, TopologyError: a node or a list that does not fit; the message names the node.
        UnavailableError: the core was not built.
    """
    if _Network is None:
        raise UnavailableError("frozen networks need the compiled core, which was not built")
    return _Network(torch.tensor(records, dtype=torch.int32), lists, outputs)
