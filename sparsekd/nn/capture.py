"""Prepare a model for CUDA graphs, which know tensors by their addresses."""

from __future__ import annotations

from torch import nn

from sparsekd.nn.base import sparse_modules


def make_capturable(model: nn.Module, capturable: bool = True) -> nn.Module:
    """Let rewires of a model write into its tensors instead of replacing them, in place.

    A training step that was recorded as a CUDA graph can then be replayed after a rewire: values,
    indices, gradients, optimizer state and the plans of the GPU kernels stay where they are, and
    only what is in them changes. A rewire for which one of them would have to move raises
    UnsupportedError, says which, and changes nothing of its module: the number of nonzeros stays as
    it is (GMP, GraNet, AC/DC and redistribution change it), and so do the tiles that the kernels
    compute. What to do then: take it back, rewire, and record anew. A `state_dict` of another
    topology replaces tensors as ever; record anew after loading one.

    An iteration in which a method of `sparsekd.dst` updates the topology (`dst.due`) runs outside
    the graph, as its dense gradients are formed by other kernels. A `state_dict` taken before a
    rewire shows the rewired state after it, as it shows every step of the optimizer; copy it.

    Args:
        model: any module with sparse modules.
        capturable: False takes it back.

    Returns:
        The model.

    Raises:
        ValueError: `model` has no sparse module.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.make_capturable(skd.nn.SparseLinear(8, 4, sparsity=0.5))
        >>> place = layer.values.data_ptr()
        >>> delta = layer.rewire(~layer.topology.mask())
        >>> layer.values.data_ptr() == place, layer.topology.version
        (True, 1)
    """
    found = [module for _, module in sparse_modules(model)]
    if not found:
        raise ValueError(f"model: expected sparse modules, got a {type(model).__name__} without")
    for module in found:
        module.capturable = capturable
    return model
