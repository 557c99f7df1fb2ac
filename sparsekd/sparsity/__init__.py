"""Where the nonzeros go: distributions over layers, rounding, masks, pruning at initialisation."""

from __future__ import annotations

from sparsekd.sparsity.at_init import grasp, snip, synflow
from sparsekd.sparsity.dead import living_rows, warn_of_dead
from sparsekd.sparsity.distributions import DISTRIBUTIONS, ErdosRenyi, allocate, erdos_renyi
from sparsekd.sparsity.masks import (
    generator_for,
    global_masks,
    magnitude_mask,
    magnitude_masks,
    random_mask,
    random_masks,
    topk_indices,
    topk_mask,
)
from sparsekd.sparsity.rounding import apportion, check_sparsity, nearest_prefix, target_nnz
from sparsekd.sparsity.schedules import Constant, Cosine, Polynomial, Schedule
from sparsekd.sparsity.survey import (
    NAMED_FROM,
    Survey,
    conv1d_class,
    dense_parameters,
    layers_to_prune,
    outputs_first,
    skipped_layers,
    survey,
    with_layers,
)
from sparsekd.sparsity.tiles import (
    best_tiles,
    check_fixed_density,
    fan_in_masks,
    global_layout_masks,
    layout_masks,
    magnitude_tiles,
    random_tiles,
    tile_counts,
)
from sparsekd.sparsity.wrappers import refuse_wrappers

__all__ = [
    "DISTRIBUTIONS",
    "NAMED_FROM",
    "Constant",
    "Cosine",
    "ErdosRenyi",
    "Polynomial",
    "Schedule",
    "Survey",
    "allocate",
    "apportion",
    "best_tiles",
    "check_fixed_density",
    "check_sparsity",
    "conv1d_class",
    "dense_parameters",
    "erdos_renyi",
    "fan_in_masks",
    "generator_for",
    "global_layout_masks",
    "global_masks",
    "grasp",
    "layers_to_prune",
    "layout_masks",
    "living_rows",
    "magnitude_mask",
    "magnitude_masks",
    "magnitude_tiles",
    "nearest_prefix",
    "outputs_first",
    "random_mask",
    "random_masks",
    "random_tiles",
    "refuse_wrappers",
    "skipped_layers",
    "snip",
    "survey",
    "synflow",
    "target_nnz",
    "tile_counts",
    "topk_indices",
    "topk_mask",
    "warn_of_dead",
    "with_layers",
]
