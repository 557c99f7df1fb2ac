"""Who gets how many nonzeros, and where: distributions, rounding, masks, pruning at init."""

from __future__ import annotations

from sparsekd.sparsity.at_init import grasp, snip, synflow
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
    topk_mask,
)
from sparsekd.sparsity.rounding import apportion, check_sparsity, target_nnz
from sparsekd.sparsity.schedules import Constant, Cosine, Polynomial, Schedule
from sparsekd.sparsity.survey import Survey, layers_to_prune, skipped_layers, survey

__all__ = [
    "DISTRIBUTIONS",
    "Constant",
    "Cosine",
    "ErdosRenyi",
    "Polynomial",
    "Schedule",
    "Survey",
    "allocate",
    "apportion",
    "check_sparsity",
    "erdos_renyi",
    "fan_in_masks",
    "generator_for",
    "global_masks",
    "grasp",
    "layers_to_prune",
    "magnitude_mask",
    "magnitude_masks",
    "random_mask",
    "random_masks",
    "skipped_layers",
    "snip",
    "survey",
    "synflow",
    "target_nnz",
    "topk_indices",
    "topk_mask",
]
