"""Lottery tickets in any orthonormal basis of the weights, and the study of them."""

from __future__ import annotations

from sparsekd.analysis.bases.basis import (
    BASES,
    Basis,
    dct_matrix,
    hadamard_matrix,
    make_basis,
    random_matrix,
)
from sparsekd.analysis.bases.compact import (
    factorize,
    largest_units,
    narrow,
    plain,
    sparse_layers,
    unit_masks,
    units_within,
)
from sparsekd.analysis.bases.study import BasisStudy, BasisTickets
from sparsekd.analysis.bases.ticket import (
    KeptCoefficients,
    encode,
    keep_coefficients,
    make_bases,
    make_basis_ticket,
    prune_coefficients,
    rank_cost,
    rank_masks,
    stored_numbers,
)

__all__ = [
    "BASES",
    "Basis",
    "BasisStudy",
    "BasisTickets",
    "KeptCoefficients",
    "dct_matrix",
    "encode",
    "factorize",
    "hadamard_matrix",
    "keep_coefficients",
    "largest_units",
    "make_bases",
    "make_basis",
    "make_basis_ticket",
    "narrow",
    "plain",
    "prune_coefficients",
    "random_matrix",
    "rank_cost",
    "rank_masks",
    "sparse_layers",
    "stored_numbers",
    "unit_masks",
    "units_within",
]
