"""The tensors of a sparse weight, and the few steps that replace them.

`SparseModule` builds on this. So do the files for one part of it each (copies, checkpoints, the
dense weight, CUDA graphs), which need not know what else a sparse module can do.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsekd.errors import TopologyError
from sparsekd.layouts import Layout
from sparsekd.topology import Topology

INDICES = ("crow_indices", "col_indices")

# What torch.compile calls the tensors of a sparse module whose length is its number of nonzeros.
_DYNAMIC_SOURCES = (
    r".*_parameters(?:'\])?\['values'\]$",
    r".*_buffers(?:'\])?\['col_indices'\]$",
)


class StoredWeight(nn.Module):
    """A weight stored as its nonzeros: `values` at the positions of `topology`."""

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    weight_shape: tuple[int, ...]
    _layout = Layout()
    _topology: Topology

    known_as = ""
    """Name that `sparsify` found the layer under; messages use it."""

    asked_sparsity: float | None = None
    """Sparsity over all layers that `sparsify` or a pruning method was asked for, if one was."""

    capturable = False
    """Whether a rewire writes into the tensors at hand, as a recorded CUDA graph needs it; see
    `sparsekd.make_capturable`."""

    may_move = False
    """Whether a capturable module replaces its tensors where it cannot keep them."""

    # See `sparsekd.nn.copies`.
    _copies: weakref.WeakSet[StoredWeight] | None = None
    _is_copy = False
    _made_at: Tensor | None = None
    _left_at: Tensor | None = None

    @property
    def topology(self) -> Topology:
        """Positions of the nonzeros."""
        return self._topology

    @property
    def layout(self) -> Layout:
        """Structure that every mask of this module has; `sparsekd.relayout` changes it."""
        return self._layout

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of `weight`, and of the dense counterpart's: mostly `topology.shape`."""
        return self._turned_shape(self.weight_shape)

    # The dense counterpart may store its weight in another order than `topology` has. These two
    # turn a weight, and a shape, from either into the other.
    @staticmethod
    def _turned(weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def _turned_shape(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense tensor with stored zeros."""
        return scatter_dense(self.values, self.topology.flat_indices(), self.weight_shape)

    def _set_topology(self, topology: Topology, device: torch.device) -> Topology:
        """Make `topology` the structure of this module, its own tensors being the buffers."""
        if device.type != "meta":
            topology = topology.to(device)
        self._topology = topology
        for name in INDICES:
            self.register_buffer(name, getattr(topology, name).to(device))
        return topology

    def _known_or(self, found: Topology) -> Topology:
        """Return the known topology where `found` has its positions, so that its version stays.

        Raises:
            TopologyError: it does not, and does not fit the layout.
        """
        known = self._topology
        if known.owns(known.crow_indices, known.col_indices) and found == known:
            return known
        problem = None if self.layout.unstructured else self.layout.problem(found.mask())
        if problem is not None:
            raise TopologyError(f"col_indices: {problem}")
        return found

    def _set_values(self, new: Tensor) -> None:
        """Make `new`, of any length, the contents of the Parameter `values`; drop its gradient.

        Never in place: a state_dict taken earlier goes on holding values that fit its indices.
        """
        values = self.values
        values.grad = None
        if values.shape != new.shape:
            expect_other_lengths()
            # The node that accumulates this parameter's gradient remembers its shape while any
            # graph of an earlier forward pass lives; only a change of dtype makes torch forget it.
            other = torch.float32 if values.dtype != torch.float32 else torch.float64
            values.data = new.new_empty(0, dtype=other)
        values.data = new
        # A graph that saved the old contents must refuse to run backward, not use the new ones.
        torch.autograd.graph.increment_version(values)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a model, the zeros of its sparse layers included.

    Args:
        model: any module; parameters of lazy modules, which have no size yet, do not count.

    Example:
        >>> import sparsekd as skd
        >>> parameter_count(skd.nn.SparseLinear(4, 2, sparsity=0.5, bias=False))
        8
    """
    sizes = {id(p): p.numel() for p in model.parameters() if not is_lazy(p)}
    stored = [module for module in model.modules() if isinstance(module, StoredWeight)]
    sizes |= {id(module.values): math.prod(module.weight_shape) for module in stored}
    return sum(sizes.values())


def scatter_dense(values: Tensor, flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values at flat positions of a dense tensor that is zero elsewhere.

    Args:
        values: one entry per nonzero.
        flat: int64 positions in the flat tensor.
        shape: of the result.

    Returns:
        A new tensor, differentiable with respect to `values`.

    Example:
        >>> import torch
        >>> scatter_dense(torch.ones(1), torch.tensor([2]), (2, 2))
        tensor([[0., 0.],
                [1., 0.]])
    """
    return values.new_zeros(math.prod(shape)).scatter(0, flat, values).view(*shape)


def expect_other_lengths() -> None:
    """Make later compilations take the number of nonzeros as an input, not as a constant.

    Called when that number changes for the first time, so a model whose topology keeps its size is
    compiled for that size. torch.compile takes shapes of parameters for constants, whatever marks
    they have, unless their names are among `torch.compiler.config.dynamic_sources`, where this adds
    those of `values` and `col_indices`. Lengths 0 and 1 it never takes for changing ones: a layer
    that comes down to them is compiled anew for each.
    """
    config = torch.compiler.config
    listed = [source for source in config.dynamic_sources.split(",") if source]
    missing = [source for source in _DYNAMIC_SOURCES if source not in listed]
    if missing:
        config.dynamic_sources = ",".join([*listed, *missing])
