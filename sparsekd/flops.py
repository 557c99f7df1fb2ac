"""The public name of `sparsekd.diagnose.flops`: operations of a network and of training it."""

from sparsekd.diagnose.flops import FlopCount, LayerFlops, ProductFlops, count, published

__all__ = ["FlopCount", "LayerFlops", "ProductFlops", "count", "published"]
