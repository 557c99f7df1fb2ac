"""Who gets how many nonzeros, and where: distributions, rounding, masks and schedules."""

from __future__ import annotations

from sparsekd.sparsity.distributions import DISTRIBUTIONS, ErdosRenyi, allocate, erdos_renyi
from sparsekd.sparsity.masks import (
    fan_in_masks,
    generator_for,
    global_masks,
    magnitude_mask,
    magnitude_masks,
    random_mask,
    random_masks,
    topk_indices,
)
from sparsekd.sparsity.rounding import apportion, check_sparsity, target_nnz
from sparsekd.sparsity.schedules import Constant, Cosine, Polynomial, Schedule

__all__ = [
    "DISTRIBUTIONS",
    "Constant",
    "Cosine",
    "ErdosRenyi",
    "Polynomial",
    "Schedule",
    "allocate",
    "apportion",
    "check_sparsity",
    "erdos_renyi",
    "fan_in_masks",
    "generator_for",
    "global_masks",
    "magnitude_mask",
    "magnitude_masks",
    "random_mask",
    "random_masks",
    "target_nnz",
    "topk_indices",
]
