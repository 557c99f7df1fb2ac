"""Tickets whose structure makes a smaller network: whole units, low rank, sparse layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from sparsekd.analysis.bases.ticket import KeptCoefficients
from sparsekd.errors import UnsupportedError
from sparsekd.nn import sparsify
from sparsekd.tickets import Masks

_ELEMENTWISE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity)
_LAYERS = (nn.Linear, nn.Conv2d)

Units = Mapping[str, Tensor]
"""Module name -> bool per output: which units, or filters, stay."""


def unit_masks(model: nn.Sequential, keep: Units) -> Masks:
    """Return masks without the weights into and out of the units that go.

    Args:
        model: a chain of layers, dense.
        keep: which outputs of each layer stay.

    Returns:
        Module name -> bool mask; constant over the weights into a unit that are left to it.

    Raises:
        UnsupportedError: the network is no chain of layers that keep channels apart.
    """
    masks = {}
    for name, rows, columns in _chain(model, keep):
        weight = cast(nn.Linear, model.get_submodule(name)).weight
        mask = rows[:, None] & columns[None, :]
        masks[name] = mask.view(*mask.shape, *[1] * (weight.ndim - 2)).expand_as(weight).clone()
    return masks


def largest_units(model: nn.Sequential, share: float) -> dict[str, Tensor]:
    """Choose the same share of the units of every layer but the last, by the norm of their weights.

    Args:
        model: the trained chain.
        share: of the units to keep, in (0, 1]; at least one stays.

    Returns:
        Module name -> bool per output.
    """
    names = [name for name, module in model.named_children() if isinstance(module, _LAYERS)]
    keep = {}
    for name in names:
        norm = cast(Tensor, model.get_submodule(name).weight).detach().flatten(1).norm(dim=1)
        count = len(norm) if name == names[-1] else max(1, round(share * len(norm)))
        keep[name] = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
        keep[name][norm.topk(count).indices] = True
    return keep


def units_within(model: nn.Sequential, density: float) -> dict[str, Tensor]:
    """Keep as many units as a number of weights allows, the same share in every hidden layer.

    Args:
        model: the trained chain.
        density: share of the weights that may be stored.

    Returns:
        Module name -> bool per output; a unit of every layer stays in any case.
    """
    weights = [m.weight for m in model.children() if isinstance(m, _LAYERS)]
    budget = density * sum(weight.numel() for weight in weights)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        masks = unit_masks(model, largest_units(model, middle))
        if sum(int(mask.sum()) for mask in masks.values()) <= budget:
            low = middle
        else:
            high = middle
    return largest_units(model, low)


def narrow(model: nn.Sequential, keep: Units) -> nn.Sequential:
    """Build the smaller dense network without the units that go.

    It computes what the network with `unit_masks` does: nothing reads a unit that is gone, so its
    bias has no effect either.

    Args:
        model: a chain of layers; weights may be parametrized. Not changed.
        keep: which outputs of each layer stay.

    Returns:
        A new chain.

    Raises:
        UnsupportedError: the network is no chain of layers that keep channels apart.
    """
    chain = {name: (rows, columns) for name, rows, columns in _chain(model, keep)}
    small = cast(nn.Sequential, plain(model))
    living: Tensor | None = None
    for name, module in small.named_children():
        if name in chain:
            living, columns = chain[name]
            layer = cast(nn.Linear, module)
            layer.weight = nn.Parameter(layer.weight.detach()[living][:, columns].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[living].clone())
            sizes = (int(columns.sum()), int(living.sum()))
            kind = "features" if isinstance(module, nn.Linear) else "channels"
            setattr(layer, f"in_{kind}", sizes[0])
            setattr(layer, f"out_{kind}", sizes[1])
        elif isinstance(module, nn.BatchNorm2d) and living is not None:
            module.num_features = int(living.sum())
            tensors = [*module.named_parameters(), *module.named_buffers()]
            for leaf, tensor in tensors:
                if tensor.ndim:
                    part = tensor.detach()[living].clone()
                    new = nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part
                    setattr(module, leaf, new)
    return small


def _chain(model: nn.Sequential, keep: Units) -> list[tuple[str, Tensor, Tensor]]:
    """Return, for every layer, its name, which outputs stay, and which inputs are left."""
    if not isinstance(model, nn.Sequential):
        raise UnsupportedError(f"model: expected an nn.Sequential, got a {type(model).__name__}")
    chain, living, channels = [], None, True
    for name, module in model.named_children():
        if isinstance(module, _LAYERS):
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                raise UnsupportedError(f"model: {name} has groups, which tie channels together")
            columns = torch.ones(module.weight.shape[1], dtype=torch.bool)
            if living is not None:
                # Flattening turns a channel into as many inputs as it has pixels.
                columns = living.repeat_interleave(len(columns) // len(living))
            living, channels = keep[name].cpu(), isinstance(module, nn.Conv2d)
            chain.append((name, living, columns))
        elif isinstance(module, nn.BatchNorm2d):
            if not channels:
                raise UnsupportedError(f"model: {name} follows no convolution")
        elif not isinstance(module, (*_ELEMENTWISE, nn.Flatten)):
            raise UnsupportedError(
                f"model: {name} is a {type(module).__name__}, not known to keep channels apart"
            )
    return chain


def factorize(model: nn.Module) -> nn.Module:
    """Replace every weight of low rank by two layers: into k numbers, and out of them.

    Args:
        model: a ticket in the SVD basis with the masks of `rank_masks`; not changed.

    Returns:
        A new network that computes the same; layers where two cost more than one stay one.

    Raises:
        UnsupportedError: a weight is not parametrized by a block of coefficients.
    """
    if parametrize.is_parametrized(model, "weight"):
        return _factors("", model)
    small = copy.deepcopy(model)
    for name, module in list(small.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            small.set_submodule(name, _factors(name, module))
    return small


@torch.no_grad()
def _factors(name: str, layer: nn.Module) -> nn.Module:
    parts = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    ticket = cast(KeptCoefficients, cast(nn.ModuleList, parts)[0])
    values = cast(Tensor, parts.original)
    rank = math.isqrt(len(values))
    columns = math.prod(ticket.shape[1:])
    block = torch.arange(rank)[:, None] * columns + torch.arange(rank)
    if not (ticket.basis.as_matrix and torch.equal(ticket.positions.cpu(), block.flatten())):
        raise UnsupportedError(f"model: {name or 'the layer'} keeps no block of coefficients")
    if getattr(layer, "groups", 1) > 1:
        raise UnsupportedError(f"model: {name or 'the layer'} has groups, which rank k mixes")
    if rank * (ticket.shape[0] + columns) >= ticket.shape[0] * columns:
        return plain(layer)
    right = ticket.basis.matrix(1)[:, :rank].mT  # [k, in]
    left = ticket.basis.matrix(0)[:, :rank] @ values.view(rank, rank)  # [out, k]
    kernel = ticket.shape[1:]
    first = _plain_layer(layer, right.reshape(rank, *kernel), bias=False)
    second = _plain_layer(
        layer, left.reshape(*left.shape, *[1] * (len(kernel) - 1)), pointwise=True
    )
    return nn.Sequential(first, second)


@torch.no_grad()
def plain(model: nn.Module) -> nn.Module:
    """Copy a ticket into ordinary dense layers, which compute the same.

    Args:
        model: with weights parametrized; not changed.
    """
    if parametrize.is_parametrized(model, "weight"):
        return _plain_layer(model, cast(Tensor, model.weight).detach())
    # torch's own removal of a parametrization would break the model that this is a copy of:
    # both share a class.
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            layer = _plain_layer(module, cast(Tensor, module.weight).detach())
            dense.set_submodule(name, layer)
    return dense


def _plain_layer(
    layer: nn.Module, weight: Tensor, *, bias: bool = True, pointwise: bool = False
) -> nn.Module:
    """Build a dense layer with this weight, and bias and geometry of another."""
    new: nn.Linear | nn.Conv2d
    bias = bias and layer.bias is not None
    rows, columns = weight.shape[:2]
    if isinstance(layer, nn.Conv2d):
        names = () if pointwise else ("stride", "padding", "dilation", "groups", "padding_mode")
        options: dict[str, Any] = {name: getattr(layer, name) for name in names}
        columns *= options.get("groups", 1)
        new = skip_init(nn.Conv2d, columns, rows, weight.shape[2:], bias=bias, **options)
    else:
        new = skip_init(nn.Linear, columns, rows, bias=bias)
    new.weight = nn.Parameter(weight.clone())
    if bias:
        new.bias = nn.Parameter(cast(Tensor, layer.bias).detach().clone())
    return new.train(layer.training)


def sparse_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Copy a ticket in the basis of the weights into sparse layers, which store the same numbers.

    Args:
        model: a ticket in the identity basis; not changed.
        masks: its masks.

    Returns:
        A new network with sparse modules.
    """
    return sparsify(plain(model), masks=dict(masks))
