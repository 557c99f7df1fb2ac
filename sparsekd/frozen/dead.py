"""Dead channels of a frozen network: found, folded into what reads them, and removed.

A row without nonzeros computes the same number at every pixel. Forward through the network, such
constants go into the bias of their readers wherever that is exact: a tap of a convolution that
reaches into the padding reads a zero there and not the constant. Backward, a channel is alive if
something alive reads it. What adds or pools maps channel by channel keeps the same channels on both
sides, so channels are kept or removed together along a residual stream.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.frozen import draft as d
from sparsekd.frozen.draft import Node

_ACTIVATIONS = {
    d.NONE: lambda x: x,
    d.RELU: F.relu,
    d.RELU6: F.relu6,
    d.SILU: F.silu,
    d.GELU: F.gelu,
    d.HARDSWISH: F.hardswish,
    d.SIGMOID: F.sigmoid,
    d.HARDSIGMOID: F.hardsigmoid,
}

# What computes numbers from several channels, or differs from pixel to pixel by itself.
_MIXED = (d.LAYER_NORM, d.ATTENTION, d.SEQUENCE)

Shape = tuple[int, int, int]


def remove_dead(nodes: list[Node], outputs: list[int]) -> tuple[list[Node], int]:
    """Return the nodes without dead channels, and how many rows their layers have lost.

    Inputs and outputs keep all of theirs. Results are equal up to the rounding of a bias.
    """
    shapes = _shapes(nodes)
    nodes = _fold(nodes, shapes)
    alive = _alive(nodes, outputs, shapes)
    kept = [_without(node, alive, i) for i, node in enumerate(nodes)]
    layers = [channels for n, channels in zip(nodes, alive, strict=True) if n.kind == d.PRODUCT]
    return kept, sum(int((~channels).sum()) for channels in layers)


def _shapes(nodes: list[Node]) -> list[Shape]:
    found: list[Shape] = []
    for node in nodes:
        channels, *size = found[node.inputs[0]] if node.inputs else node.shape
        if node.kind == d.FLATTEN:
            found.append((channels * size[0] * size[1], 1, 1))
            continue
        if node.kind == d.MEAN_POOL and node.window.kernel == (0, 0):
            size = [1, 1]
        elif node.kind in (d.PRODUCT, d.MAX_POOL, d.MEAN_POOL):
            w = node.window
            size = [
                (size[a] + 2 * w.padding[a] - w.dilation[a] * (w.kernel[a] - 1) - 1) // w.stride[a]
                + 1
                for a in (0, 1)
            ]
        if node.kind == d.PRODUCT:
            channels = len(node.lists["crow"]) - 1
        elif node.kind == d.ATTENTION:
            channels //= 3
        elif node.kind == d.SEQUENCE:
            size = [1, len(node.lists["bias"]) // channels]
        found.append((channels, size[0], size[1]))
    return found


def _entries(node: Node, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, input channel and tap of every stored value of a product."""
    crow, col = node.lists["crow"].long(), node.lists["col"].long()
    count = len(crow) - 1
    row = torch.repeat_interleave(torch.arange(count), crow[1:] - crow[:-1])
    taps, groups = math.prod(node.window.kernel), node.window.groups
    first = row // max(count // groups, 1) * (channels // groups)
    return row, first + col // taps, col % taps


def _keep_entries(node: Node, row: Tensor, kept: Tensor, **changed: Tensor) -> Node:
    crow = torch.zeros_like(node.lists["crow"])
    crow[1:] = torch.bincount(row[kept], minlength=len(crow) - 1).cumsum(0)
    lists = {name: node.lists[name][kept] for name in ("col", "values")}
    return replace(node, lists={**node.lists, **lists, "crow": crow, **changed})


def _inside(node: Node, before: Shape, after: Shape) -> Tensor:
    """Return which taps of a product never reach into the padding."""
    w = node.window
    ranges = []
    for axis in (0, 1):
        first = torch.arange(w.kernel[axis]) * w.dilation[axis] - w.padding[axis]
        last = first + (after[1 + axis] - 1) * w.stride[axis]
        ranges.append((first >= 0) & (last < before[1 + axis]))
    return (ranges[0][:, None] & ranges[1][None]).flatten()


def _fold(nodes: list[Node], shapes: list[Shape]) -> list[Node]:
    """Move constants into the biases of products that read them."""
    folded: list[Node] = []
    constants: list[Tensor] = []  # for each node [channels]; not a number where it varies
    for i, node in enumerate(nodes):
        if node.kind == d.PRODUCT:
            x = node.inputs[0]
            node = _fold_product(node, constants[x], shapes[x], shapes[i])
        folded.append(node)
        constants.append(_constants(node, constants, shapes, shapes[i]))
    return folded


def _fold_product(node: Node, constants: Tensor, before: Shape, after: Shape) -> Node:
    row, channel, tap = _entries(node, before[0])
    read = constants[channel]
    out = (read == 0) | (read.isfinite() & _inside(node, before, after)[tap])
    if not out.any():
        return node
    bias = node.lists["bias"].double()
    bias = bias.index_add(0, row[out], node.lists["values"][out].double() * read[out])
    return _keep_entries(node, row, ~out, bias=bias.float())


def _constants(node: Node, known: list[Tensor], shapes: list[Shape], shape: Shape) -> Tensor:
    varies = torch.full((shape[0],), math.nan, dtype=torch.float64)
    if not node.inputs or node.kind in _MIXED:
        return varies
    value = known[node.inputs[0]]
    if node.kind == d.GATE:
        return value * known[node.inputs[1]]
    if node.kind == d.FLATTEN:
        return value.repeat_interleave(math.prod(shapes[node.inputs[0]][1:]))
    if node.kind == d.MAX_POOL:
        return value if node.window.dilation == (1, 1) else varies
    if node.kind == d.MEAN_POOL:
        counted = node.count_padding and any(node.window.padding)
        return value.where(value == 0, varies) if counted else value
    if node.kind == d.PRODUCT:
        row, _, _ = _entries(node, shapes[node.inputs[0]][0])
        reads = torch.bincount(row[node.lists["values"] != 0], minlength=shape[0])
        value = node.lists["bias"].double().where(reads == 0, varies)
    elif "scale" in node.lists:
        value = value * node.lists["scale"].double() + node.lists["bias"].double()
    if len(node.inputs) == 2:
        value = value + known[node.inputs[1]]
    result: Tensor = _ACTIVATIONS[node.activation](value)
    return result


def _alive(nodes: list[Node], outputs: list[int], shapes: list[Shape]) -> list[Tensor]:
    """Return for each node which channels something reads that matters."""
    alive = [torch.zeros(shape[0], dtype=torch.bool) for shape in shapes]
    reads = {
        i: _entries(node, shapes[node.inputs[0]][0])
        for i, node in enumerate(nodes)
        if node.kind == d.PRODUCT
    }
    for i, node in enumerate(nodes):
        if i in outputs or not node.inputs or node.kind in _MIXED:
            alive[i][:] = True
    while True:
        before = sum(int(channels.sum()) for channels in alive)
        for i in reversed(range(len(nodes))):
            alive[i][0] |= not alive[i].any()  # a map has at least one
            _mark(nodes[i], i, alive, shapes, reads)
        if before == sum(int(channels.sum()) for channels in alive):
            return alive


def _mark(
    node: Node,
    i: int,
    alive: list[Tensor],
    shapes: list[Shape],
    reads: dict[int, tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Mark what a node reads, and what it must keep because its inputs do."""
    if not node.inputs:
        return
    first = alive[node.inputs[0]]
    together = [i, *node.inputs]
    if node.kind in _MIXED:
        for x in node.inputs:
            alive[x][:] = True
        return
    if node.kind == d.FLATTEN:
        pixels = math.prod(shapes[node.inputs[0]][1:])
        first |= alive[i].view(-1, pixels).any(1)
        alive[i] |= first.repeat_interleave(pixels)
        return
    if node.kind == d.PRODUCT:
        row, channel, _ = reads[i]
        first[channel[(node.lists["values"] != 0) & alive[i][row]]] = True
        groups = node.window.groups
        if groups > 1:  # stay or go as a whole
            of = alive[i].view(groups, -1), first.view(groups, -1)
            kept = of[0].any(1) | of[1].any(1)
            for part in of:
                part |= kept[:, None]
        together = [i, *node.inputs[1:]]
    union = torch.stack([alive[j] for j in together]).any(0)
    for j in together:
        alive[j] |= union


def _without(node: Node, alive: list[Tensor], i: int) -> Node:
    kept = alive[i]
    if not node.inputs or (kept.all() and alive[node.inputs[0]].all()):
        return node
    if node.kind == d.POINTWISE:
        return replace(node, lists={name: values[kept] for name, values in node.lists.items()})
    if node.kind != d.PRODUCT:
        return node
    before = alive[node.inputs[0]]
    row, channel, tap = _entries(node, len(before))
    stays = kept[row] & before[channel]
    node = _keep_entries(node, row, stays, bias=node.lists["bias"][kept])
    crow = node.lists["crow"]
    counts = (crow[1:] - crow[:-1])[kept]
    node.lists["crow"] = torch.cat([crow[:1], counts.cumsum(0).to(crow.dtype)])
    groups = node.window.groups
    if groups == 1:
        place = before.cumsum(0) - 1
        taps = math.prod(node.window.kernel)
        node.lists["col"] = (place[channel[stays]] * taps + tap[stays]).to(torch.int32)
        return node
    left = int(kept.view(groups, -1).any(1).sum())
    return replace(node, window=replace(node.window, groups=left))
