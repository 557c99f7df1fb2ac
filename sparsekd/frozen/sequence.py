"""Maps that become tokens in an exported graph, and constant tokens before them, made one operator.

A ViT flattens the map of its patches and puts a class token before them. Models write that in
several ways; what an operator here computes is a node of a frozen network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsekd.frozen.patterns import VIEWS, order_of, shape_of, without_copies

aten = torch.ops.aten


def tokens(x: Tensor) -> Tensor:
    """Return the pixels of maps [batch, channels, height, width] as tokens, row by row."""
    return x.flatten(2).transpose(1, 2)


def prepend(x: Tensor, *first: Tensor) -> Tensor:
    """Return tokens [batch, tokens, channels] with the constant ones [1, n, channels] before."""
    return torch.cat([*(part.expand(len(x), -1, -1) for part in first), x], 1)


def fuse_sequences(graph: fx.GraphModule) -> None:
    """Put `tokens` and `prepend` where a graph has them written out, in place."""
    for node in list(graph.graph.nodes):
        source = _map_of(node)
        if source is not None:
            _replace(graph.graph, node, tokens, source)
        elif node.target is aten.cat.default:
            _fuse_cat(graph.graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> None:
    with graph.inserting_before(node):
        fused = graph.call_function(target, args)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)


def _map_of(node: fx.Node) -> fx.Node | None:
    """Return the map whose pixels a node has as tokens."""
    if len(shape_of(node)) != 3:
        return None
    source: Any = None
    if node.target in VIEWS:  # of channels that were moved to the end
        moved = order_of(node.args[0])
        if moved and moved[1] == (0, 2, 3, 1):
            source = moved[0]
    else:  # of pixels that a view has put behind each other
        turned = order_of(node)
        view = without_copies(turned[0]) if turned and turned[1] == (0, 2, 1) else None
        if isinstance(view, fx.Node) and view.target in VIEWS:
            source = view.args[0]
    if not isinstance(source, fx.Node) or len(shape_of(source)) != 4:
        return None
    batch, channels, height, width = shape_of(source)
    return source if shape_of(node) == (batch, height * width, channels) else None


def _fuse_cat(graph: fx.Graph, node: fx.Node) -> None:
    parts, axis = (*node.args, 0)[:2]
    if not isinstance(parts, list | tuple) or axis not in (1, -2) or len(shape_of(node)) != 3:
        return
    first = [_repeated(part) for part in parts[:-1]]
    if not first or None in first or not isinstance(parts[-1], fx.Node):
        return
    _replace(graph, node, prepend, parts[-1], *first)


def _repeated(node: Any) -> fx.Node | None:
    """Return the parameter [1, n, channels] that every image gets once."""
    node = every = without_copies(node)
    if isinstance(node, fx.Node) and node.target in (aten.expand.default, aten.repeat.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(shape_of(node)) != 3:
        return None
    return node if shape_of(node) == (1, *shape_of(every)[1:]) else None
