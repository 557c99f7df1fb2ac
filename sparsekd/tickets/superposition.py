"""Superposition: the average of sparse networks on the union of their supports, pruned back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparsekd.dst import scores
from sparsekd.dst.tile_grid import TileGrid, smallest_overall
from sparsekd.errors import ShapeError
from sparsekd.layouts import check_layouts
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.sparsity import target_nnz, topk_indices, warn_of_dead

Average = Literal["caa", "cima"]

BETA = 0.5
"""Weight of the newest network in "cima"."""


def superpose(
    models: Sequence[nn.Module],
    average: Average = "caa",
    sparsity: float | None = None,
    *,
    beta: float = BETA,
) -> nn.Module:
    """Average sparse networks weight by weight and prune the result back to an exact count.

    A weight that a network does not store counts as 0. The result has the union of the supports, so
    memory stays at the stored weights plus the mask of one layer. Dense tensors are averaged too:
    biases, normalisation parameters, running statistics, layers that are not sparse. Counters are
    those of the last network. The averaged running statistics are not those of the averaged
    network: recompute them, for instance with `torch.optim.swa_utils.update_bn`.

    Args:
        models: at least one, of one architecture; topologies may differ. They are only read.
        average: "caa" is the mean of all; "cima" moves from the first towards each next one by
            `beta`, so later ones count more.
        sparsity: of the result over all sparse modules together: the `round((1 - sparsity) * N)`
            largest magnitudes stay, or all if the union has fewer. None keeps the union.
        beta: of "cima", in (0, 1]; 1 gives the last network.

    Returns:
        A new network.

    Raises:
        ValueError: `models` is empty, or another argument is out of range.
        ShapeError: the networks do not have the same layers.
        UnsupportedError: a layer's layout is not "csr" or "bcsr".

    Source: Superposing Many Tickets into One (arXiv 2205.15322), section 3: connection-aware
        averaging (CAA) and iterative moving averaging (CIMA).

    Example:
        >>> import sparsekd as skd
        >>> a, b = (skd.nn.SparseLinear(20, 10, sparsity=0.9, seed=seed) for seed in (0, 1))
        >>> merged = superpose([a, b], average="caa", sparsity=0.9)
        >>> merged.topology.nnz
        20
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    check_average(average, beta)
    check_superposable(models[0])
    merged = blank_copy(models[0])
    for count, model in enumerate(models[1:], start=1):
        fold_(merged, model, average, count, beta)
    if sparsity is not None:
        numel = sum(module.topology.numel for _, module in sparse_modules(merged))
        prune_back_(merged, target_nnz(numel, sparsity))
        warn_of_dead_layers(merged)
    return merged


def warn_of_dead_layers(model: nn.Module) -> None:
    """Warn about layers and output channels of a superposed network that have no weight left.

    Args:
        model: a network with sparse modules.
    """
    alive = {name: m.topology.crow_indices.diff() > 0 for name, m in sparse_modules(model)}
    warn_of_dead(alive, stacklevel=3)


def check_average(average: str, beta: float = BETA) -> None:
    """Check the hyper-parameters of an average.

    Args:
        average: as in `superpose`.
        beta: as in `superpose`.

    Raises:
        ValueError: one of them is out of range.
    """
    if average not in get_args(Average):
        known = " or ".join(map(repr, get_args(Average)))
        raise ValueError(f"average: expected {known}, got {average!r}")
    if not 0 < beta <= 1:
        raise ValueError(f"beta: expected a number in (0, 1], got {beta}")


def check_superposable(model: nn.Module) -> None:
    """Check that unions of masks keep the layout of every layer.

    Args:
        model: a network with sparse modules.

    Raises:
        UnsupportedError: a layer's layout is not "csr" or "bcsr".
    """
    layouts = ((name, module.layout) for name, module in sparse_modules(model))
    check_layouts(layouts, ("csr", "bcsr"), "superposition, which takes unions of masks,")


def blank_copy(model: nn.Module) -> nn.Module:
    """Copy a network without gradients; recorded CUDA graphs do not refer to the copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    for _, module in sparse_modules(twin):
        module.capturable = False
    return twin


@torch.no_grad()
def fold_(
    merged: nn.Module, model: nn.Module, average: Average, count: int, beta: float = BETA
) -> None:
    """Fold one more network into an average of `count`, in place, on the union of supports.

    Args:
        merged: the average so far; its topologies grow.
        model: the network to fold in; only read.
        average: as in `superpose`.
        count: number of networks in the average so far.
        beta: as in `superpose`.

    Raises:
        ShapeError: the networks do not have the same layers; nothing has changed then.
    """
    if (ours := _shapes(merged)) != (others := _shapes(model)):
        name = min(k for k in ours.keys() | others.keys() if ours.get(k) != others.get(k))
        raise ShapeError(
            f"models: expected the same layers in all, but {name} has shape "
            f"{ours.get(name, 'none')} in one and {others.get(name, 'none')} in another"
        )
    theirs = dict(sparse_modules(model))
    for name, module in sparse_modules(merged):
        support = theirs[name].topology.mask()
        if average == "caa" or beta < 1:  # else the average counts for nothing, not even for zeros
            support |= module.topology.mask()
        module.rewire(support)
        _move_(module.values, _stored_at(module, theirs[name]), average, count, beta)
    target = _dense_tensors(merged)
    for name, tensor in _dense_tensors(model).items():
        if tensor.is_floating_point():
            _move_(target[name], tensor, average, count, beta)
        else:
            target[name].copy_(tensor)


def _move_(mean: Tensor, new: Tensor, average: Average, count: int, beta: float) -> None:
    # Steps, not weighted sums: the average of equal networks is that network to the bit, and
    # CIMA with beta 1 the last one.
    if average == "caa":
        mean += (new - mean) / (count + 1)
    else:
        mean.lerp_(new, beta)


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, without those that store a sparse weight."""
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    sparse = {
        f"{name}.{leaf}" if name else leaf
        for name, _ in sparse_modules(model)
        for leaf in ("values", "crow_indices", "col_indices")
    }
    return {name: tensor for name, tensor in everything.items() if name not in sparse}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Map the name of every weight to its dense shape."""
    dense = {name: tuple(tensor.shape) for name, tensor in _dense_tensors(model).items()}
    sparse = {n: tuple(module.topology.shape) for n, module in sparse_modules(model)}
    return dense | {f"the sparse weight of {name!r}": shape for name, shape in sparse.items()}


def _stored_at(mine: SparseModule, theirs: SparseModule) -> Tensor:
    """Return the values of `theirs` at the positions of `mine`, 0 where it has none."""
    slots = torch.searchsorted(mine.topology.flat_indices(), theirs.topology.flat_indices())
    return torch.zeros_like(mine.values).index_copy_(0, slots, theirs.values.to(mine.values))


@torch.no_grad()
def prune_back_(model: nn.Module, nnz: int) -> None:
    """Keep the `nnz` largest magnitudes of all sparse modules together, in place.

    Ties go to the earlier layer, then to the lower position. If fewer are stored, all stay. Layouts
    with tiles keep those of largest mean magnitude, as close to `nnz` weights as whole tiles allow.

    Args:
        model: a network with sparse modules; without any, nothing happens.
        nnz: number of weights to keep.

    Raises:
        ValueError: a weight is NaN.
    """
    modules = [module for _, module in sparse_modules(model)]
    stored = [module.values.numel() for module in modules]
    if nnz >= sum(stored):
        return
    if not all(module.layout.unstructured for module in modules):
        _prune_tiles_(dict(sparse_modules(model)), sum(stored) - nnz)
        return
    kept = topk_indices(torch.cat([module.values.abs() for module in modules]), nnz)
    keep = torch.zeros(sum(stored), dtype=torch.bool, device=kept.device)
    keep[kept] = True
    for module, part in zip(modules, keep.split(stored), strict=True):
        topology = module.topology
        mask = torch.zeros(topology.numel, dtype=torch.bool, device=topology.device)
        mask[topology.flat_indices()[part]] = True
        module.rewire(mask.view(topology.shape))


def _prune_tiles_(modules: Mapping[str, SparseModule], surplus: int) -> None:
    grids = {name: TileGrid(module.topology, module.layout) for name, module in modules.items()}
    score = {n: g.pool(scores.magnitude(modules[n].values)) for n, g in grids.items()}
    for name, count in smallest_overall(grids, score, surplus).items():
        grid = grids[name]
        kept = scores.without(grid.tiles, grid.lowest(score[name], count))
        modules[name].rewire(grid.expand(kept.mask()))
