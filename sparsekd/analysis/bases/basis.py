"""Orthonormal bases of the space of a weight: w = B c, and c = B^T w.

Every basis here is a product of one orthonormal matrix per axis of the weight, so a transform is a
few small products and B itself is never formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparsekd.errors import UnsupportedError


class Basis(nn.Module):
    """An orthonormal basis of the weights of one shape.

    Coefficients have the shape of the weight. Axis by axis, ``weight = M c`` with an orthonormal
    matrix M; axes without a matrix stay as they are.

    Args:
        matrices: axis -> orthonormal matrix, whose columns are the basis vectors. Axes are those
            of the weight, or 0 (outputs) and 1 (all else) of the weight as a matrix.
        as_matrix: transform the weight as a matrix of outputs by inputs.
        persistent: whether a state dict holds the matrices; fixed bases can be built again.

    Example:
        >>> basis = Basis({0: torch.eye(3)})
        >>> basis.decode(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, matrices: Mapping[int, Tensor], *, as_matrix: bool = False, persistent: bool = False
    ) -> None:
        super().__init__()
        self.axes = tuple(matrices)
        self.as_matrix = as_matrix
        for axis, matrix in matrices.items():
            self.register_buffer(f"axis{axis}", matrix, persistent=persistent)

    def encode(self, weight: Tensor) -> Tensor:
        """Return the coefficients of a weight, c = B^T w.

        Shape:
            any that fits the matrices; the result has the same
        """
        return self._transform(weight, lambda matrix: matrix.mT)

    def decode(self, coefficients: Tensor) -> Tensor:
        """Return the weight of coefficients, w = B c.

        Shape:
            any that fits the matrices; the result has the same
        """
        return self._transform(coefficients, lambda matrix: matrix)

    def matrix(self, axis: int) -> Tensor:
        """Return the matrix of an axis."""
        return cast(Tensor, getattr(self, f"axis{axis}"))

    def _transform(self, tensor: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        result = tensor.flatten(1) if self.as_matrix else tensor
        for axis in self.axes:
            result = (of(self.matrix(axis)) @ result.movedim(axis, -2)).movedim(-2, axis)
        return result.reshape(tensor.shape)


def dct_matrix(size: int) -> Tensor:
    """Return the basis of the orthonormal DCT-II: column k is the cosine of frequency k.

    Example:
        >>> dct_matrix(4)[:, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    place = torch.arange(size, dtype=torch.float64)[:, None] + 0.5
    matrix = torch.cos(math.pi / size * place * torch.arange(size)) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def hadamard_matrix(size: int) -> Tensor:
    """Return an orthonormal Hadamard basis of any size.

    Hadamard matrices by Sylvester have sizes 1, 2, 4, ...; another size is split into those, the
    largest first, with one matrix for each part of the axis.

    Example:
        >>> (hadamard_matrix(3) * 2**0.5).round(decimals=3).tolist()
        [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.414]]
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    one = torch.ones(1, 1, dtype=torch.float64)
    exponents = [bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]
    return torch.block_diag(*(functools.reduce(torch.kron, [two] * n, one) for n in exponents))


def random_matrix(size: int, seed: int) -> Tensor:
    """Return an orthonormal matrix, uniformly random over all rotations and reflections.

    Source: Mezzadri, How to Generate Random Matrices from the Classical Compact Groups (2007).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class BasisKind:
    """A row of the table of bases.

    Args:
        label: in tables and figures.
        make: size of an axis, seed -> orthonormal matrix; None for the identity and for bases that
            come from the trained weight.
    """

    label: str
    make: Callable[[int, int], Tensor] | None = None


BASES: Mapping[str, BasisKind] = {
    "identity": BasisKind("weights"),
    "dct": BasisKind("DCT", lambda size, seed: dct_matrix(size)),
    "hadamard": BasisKind("Hadamard", lambda size, seed: hadamard_matrix(size)),
    "random": BasisKind("random rotation", random_matrix),
    "svd": BasisKind("SVD, rank k"),
    "units": BasisKind("weights, whole units"),
}
"""The bases that ship; "units" is the identity with one mask entry for a unit or filter."""


def make_basis(kind: str, weight: Tensor, seed: int = 0) -> Basis:
    """Build a basis for a weight.

    Fixed bases act on both axes of a linear weight, and on height and width of a convolution's
    kernels, whose channels have no order. The singular vectors of "svd" are those of the weight as
    a matrix of outputs by inputs.

    Args:
        kind: a key of `BASES`.
        weight: the trained weight, of which fixed bases read the shape and dtype only.
        seed: of "random".

    Shape:
        weight ``[out, in]`` or ``[out, in, kh, kw]``

    Returns:
        The basis, in the dtype of the weight.

    Raises:
        UnsupportedError: `kind` or the number of dimensions is not known.

    Source: Alabdulmohsin et al., A Generalized Lottery Ticket Hypothesis (arXiv 2107.06825): any
        basis, with the DCT as example; the choice of axes is ours.

    Example:
        >>> basis = make_basis("dct", torch.randn(8, 3, 3, 3))
        >>> basis.axes
        (2, 3)
    """
    if kind not in BASES:
        raise UnsupportedError(f"kind: expected one of {', '.join(BASES)}, got {kind!r}")
    if weight.ndim not in (2, 4):
        raise UnsupportedError(f"weight: expected 2 or 4 dimensions, got {weight.ndim}")
    if kind == "svd":
        left, _, right = torch.linalg.svd(weight.detach().flatten(1).double())
        vectors = {0: left.to(weight), 1: right.mT.to(weight)}
        return Basis(vectors, as_matrix=True, persistent=True)
    make = BASES[kind].make
    if make is None:
        return Basis({})
    axes: Sequence[int] = (0, 1) if weight.ndim == 2 else (2, 3)
    return Basis({axis: make(weight.shape[axis], seed + axis).to(weight) for axis in axes})
