"""Where the nonzeros of a weight are (`Topology`) and what a rewire moved (`TopologyDelta`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd import csr
from sparsekd._torch import version_of
from sparsekd.errors import ShapeError, TopologyError


class Topology:
    """Positions of a weight's nonzeros: immutable, validated, comparable.

    Rows are output channels (or output features); columns run over `C_in/groups * kh * kw` (or the
    input features) in the weight's own row-major order. So the values of a weight with this
    topology are its nonzeros in row-major order.

    Args:
        crow_indices: where each row starts in `col_indices`; integer, copied.
        col_indices: the columns of the nonzeros, ascending within a row; integer, copied.
        shape: shape of the weight, two dimensions or more.
        version: number of rewires since the first topology.

    Shape:
        - crow_indices: `[rows + 1]`
        - col_indices: `[nnz]`

    Raises:
        TopologyError: the arguments do not describe a structure; the message says why.

    Example:
        >>> topology = Topology(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), (2, 3))
        >>> topology.nnz, topology.density
        (3, 0.5)
    """

    __slots__ = (
        "__weakref__",
        "_checksum",
        "_col",
        "_counters",
        "_crow",
        "_hash",
        "_shape",
        "_transpose",
        "_version",
    )

    def __init__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        shape: Sequence[int],
        *,
        version: int = 0,
    ) -> None:
        size = csr.checked_shape(shape)
        csr.validate(crow_indices, col_indices, size[0], math.prod(size[1:]))
        with torch.inference_mode(False):  # an inference tensor would not count its mutations
            crow = crow_indices.detach().to(torch.int32, copy=True).contiguous()
            col = col_indices.detach().to(torch.int32, copy=True).contiguous()
        self._own(crow, col, size, version)

    def _own(self, crow: Tensor, col: Tensor, size: torch.Size, version: int) -> None:
        self._crow, self._col, self._shape, self._version = crow, col, size, int(version)
        self._counters = version_of(crow), version_of(col)
        self._checksum = csr.checksum(crow, col)
        self._hash: int | None = None
        self._transpose: csr.TransposedCSR | None = None
        csr.forget_with(self, crow, col)

    @classmethod
    def _adopt(cls, crow: Tensor, col: Tensor, shape: Sequence[int], version: int) -> Topology:
        """Return a topology that shares these tensors. Pickles name this function."""
        size = csr.checked_shape(shape)
        csr.validate(crow, col, size[0], math.prod(size[1:]))
        topology = cls.__new__(cls)
        # A pickle may hold other integers, or strided ones; what we wrote stays as it is.
        crow, col = (indices.to(torch.int32).contiguous() for indices in (crow, col))
        topology._own(crow, col, size, version)
        return topology

    @classmethod
    def from_mask(cls, mask: Tensor, *, version: int = 0) -> Topology:
        """Build the topology whose nonzeros are the True entries of `mask`.

        Args:
            mask: bool tensor of the weight's shape.
            version: number of rewires since the first topology.

        Returns:
            The topology, on the device of `mask`.

        Raises:
            TopologyError: `mask` is not bool, or its shape cannot be a weight's.

        Example:
            >>> Topology.from_mask(torch.tensor([[True, False], [True, True]])).nnz
            3
        """
        if mask.dtype != torch.bool:
            raise TopologyError(f"mask: expected dtype torch.bool, got {mask.dtype}")
        size = csr.checked_shape(mask.shape)
        with torch.inference_mode(False):
            crow, col = csr.compress(mask.detach().reshape(size[0], math.prod(size[1:])))
        topology = cls.__new__(cls)
        topology._own(crow, col, size, version)
        return topology

    def _moved(self, crow: Tensor, col: Tensor) -> Topology:
        """Return this topology with other tensors as its own, which hold the same indices."""
        topology = Topology.__new__(Topology)
        topology._own(crow, col, self._shape, self._version)
        return topology

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self._shape

    @property
    def rows(self) -> int:
        """Number of output channels or features."""
        return self._shape[0]

    @property
    def cols(self) -> int:
        """Number of weights a row would have if it were dense."""
        return math.prod(self._shape[1:])

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self._shape)

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return self._col.shape[0]

    @property
    def density(self) -> float:
        """Share of the weights that are nonzeros (0 for a weight without elements)."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero: `1 - density`."""
        return 1.0 - self.density

    @property
    def version(self) -> int:
        """Number of rewires since the first topology."""
        return self._version

    @property
    def device(self) -> torch.device:
        """Device of the index tensors."""
        return self._crow.device

    @property
    def crow_indices(self) -> Tensor:
        """Start of each row, int32 `[rows + 1]`; not to be written to."""
        return self._crow

    @property
    def col_indices(self) -> Tensor:
        """Column of each nonzero, int32 `[nnz]`; not to be written to."""
        return self._col

    def flat_indices(self) -> Tensor:
        """Return the positions of the nonzeros in the flat weight, int64 `[nnz]`, ascending."""
        self._check_unmodified()
        return csr.flat_indices(self._crow, self._col, self.cols)

    def mask(self) -> Tensor:
        """Return the nonzero positions as a bool tensor of the weight's shape."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        mask[self.flat_indices()] = True
        return mask.view(self._shape)

    def transpose(self) -> csr.TransposedCSR:
        """Return the structure by columns (computed once).

        Returns:
            `crow_indices [cols + 1]`, `col_indices [nnz]` (the row of each nonzero) and
            `permutation [nnz]`: `values[permutation]` are the values in the transposed order.
        """
        self._check_unmodified()
        if self._transpose is None:
            self._transpose = csr.transpose(self._crow, self._col, self.cols)
        return self._transpose

    def rewire(self, mask: Tensor) -> tuple[Topology, TopologyDelta]:
        """Return the topology of another mask, and the delta that leads to it.

        Args:
            mask: bool tensor of the weight's shape.

        Returns:
            The new topology, its version one higher, and the `TopologyDelta` from this one.

        Raises:
            ShapeError: `mask` does not have the weight's shape.
            TopologyError: `mask` is not bool.

        Example:
            >>> old = Topology.from_mask(torch.tensor([[True, False], [True, True]]))
            >>> new, delta = old.rewire(torch.tensor([[True, True], [False, True]]))
            >>> delta.source.tolist()
            [0, -1, 2]
        """
        if mask.shape != self._shape:
            raise ShapeError(f"mask: expected shape {tuple(self._shape)}, got {tuple(mask.shape)}")
        mask = mask.detach().to(self.device)
        new = Topology.from_mask(mask, version=self._version + 1)
        return new, TopologyDelta(self, new, _sources(self, new, mask))

    def to(self, device: torch.device | str) -> Topology:
        """Return the topology with its index tensors on `device` (itself if they are there)."""
        crow = self._crow.to(device)
        if crow is self._crow:
            return self
        self._check_unmodified()
        return Topology(crow, self._col.to(device), self._shape, version=self._version)

    def owns(self, crow_indices: Tensor, col_indices: Tensor) -> bool:
        """Return whether these are this topology's own tensors, as they were when it was built.

        A module shares them as its buffers. This is how it notices that something else (a device
        move, an averaged model, a broadcast) has replaced or overwritten them.
        """
        return (
            crow_indices is self._crow
            and col_indices is self._col
            and (version_of(crow_indices), version_of(col_indices)) == self._counters
        )

    @property
    def written(self) -> bool:
        """Whether anything has written into the index tensors, even the same numbers."""
        return (version_of(self._crow), version_of(self._col)) != self._counters

    def accept_if_equal(self) -> bool:
        """Return whether the positions are as they were built, whatever was written since.

        A broadcast of buffers, or a copy from an equal model, writes what is there already; it no
        longer counts as `written` then.
        """
        if self.written and bool(csr.checksum(self._crow, self._col) == self._checksum):
            self._counters = version_of(self._crow), version_of(self._col)
        return not self.written

    def _check_unmodified(self) -> None:
        if not self.accept_if_equal():
            raise TopologyError(
                "crow_indices / col_indices of this Topology were modified in place; "
                "a Topology is immutable: build another, or use rewire(mask)"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        if self is other:
            return True
        self._check_unmodified()
        other._check_unmodified()
        return (
            self._shape == other._shape
            and self.nnz == other.nnz
            and torch.equal(self._crow, other._crow.to(self.device))
            and torch.equal(self._col, other._col.to(self.device))
        )

    def __hash__(self) -> int:
        self._check_unmodified()
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=8)
            digest.update(self._crow.cpu().numpy().tobytes())
            digest.update(self._col.cpu().numpy().tobytes())
            self._hash = hash((self._shape, digest.digest()))
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_unmodified()
        return Topology._adopt, (self._crow, self._col, tuple(self._shape), self._version)

    def __copy__(self) -> Topology:
        return self

    def __repr__(self) -> str:
        return (
            f"Topology(shape={tuple(self._shape)}, nnz={self.nnz}, "
            f"density={self.density:.4g}, version={self._version})"
        )


@dataclass(frozen=True, eq=False)
class TopologyDelta:
    """Where each weight of a new topology was in the old one.

    Args:
        old: the topology before.
        new: the topology after.
        source: int64 `[new.nnz]`: the old slot of each weight, -1 for one that has been grown.
    """

    old: Topology
    new: Topology
    source: Tensor

    @classmethod
    def between(cls, old: Topology, new: Topology) -> TopologyDelta:
        """Compare two topologies of one weight, whatever led from one to the other.

        Args:
            old: where the nonzeros were.
            new: where they are.

        Returns:
            The delta, on the device of `old`.

        Raises:
            ShapeError: they are not of one weight.

        Example:
            >>> old = Topology.from_mask(torch.tensor([[True, False], [True, True]]))
            >>> new = Topology.from_mask(torch.tensor([[True, True], [False, True]]))
            >>> TopologyDelta.between(old, new).source.tolist()
            [0, -1, 2]
        """
        if old.shape != new.shape:
            raise ShapeError(f"new: expected shape {tuple(old.shape)}, got {tuple(new.shape)}")
        moved = new.to(old.device)
        return cls(old, new, _sources(old, moved, moved.mask()))

    @property
    def grown(self) -> Tensor:
        """bool `[new.nnz]`: True for the weights that the old topology did not have."""
        return self.source < 0

    @property
    def dropped(self) -> Tensor:
        """int64: the old slots that the new topology no longer has, ascending."""
        gone = torch.ones(self.old.nnz, dtype=torch.bool, device=self.source.device)
        gone[self.source[~self.grown]] = False
        return gone.nonzero().squeeze(1)

    def carry(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Move a tensor with one entry per nonzero (values, a momentum) to the new topology.

        Args:
            tensor: one entry per nonzero of the old topology.
            fill: what the grown weights get.

        Shape:
            - tensor: `[old.nnz]`
            - result: `[new.nnz]`, dtype and device of `tensor`

        Raises:
            ShapeError: `tensor` does not have one entry per old nonzero.

        Example:
            >>> old = Topology.from_mask(torch.tensor([[True, False], [True, True]]))
            >>> _, delta = old.rewire(torch.tensor([[True, True], [False, True]]))
            >>> delta.carry(torch.tensor([1.0, 2.0, 3.0])).tolist()
            [1.0, 0.0, 3.0]
        """
        if tensor.shape != (self.old.nnz,):
            raise ShapeError(
                f"tensor: expected shape [{self.old.nnz}], one entry per nonzero of the old "
                f"topology, got {list(tensor.shape)}"
            )
        source = self.source.to(tensor.device)
        if self.old.nnz == 0:
            return tensor.new_full((self.new.nnz,), fill)
        carried = tensor[source.clamp(min=0)]
        carried[source < 0] = fill
        return carried


def _sources(old: Topology, new: Topology, mask: Tensor) -> Tensor:
    """Return the old slot of each weight of `new`, whose mask is `mask`, or -1."""
    before, after = old.flat_indices(), new.flat_indices()
    source = torch.full_like(after, -1)
    # Survivors come in the same order in both.
    survivors = mask.reshape(-1)[before].nonzero().squeeze(1)
    return source.masked_scatter_(old.mask().view(-1)[after], survivors)
