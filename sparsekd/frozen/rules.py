"""What each operator of an exported model becomes in a frozen network.

A rule gets the draft and the operator's node in torch's graph and returns the number of the node it
appended. It raises `Outside` where the compiled network cannot compute what the operator does; the
operator then runs in torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsekd import _torch
from sparsekd.frozen import draft as d
from sparsekd.frozen.attention import attention, packed_attention
from sparsekd.frozen.draft import Draft, Node, Window

aten = torch.ops.aten


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


Rule = Callable[[Values, fx.Node], int]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


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


def _pair(value: Any) -> tuple[int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(number, int) for number in numbers) or len(numbers) not in (1, 2):
        raise Outside
    return numbers[0], numbers[-1]


@_rule(torch.ops.sparsekd.conv2d.default)
def sparse_convolution(values: Values, node: fx.Node) -> int:
    weight, crow, col, bias, shape, stride, sides, dilation, groups = arguments(node)
    top, bottom, left, right = sides
    if top != bottom or left != right:
        raise Outside
    lists = values.lists(crow, col, weight)
    window = Window(_pair(shape[2:]), _pair(stride), (top, left), _pair(dilation), groups)
    return values.draft.product(values.map(node.args[0]), lists, values.optional(bias), window)


@_rule(aten.conv2d.default)
def dense_convolution(values: Values, node: fx.Node) -> int:
    weight, bias, stride, padding, dilation, groups = arguments(node, None, None, 1, 0, 1, 1)
    kernel = values.constant(weight)
    window = Window(
        *(_pair(kernel.shape[2:]), _pair(stride), _pair(padding), _pair(dilation)), groups
    )
    lists = d.csr(kernel.flatten(1))
    return values.draft.product(values.map(node.args[0]), lists, values.optional(bias), window)


@_rule(torch.ops.sparsekd.linear.default)
def sparse_linear(values: Values, node: fx.Node) -> int:
    weight, crow, col, bias, _ = arguments(node)
    lists = values.lists(crow, col, weight)
    return _linear(values, node, lists, bias)


@_rule(aten.linear.default)
def dense_linear(values: Values, node: fx.Node) -> int:
    weight, bias = arguments(node, None, None)
    return _linear(values, node, d.csr(values.constant(weight)), bias)


def _linear(values: Values, node: fx.Node, lists: tuple[Tensor, Tensor, Tensor], bias: Any) -> int:
    if len(values.shape(node)) > 2:  # the last axis of a map, which is no channel
        raise Outside
    return values.draft.product(values.map(node.args[0]), lists, values.optional(bias), Window())


@_rule(_torch.FROZEN_BATCH_NORM)
def batch_norm(values: Values, node: fx.Node) -> int:
    weight, bias, mean, variance, _, eps = arguments(node)
    x = source(node)
    if len(values.shape(x)) == 2:  # [batch, channels, length]
        raise Outside
    scale = (values.constant(variance).double() + eps).rsqrt()
    if weight is not None:
        scale = scale * values.constant(weight).double()
    shift = -values.constant(mean).double() * scale
    if bias is not None:
        shift = shift + values.constant(bias).double()
    return values.draft.affine(values.map(x), scale, shift, values.alone(x))


@_rule(operator.getitem)
def first_result(values: Values, node: fx.Node) -> int:
    source, index = node.args
    if index != 0 or not isinstance(source, fx.Node) or source not in values.maps:
        raise Outside
    return values.maps[source]


def _activation(number: int) -> Rule:
    def rule(values: Values, node: fx.Node) -> int:
        x = source(node)
        if arguments(node):
            raise Outside
        return values.draft.activate(values.map(x), number, values.alone(x))

    return rule


RULES[aten.relu.default] = _activation(d.RELU)
RULES[aten.relu6.default] = _activation(d.RELU6)
RULES[aten.silu.default] = _activation(d.SILU)
RULES[aten.hardswish.default] = _activation(d.HARDSWISH)
RULES[aten.sigmoid.default] = _activation(d.SIGMOID)
RULES[aten.hardsigmoid.default] = _activation(d.HARDSIGMOID)


@_rule(aten.gelu.default)
def gelu(values: Values, node: fx.Node) -> int:
    if node.kwargs.get("approximate", "none") != "none":
        raise Outside
    x = source(node)
    return values.draft.activate(values.map(x), d.GELU, values.alone(x))


@_rule(aten.hardtanh.default, aten.clamp.default)
def relu6(values: Values, node: fx.Node) -> int:
    if arguments(node) != [0.0, 6.0]:
        raise Outside
    x = source(node)
    return values.draft.activate(values.map(x), d.RELU6, values.alone(x))


@_rule(aten.add.Tensor)
def add(values: Values, node: fx.Node) -> int:
    a, b = node.args
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        raise Outside
    if values.shape(a) != values.shape(b):
        raise Outside
    return values.draft.plus(
        values.map(a), values.map(b), (a is not b and values.alone(a), values.alone(b))
    )


@_rule(aten.mul.Tensor)
def gate(values: Values, node: fx.Node) -> int:
    x, by = node.args
    if not isinstance(x, fx.Node) or not isinstance(by, fx.Node):
        raise Outside
    shape = values.shape(node)
    if values.shape(x) != shape:
        x, by = by, x
    if values.shape(x) != shape or len(shape) != 3 or values.shape(by) != (shape[0], 1, 1):
        raise Outside
    return values.draft.add(Node(d.GATE, (values.map(x), values.map(by))))


@_rule(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def max_pool(values: Values, node: fx.Node) -> int:
    kernel, stride, padding, dilation, ceil = arguments(node, None, [], 0, 1, False)
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
    return _pool(values, node, window, ceil, d.MAX_POOL)


@_rule(aten.avg_pool2d.default)
def average_pool(values: Values, node: fx.Node) -> int:
    kernel, stride, padding, ceil, count_padding, divisor = arguments(
        node, None, [], 0, False, True, None
    )
    if divisor is not None:
        raise Outside
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
    return _pool(values, node, window, ceil, d.MEAN_POOL, count_padding)


def _pool(
    values: Values, node: fx.Node, window: Window, ceil: bool, kind: int, count: bool = True
) -> int:
    x = source(node)
    shape = values.shape(x)
    if len(shape) != 3:
        raise Outside
    if ceil:  # the same if the last window ends with the map
        for size, k, s, p in zip(
            shape[1:], window.kernel, window.stride, window.padding, strict=True
        ):
            if (size + 2 * p - k) % s:
                raise Outside
    return values.draft.add(Node(kind, (values.map(x),), window=window, count_padding=count))


@_rule(aten.adaptive_avg_pool2d.default)
def global_mean(values: Values, node: fx.Node) -> int:
    if _pair(arguments(node)[0]) != (1, 1):
        raise Outside
    return _mean(values, node)


@_rule(aten.mean.dim)
def mean(values: Values, node: fx.Node) -> int:
    axes = node.args[1]
    if len(values.shape(source(node))) != 3 or not isinstance(axes, list | tuple):
        raise Outside
    if sorted(axis % 4 if isinstance(axis, int) else -1 for axis in axes) != [2, 3]:
        raise Outside
    return _mean(values, node)


def _mean(values: Values, node: fx.Node) -> int:
    x = source(node)
    if len(values.shape(x)) != 3:
        raise Outside
    every = Window((0, 0), (1, 1), (0, 0), (1, 1))
    return values.draft.add(Node(d.MEAN_POOL, (values.map(x),), window=every))


@_rule(
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.squeeze.dims, aten.unsqueeze.default),
)
def reshape(values: Values, node: fx.Node) -> int:
    x = source(node)
    before, after = values.shape(x), values.shape(node)
    if before == after or (
        values.form(x)[1] == values.form(node)[1] and 2 not in map(len, (before, after))
    ):
        return values.map(x)
    if len(before) == 3 and len(after) == 1:
        return values.draft.add(Node(d.FLATTEN, (values.map(x),)))
    raise Outside


@_rule(aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default)
def same(values: Values, node: fx.Node) -> int:
    if node.target is aten.dropout.default and arguments(node)[1]:
        raise Outside
    return values.map(node.args[0])


@_rule(aten.native_layer_norm.default, aten.layer_norm.default)
def layer_norm(values: Values, node: fx.Node) -> int:
    sizes, weight, bias, eps = arguments(node, None, None, 1e-5)[:4]
    x = source(node)
    shape = values.shape(x)
    if len(shape) > 2 or list(sizes) != list(shape[-1:]):
        raise Outside
    scale, shift = values.optional(weight), values.optional(bias)
    return values.draft.layer_norm(values.map(x), shape[-1], scale, shift, eps)


@_rule(packed_attention)
def attention_of_one(values: Values, node: fx.Node) -> int:
    return _attention(values, values.map(source(node)), *node.args[1:])


@_rule(attention)
def attention_of_three(values: Values, node: fx.Node) -> int:
    *parts, heads, mask = node.args
    if len({values.shape(part) for part in parts if isinstance(part, fx.Node)}) != 1:
        raise Outside
    maps = [values.map(part) for part in parts]
    joined = values.draft.join(maps)
    if joined is None or not all(values.alone(part) for part in parts if isinstance(part, fx.Node)):
        raise Outside
    return _attention(values, joined, heads, mask)


def _attention(values: Values, qkv: int, heads: Any, mask: Any) -> int:
    inputs = (qkv,) if mask is None else (qkv, values.map(mask))
    return values.draft.add(Node(d.ATTENTION, inputs, window=Window(groups=heads)))
