"""Floating-point operations of a network, exactly, and of training as papers count them."""

from sparsekd.diagnose.flops.counting import count
from sparsekd.diagnose.flops.papers import published
from sparsekd.diagnose.flops.rows import FlopCount, LayerFlops, ProductFlops

__all__ = ["FlopCount", "LayerFlops", "ProductFlops", "count", "published"]
