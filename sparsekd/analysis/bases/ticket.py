"""Tickets in a basis: what is kept of the trained coefficients, and training of what is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekd.analysis.bases.basis import Basis, make_basis
from sparsekd.errors import ShapeError
from sparsekd.sparsity import global_masks
from sparsekd.tickets import Masks
from sparsekd.tickets.pruning import maskable


class KeptCoefficients(nn.Module):
    """The parametrization of a ticket: the parameter holds the kept coefficients and nothing else.

    Register it with `torch.nn.utils.parametrize`; a weight that is assigned is projected on the
    kept coefficients.

    Args:
        basis: of the weight.
        mask: bool, which coefficients are kept.

    Shape:
        mask: that of the weight; the parameter is ``[number of kept coefficients]``, row-major

    Example:
        >>> layer, basis = nn.Linear(4, 4), make_basis("dct", torch.empty(4, 4))
        >>> mask = torch.eye(4, dtype=torch.bool)
        >>> layer = keep_coefficients(layer, basis, mask)
        >>> layer.parametrizations.weight.original.shape
        torch.Size([4])
    """

    positions: Tensor

    def __init__(self, basis: Basis, mask: Tensor) -> None:
        super().__init__()
        self.basis = basis
        self.shape = mask.shape
        self.register_buffer("positions", mask.flatten().nonzero().squeeze(1))

    def forward(self, values: Tensor) -> Tensor:
        """Return the weight."""
        flat = values.new_zeros(math.prod(self.shape)).index_put((self.positions,), values)
        return self.basis.decode(flat.view(self.shape))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the kept coefficients of a weight."""
        return self.basis.encode(weight).flatten()[self.positions]


def keep_coefficients(module: nn.Module, basis: Basis, mask: Tensor) -> nn.Module:
    """Parametrize the weight of a layer by some of its coefficients, in place.

    Args:
        module: a dense layer with a `weight`.
        basis: of the weight.
        mask: bool, which coefficients are kept.

    Returns:
        The layer; its weight is now the projection on the kept coefficients.

    Raises:
        ShapeError: the mask does not have the weight's shape.
    """
    weight = cast(Tensor, module.weight)
    if mask.shape != weight.shape:
        raise ShapeError(f"mask: expected shape {list(weight.shape)}, got {list(mask.shape)}")
    # `unsafe` allows a parameter of another shape than the weight.
    parametrize.register_parametrization(
        module, "weight", KeptCoefficients(basis, mask), unsafe=True
    )
    return module


def make_bases(model: nn.Module, kind: str, seed: int = 0) -> dict[str, Basis]:
    """Build a basis for the weight of every linear layer and convolution.

    Args:
        model: the trained dense network.
        kind: as in `make_basis`.
        seed: as in `make_basis`.

    Returns:
        Module name -> basis.
    """
    layers = maskable(model, "all").items()
    return {name: make_basis(kind, cast(Tensor, layer.weight), seed) for name, layer in layers}


@torch.no_grad()
def encode(model: nn.Module, bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """Return the coefficients of every weight that has a basis.

    Args:
        model: dense.
        bases: module name -> basis.

    Returns:
        Module name -> coefficients, of the weight's shape.
    """
    return {n: b.encode(cast(Tensor, model.get_submodule(n).weight)) for n, b in bases.items()}


def prune_coefficients(coefficients: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Mask the smallest coefficients of all layers together, exactly ``floor(sparsity * N)``.

    In the basis of the weights themselves this is `sparsekd.tickets.prune` with ``layers="all"``,
    bit for bit.

    Args:
        coefficients: module name -> coefficients of the trained weight.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        Module name -> bool mask.

    Raises:
        ValueError: sparsity is out of range, or a coefficient is NaN.

    Example:
        >>> masks = prune_coefficients({"fc": torch.arange(8.0).view(2, 4)}, 0.5)
        >>> masks["fc"].tolist()
        [[False, False, False, False], [True, True, True, True]]
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity}")
    total = sum(c.numel() for c in coefficients.values())
    drop = math.floor(Fraction(repr(float(sparsity))) * total)
    return global_masks({name: c.abs() for name, c in coefficients.items()}, total - drop)


def rank_masks(shapes: Mapping[str, tuple[int, ...]], density: float) -> Masks:
    """Keep a block of k by k coefficients in each layer's SVD basis: weights of rank k.

    The k of each layer is the largest whose k^2 coefficients and 2 k singular vectors are at most
    `density` of its weights, and at least 1.

    Args:
        shapes: module name -> shape of the weight.
        density: share of the numbers of each layer that may be stored.

    Returns:
        Module name -> bool mask of the coefficients as a matrix in the weight's shape.

    Example:
        >>> masks = rank_masks({"fc": (100, 300)}, density=0.1)
        >>> int(masks["fc"].sum()), rank_cost((100, 300), 7)
        (49, 2849)
    """
    masks = {}
    for name, shape in shapes.items():
        rows, columns = shape[0], math.prod(shape[1:])
        rank, budget = 1, density * rows * columns
        while rank < min(rows, columns) and rank_cost(shape, rank + 1) <= budget:
            rank += 1
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[:rank, :rank] = True
        masks[name] = mask.view(shape)
    return masks


def rank_cost(shape: tuple[int, ...], rank: int) -> int:
    """Count the numbers of a rank-k ticket: coefficients, and the singular vectors they go with."""
    return rank * rank + rank * (shape[0] + math.prod(shape[1:]))


def make_basis_ticket(
    model: nn.Module,
    bases: Mapping[str, Basis],
    masks: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build a network whose weights are spanned by the kept coefficients alone.

    Args:
        model: the dense network; not changed.
        bases: module name -> basis.
        masks: module name -> bool mask of coefficients, for the same modules.
        state: dense state dict to start from; by default the model's own.

    Returns:
        A new network in which each such weight is parametrized by `KeptCoefficients`, starting at
        the projection of the state.

    Raises:
        ShapeError: a mask does not have its weight's shape.

    Source: arXiv 2107.06825: w = B (m * c), rewound to the coefficients of the initialisation.
    """
    ticket = copy.deepcopy(model)
    if state is not None:
        ticket.load_state_dict(dict(state))
    for name, basis in bases.items():
        keep_coefficients(ticket.get_submodule(name), copy.deepcopy(basis), masks[name])
    return ticket


def stored_numbers(kind: str, masks: Mapping[str, Tensor]) -> int:
    """Count the numbers a ticket stores for its weights, singular vectors included.

    Positions of coefficients are not counted, as they are not for any sparse network here.

    Args:
        kind: of the basis.
        masks: module name -> bool mask of coefficients.
    """
    if kind != "svd":
        return sum(int(mask.sum()) for mask in masks.values())
    ranks = ((tuple(mask.shape), math.isqrt(int(mask.sum()))) for mask in masks.values())
    return sum(rank_cost(shape, rank) for shape, rank in ranks)
