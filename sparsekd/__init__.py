"""Weight-sparse training of neural networks that stores and computes only the nonzeros."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sparsekd import errors, functional, nn, ops, optim, settings, sparsity
from sparsekd.layouts import Layout
from sparsekd.memory import keep_memory_warm
from sparsekd.nn import densify, make_capturable, optimize, relayout, sparsify
from sparsekd.ops import backend
from sparsekd.ops.cpu.processor import select_isa
from sparsekd.topology import Topology, TopologyDelta

if TYPE_CHECKING:
    from sparsekd import cuda, data, dst, flops, models, tickets
    from sparsekd.diagnose.coverage import coverage
    from sparsekd.diagnose.explain import explain
    from sparsekd.frozen import freeze, load_frozen, save_frozen
    from sparsekd.tickets import kd_loss

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
    "cuda",
    "data",
    "densify",
    "dst",
    "errors",
    "explain",
    "flops",
    "freeze",
    "functional",
    "kd_loss",
    "keep_memory_warm",
    "load_frozen",
    "make_capturable",
    "models",
    "nn",
    "ops",
    "optim",
    "optimize",
    "relayout",
    "save_frozen",
    "sparsify",
    "sparsity",
    "tickets",
]

# What a program that uses sparse layers may not need is imported when it is first asked for.
_LATER = {
    **dict.fromkeys(("cuda", "data", "diagnose", "dst", "flops", "models", "tickets", "train"), ""),
    "coverage": "diagnose",
    "explain": "diagnose",
    **dict.fromkeys(("freeze", "load_frozen", "save_frozen"), "frozen"),
    "kd_loss": "tickets",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATER[name] or name}")
    found = getattr(module, name) if _LATER[name] else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
