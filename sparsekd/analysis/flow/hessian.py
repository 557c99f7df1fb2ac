"""The spectrum of the Hessian of the loss on the weights that a network stores.

The Hessian is never formed. Its product with a vector is one more backward pass, through the
derivatives of the sparse ops, and Lanczos turns a few dozen products into a quadrature of the
spectrum: nodes (eigenvalues, exact at both ends first) and weights (how much of the spectrum is
near each).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd.tickets.superposition import blank_copy

if TYPE_CHECKING:  # scipy takes a while to import, and the command line imports this
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Spectrum:
    """A quadrature of a spectrum.

    Args:
        eigenvalues: nodes, ascending.
        weights: share of the spectrum at each node; they sum to 1.
    """

    eigenvalues: NDArray[np.float64]
    weights: NDArray[np.float64]


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> LinearOperator:
    """Return the Hessian of the mean cross entropy over the trainable parameters as an operator.

    Positions without a weight have no coordinate. Modules are in eval mode, where the loss is a
    function of the parameters alone.

    Args:
        model: only read; small, since the graph of a gradient is kept.
        x: images.
        y: labels.

    Shape:
        x ``[N, C, H, W]``, y ``[N]``; the operator is square, one row per stored number.

    Example:
        >>> from scipy.sparse.linalg import eigsh
        >>> operator = hessian(nn.Linear(6, 3), torch.rand(20, 6), torch.arange(20) % 3)
        >>> bool(eigsh(operator, k=1, return_eigenvectors=False)[0] > 0)
        True
    """
    from scipy.sparse.linalg import LinearOperator

    twin = blank_copy(model).eval()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = F.cross_entropy(twin(x), y)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    sizes = [p.numel() for p in parameters]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = torch.from_numpy(np.ascontiguousarray(vector, np.float64).ravel())
        parts = [
            part.view_as(p).to(p) for part, p in zip(flat.split(sizes), parameters, strict=True)
        ]
        along = torch.stack([(g * v).sum() for g, v in zip(gradient, parts, strict=True)]).sum()
        rows = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([row.flatten().double() for row in rows]).cpu().numpy()

    return LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)


def lanczos(operator: LinearOperator, steps: int = 40, seed: int = 0) -> Spectrum:
    """Approximate the spectrum of a symmetric operator from one random vector.

    Args:
        operator: symmetric, n by n.
        steps: products with it; n or more give every eigenvalue that the vector has a share of.
        seed: of the random vector.

    Returns:
        At most `steps` nodes. Weights are those of this one vector; their mean over seeds is that
        of the spectrum.

    Source: Ghorbani et al., An Investigation into Neural Net Optimization via Hessian Eigenvalue
        Density (2019), section 2.

    Example:
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> lanczos(aslinearoperator(np.diag([1.0, 2.0, 3.0])), steps=3).eigenvalues.round(6)
        array([1., 2., 3.])
    """
    from scipy.linalg import eigh_tridiagonal

    size = operator.shape[0]
    basis = np.empty((min(steps, size), size))
    diagonal: list[float] = []
    beside: list[float] = []
    vector = np.random.default_rng(seed).standard_normal(size)
    scale = 0.0
    for step in range(len(basis)):
        basis[step] = vector / np.linalg.norm(vector)
        vector = operator.matvec(basis[step])
        diagonal.append(float(basis[step] @ vector))
        scale = max(scale, abs(diagonal[-1]), float(np.linalg.norm(vector)))
        for _ in range(2):  # once is not orthogonal enough, twice is
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        beside.append(float(np.linalg.norm(vector)))
        if beside[-1] <= 1e-12 * scale:
            break  # the vector has no share of any other eigenvalue
    values, vectors = eigh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return Spectrum(values, vectors[0] ** 2)
