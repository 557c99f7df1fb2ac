"""Nodes of a frozen network while it is put together, fused as they come.

The compiled network (`csrc/core/frozen/network.h`) knows few kinds of nodes. BatchNorm, residual
additions and activations become part of the convolution or linear layer before them, where nobody
else reads what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsekd.errors import ShapeError, UnsupportedError

RECORD = 17
INPUT, TOKENS, PRODUCT, POINTWISE, MAX_POOL, MEAN_POOL, FLATTEN = range(7)
LAYER_NORM, ATTENTION, GATE, SEQUENCE = range(7, 11)
NONE, RELU, RELU6, SILU, GELU, HARDSWISH, SIGMOID, HARDSIGMOID = range(8)

MOST_TAP = 1024  # kernel, stride, padding, dilation

# Rows that are dense share one list of inputs, which is computed four rows at a time; leaving out
# a few stray zeros would give each row a list of its own.
_DENSE_FROM = 0.6


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation, vertical first, of a convolution or a pool."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass
class Node:
    """A node as the compiled network takes it; `lists` are crow, col, values, bias and scale.

    Values of int8 are times the scale of their row.
    """

    kind: int
    inputs: tuple[int, ...] = ()
    activation: int = NONE
    window: Window = Window()
    shape: tuple[int, int, int] = (0, 0, 0)  # channels, height and width of an input
    count_padding: bool = True
    lists: dict[str, Tensor] = field(default_factory=dict)

    def record(self) -> list[int]:
        """Return the node as numbers, in the order of `decode` in network.h."""
        w = self.window
        first, second = (*self.inputs, -1, -1)[:2]
        return [
            *(self.kind, self.activation, int(self.count_padding), first, second),
            *(*w.kernel, *w.stride, *w.padding, *w.dilation, w.groups),
            *self.shape,
        ]

    @classmethod
    def of_record(cls, record: list[int]) -> Node:
        """Return the node of `record`, whose numbers the compiled network checks."""
        if len(record) != RECORD:
            raise ShapeError(f"records: expected rows of {RECORD} numbers, got {len(record)}")
        kind, activation, count_padding, *inputs = record[:5]
        pairs = [(record[i], record[i + 1]) for i in range(5, 13, 2)]
        window = Window(pairs[0], pairs[1], pairs[2], pairs[3], record[13])
        shape = (record[14], record[15], record[16])
        used = tuple(i for i in inputs if i >= 0)
        return cls(kind, used, activation, window, shape, bool(count_padding))


def csr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return crow, col and values of a matrix: all entries if it is dense, else the nonzeros."""
    matrix = weight.detach().float()
    kept = matrix != 0
    if kept.float().mean() > _DENSE_FROM:
        kept = torch.ones_like(kept)
    crow = torch.zeros(len(matrix) + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return crow, kept.nonzero()[:, 1].to(torch.int32), matrix[kept].clone()


def rounded(node: Node) -> Node:
    """Return a product with values of int8, each within half a step of what it was.

    A row's step is its largest magnitude over 127.

    Raises:
        UnsupportedError: a value is infinite or not a number, which int8 cannot hold.
    """
    if node.kind != PRODUCT:
        return node
    crow, values = node.lists["crow"], node.lists["values"]
    if not values.isfinite().all():
        raise UnsupportedError("weights: int8 cannot hold infinity or NaN, which a layer has")
    row = torch.repeat_interleave((crow[1:] - crow[:-1]).long())
    largest = torch.zeros(len(crow) - 1).scatter_reduce(0, row, values.abs(), "amax")
    step = torch.where(largest > 0, largest / 127, 1.0)
    codes = (values / step[row]).round().clamp(-127, 127).to(torch.int8)
    return replace(node, lists={**node.lists, "values": codes, "scale": step})


class Draft:
    """A list of nodes that grows; what a method returns is the number of a node.

    `alone` says whether the caller is the only reader of the node that it passes.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def product(
        self, x: int, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, window: Window
    ) -> int:
        """Append a convolution or a linear layer, `weight` as crow, col and values."""
        crow, col, values = weight
        lists = {
            "crow": crow.detach().to(torch.int32).clone(),
            "col": col.detach().to(torch.int32).clone(),
            "values": values.detach().float().clone(),
            "bias": torch.zeros(len(crow) - 1) if bias is None else bias.detach().float().clone(),
        }
        return self.add(Node(PRODUCT, (x,), window=window, lists=lists))

    def affine(self, x: int, scale: Tensor, shift: Tensor, alone: bool) -> int:
        """Append scale and shift of every channel, into the values of a product before it."""
        node = self.nodes[x]
        if alone and node.kind == PRODUCT and self._open(x):
            crow, lists = node.lists["crow"], node.lists
            rows = torch.repeat_interleave(scale, (crow[1:] - crow[:-1]).long())
            lists["values"] = (lists["values"].double() * rows).float()
            lists["bias"] = (lists["bias"].double() * scale + shift).float()
            return x
        lists = {"scale": scale.float(), "bias": shift.float()}
        return self.add(Node(POINTWISE, (x,), lists=lists))

    def plus(self, a: int, b: int, alone: tuple[bool, bool]) -> int:
        """Append a sum, as the residual of a product where it can be one."""
        for x, other, only in sorted([(a, b, alone[0]), (b, a, alone[1])], reverse=True):
            if only and x != other and self.nodes[x].kind == PRODUCT and self._open(x):
                # It reads the other map, so it may have to come later than it did.
                moved = replace(self.nodes[x], inputs=(*self.nodes[x].inputs, other))
                return self.add(moved)
        return self.add(Node(POINTWISE, (a, b)))

    def activate(self, x: int, activation: int, alone: bool) -> int:
        node = self.nodes[x]
        if alone and node.kind in (PRODUCT, POINTWISE) and node.activation == NONE:
            node.activation = activation
            return x
        return self.add(Node(POINTWISE, (x,), activation))

    def layer_norm(
        self, x: int, channels: int, scale: Tensor | None, shift: Tensor | None, eps: float
    ) -> int:
        """Append a layer norm over the channels of tokens."""
        lists = {
            "values": torch.tensor([eps]),
            "scale": torch.ones(channels) if scale is None else scale.detach().float().clone(),
            "bias": torch.zeros(channels) if shift is None else shift.detach().float().clone(),
        }
        return self.add(Node(LAYER_NORM, (x,), lists=lists))

    def sequence(self, x: int, constants: Tensor, alone: bool) -> int:
        """Append tokens: constants [tokens, channels], plus a map's pixels as the last ones."""
        node = self.nodes[x]
        bias = constants.detach().float()
        if alone and node.kind == SEQUENCE:
            before = node.lists["bias"].view(bias.shape[1], -1).t()
            bias = torch.cat([bias[: len(bias) - len(before)], bias[-len(before) :] + before])
            x = node.inputs[0]
        return self.add(Node(SEQUENCE, (x,), lists={"bias": bias.t().flatten()}))

    def join(self, maps: list[int]) -> int | None:
        """Append one linear layer for several of one map; None where they are something else."""
        nodes = [self.nodes[x] for x in maps]
        first = nodes[0]
        for node in nodes:
            same = node.kind == PRODUCT and node.activation == NONE and len(node.inputs) == 1
            if not same or node.inputs != first.inputs or node.window != Window():
                return None
        lists = {
            name: torch.cat([node.lists[name] for node in nodes])
            for name in ("col", "values", "bias")
        }
        ends = [0]
        crow = [first.lists["crow"][:1]]
        for node in nodes:
            crow.append(node.lists["crow"][1:] + ends[-1])
            ends.append(ends[-1] + len(node.lists["col"]))
        lists["crow"] = torch.cat(crow)
        return self.add(Node(PRODUCT, first.inputs, lists=lists))

    def _open(self, x: int) -> bool:
        node = self.nodes[x]
        return node.activation == NONE and len(node.inputs) == 1

    def finish(self, inputs: list[int], outputs: list[int]) -> tuple[list[Node], list[int]]:
        """Return the inputs in this order and the nodes that an output needs, numbered anew."""
        needed = set(outputs)
        for i in reversed(range(len(self.nodes))):
            if i in needed:
                needed.update(self.nodes[i].inputs)
        kept = [*inputs, *sorted(needed - set(inputs))]
        number = {old: new for new, old in enumerate(kept)}
        nodes = [
            replace(self.nodes[i], inputs=tuple(number[x] for x in self.nodes[i].inputs))
            for i in kept
        ]
        if not outputs:
            raise UnsupportedError("freeze: the model returns no tensor")
        return nodes, [number[i] for i in outputs]
