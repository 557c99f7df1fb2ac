"""What several patterns of an exported graph have in common: views, copies and transpositions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.dropout.default)
VIEWS = (aten.view.default, aten.reshape.default)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def without_copies(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in COPIES:
        node = node.args[0]
    return node


def order_of(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """Return what a transposition reads, and where its axes come from."""
    node = without_copies(node)
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rank = len(shape_of(node))
    if node.target is aten.transpose.int:
        axes = list(range(rank))
        a, b = node.args[1:3]
        axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
        return node.args[0], tuple(axes)
    if node.target is aten.permute.default:
        return node.args[0], tuple(axis % rank for axis in node.args[1])  # type: ignore
    return None
