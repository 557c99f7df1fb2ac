"""Inference with trained networks: `freeze` one, save it, load it elsewhere."""

from sparsekd.frozen.files import load_frozen, save_frozen
from sparsekd.frozen.module import FrozenModule, freeze

__all__ = ["FrozenModule", "freeze", "load_frozen", "save_frozen"]
