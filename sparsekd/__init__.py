"""Weight-sparse training of neural networks that stores and computes only the nonzeros."""

from __future__ import annotations

from sparsekd import errors, functional, ops
from sparsekd.ops import backend
from sparsekd.topology import Topology, TopologyDelta

__all__ = ["Topology", "TopologyDelta", "backend", "errors", "functional", "ops"]
