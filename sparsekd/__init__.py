"""Weight-sparse training of neural networks that stores and computes only the nonzeros."""

from __future__ import annotations

from sparsekd import errors, functional, nn, ops, sparsity
from sparsekd.nn import densify, sparsify
from sparsekd.ops import backend
from sparsekd.topology import Topology, TopologyDelta

__all__ = [
    "Topology",
    "TopologyDelta",
    "backend",
    "densify",
    "errors",
    "functional",
    "nn",
    "ops",
    "sparsify",
    "sparsity",
]
