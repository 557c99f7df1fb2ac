"""Count the floating-point operations of a network, exactly, and of training as papers count it."""

from sparsekd.flops.counting import count
from sparsekd.flops.papers import published
from sparsekd.flops.rows import FlopCount, LayerFlops, ProductFlops

__all__ = ["FlopCount", "LayerFlops", "ProductFlops", "count", "published"]
