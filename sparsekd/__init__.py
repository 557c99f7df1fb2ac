"""Weight-sparse training of neural networks that stores and computes only the nonzeros."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from sparsekd import (
    data,
    dst,
    errors,
    flops,
    functional,
    models,
    nn,
    ops,
    optim,
    settings,
    sparsity,
    tickets,
)
from sparsekd.diagnose import coverage, explain
from sparsekd.layouts import Layout
from sparsekd.memory import keep_memory_warm
from sparsekd.nn import densify, make_capturable, optimize, relayout, sparsify
from sparsekd.ops import backend
from sparsekd.ops.cpu.processor import select_isa
from sparsekd.tickets import kd_loss
from sparsekd.topology import Topology, TopologyDelta

settings.check()
settings.warn_of_unknown(os.environ)
select_isa()

try:
    __version__ = version("sparsekd")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0.1.0"

__all__ = [
    "Layout",
    "Topology",
    "TopologyDelta",
    "__version__",
    "backend",
    "coverage",
    "data",
    "densify",
    "dst",
    "errors",
    "explain",
    "flops",
    "functional",
    "kd_loss",
    "keep_memory_warm",
    "make_capturable",
    "models",
    "nn",
    "ops",
    "optim",
    "optimize",
    "relayout",
    "sparsify",
    "sparsity",
    "tickets",
]
