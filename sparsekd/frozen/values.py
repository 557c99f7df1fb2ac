"""The maps and constants of an exported graph while it is being frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsekd.frozen import draft as d
from sparsekd.frozen.draft import Draft, Node


class Outside(Exception):
    """An operator, or a use of it, that runs in torch."""


class Values:
    """The maps and constants of a graph that is being frozen.

    Args:
        draft: takes the nodes.
        constants: tensors of the model by their nodes in torch's graph.
        batch: the number of images, as torch's graph has it.
    """

    def __init__(self, draft: Draft, constants: dict[fx.Node, Tensor], batch: Any) -> None:
        self.draft = draft
        self.constants = constants
        self.batch = batch
        self.maps: dict[fx.Node, int] = {}
        self._alone: dict[fx.Node, bool] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a batch without the batch; it must be known and floating point."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim < 2:
            raise Outside
        rest = value.shape[1:]
        if value.shape[0] != self.batch or not all(isinstance(size, int) for size in rest):
            raise Outside
        return tuple(rest)

    def form(self, node: fx.Node) -> tuple[int, tuple[int, int, int]]:
        """Return the kind of input that a tensor would be, and its shape as a map."""
        shape = self.shape(node)
        if len(shape) == 3:
            return d.INPUT, (shape[0], shape[1], shape[2])
        if len(shape) == 2:
            return d.TOKENS, (shape[1], 1, shape[0])
        if len(shape) == 1:
            return d.INPUT, (shape[0], 1, 1)
        raise Outside

    def map(self, node: Any) -> int:
        """Return the number of the map of a tensor, an input if nobody here has computed it."""
        if not isinstance(node, fx.Node) or node in self.constants:
            raise Outside
        if node not in self.maps:
            kind, shape = self.form(node)
            self.put(node, self.draft.add(Node(kind, shape=shape)))
        return self.maps[node]

    def put(self, node: fx.Node, number: int, same_as: fx.Node | None = None) -> None:
        """Keep the map of a tensor; `same_as` is the tensor that it is another view of."""
        self.maps[node] = number
        self._alone[node] = len(node.users) == 1 and (same_as is None or self._alone[same_as])

    def alone(self, node: fx.Node) -> bool:
        return self._alone[node]

    def constant(self, node: Any) -> Tensor:
        if not isinstance(node, fx.Node) or node not in self.constants:
            raise Outside
        return self.constants[node]

    def lists(self, crow: Any, col: Any, weight: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the constants of a sparse weight."""
        return self.constant(crow), self.constant(col), self.constant(weight)

    def optional(self, node: Any) -> Tensor | None:
        return None if node is None else self.constant(node)


def arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Return the arguments after the first by position, with the defaults of the rest.

    Raises:
        Outside: there are keyword arguments, which no rule knows.
    """
    if node.kwargs and any(value is not None for value in node.kwargs.values()):
        raise Outside
    given = list(node.args[1:])
    return given + list(defaults[len(given) :])


def source(node: fx.Node) -> fx.Node:
    """Return the tensor that an operator reads first."""
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise Outside
    return first
