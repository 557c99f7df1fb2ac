"""Weight-sparse training of neural networks that stores and computes only the nonzeros."""

from __future__ import annotations

from sparsekd import errors
from sparsekd.topology import Topology, TopologyDelta

__all__ = ["Topology", "TopologyDelta", "errors"]
