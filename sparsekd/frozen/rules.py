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
from sparsekd.frozen.draft import Node, Window
from sparsekd.frozen.sequence import prepend, tokens
from sparsekd.frozen.values import Outside, Values, arguments, source

aten = torch.ops.aten


Rule = Callable[[Values, fx.Node], int]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _pair(value: Any) -> tuple[int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(number, int) for number in numbers) or len(numbers) not in (1, 2):
        raise Outside
    if max(numbers) > d.MOST_TAP:
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
    a, b = _operands(values, node)
    if node.kwargs.get("alpha", 1) != 1:
        raise Outside
    if isinstance(b, Tensor):
        shift = _per_channel(values, a, b)
        if shift is None:
            return _add_positions(values, a, b)
        return values.draft.affine(values.map(a), torch.ones_like(shift), shift, values.alone(a))
    if values.shape(a) != values.shape(b):
        raise Outside
    return values.draft.plus(
        values.map(a), values.map(b), (a is not b and values.alone(a), values.alone(b))
    )


def _operands(values: Values, node: fx.Node) -> tuple[fx.Node, fx.Node | Tensor]:
    """Return a map, and another or a constant that is added to it or that it is multiplied by.

    With a constant, the result has the shape of the map.
    """
    a, b = node.args
    found = [
        torch.tensor(float(x)) if isinstance(x, int | float) else values.constants.get(x, x)  # type: ignore[arg-type]
        for x in (a, b)
    ]
    if isinstance(found[0], Tensor):
        found.reverse()
    x, other = found
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node | Tensor):
        raise Outside
    if isinstance(other, Tensor) and values.shape(x) != values.shape(node):
        raise Outside
    return x, other


def _per_channel(values: Values, x: fx.Node, constant: Tensor) -> Tensor | None:
    """Return the number that a constant has for each channel, if that is all it has."""
    shape = values.shape(x)
    channels, after = (shape[0], 2) if len(shape) == 3 else (shape[-1], 0)
    if constant.numel() == 1:
        return constant.double().reshape(1).expand(channels)
    axis = constant.ndim - 1 - after
    if axis < 0 or constant.shape[axis] != channels or constant.numel() != channels:
        return None
    return constant.double().flatten()


def _add_positions(values: Values, x: fx.Node, constant: Tensor) -> int:
    shape = values.shape(x)
    if len(shape) != 2 or tuple(constant.shape) not in (shape, (1, *shape)):
        raise Outside
    return values.draft.sequence(values.map(x), constant.view(shape), values.alone(x))


@_rule(tokens)
def pixels_as_tokens(values: Values, node: fx.Node) -> int:
    x = source(node)
    return values.draft.sequence(values.map(x), torch.zeros(values.shape(node)), values.alone(x))


@_rule(prepend)
def class_tokens(values: Values, node: fx.Node) -> int:
    x = source(node)
    first = torch.cat([values.constant(part)[0] for part in node.args[1:]])
    constants = torch.cat([first, torch.zeros(values.shape(x))])
    if constants.shape != values.shape(node):
        raise Outside
    return values.draft.sequence(values.map(x), constants, values.alone(x))


@_rule(aten.select.int)
def first_token(values: Values, node: fx.Node) -> int:
    x = source(node)
    shape = values.shape(x)
    if len(shape) != 2 or arguments(node) != [1, 0]:
        raise Outside
    # A pool whose windows are one token wide, and one row of tokens apart.
    window = Window(stride=_pair([1, shape[0]]))
    return values.draft.add(Node(d.MAX_POOL, (values.map(x),), window=window))


@_rule(aten.mul.Tensor)
def multiply(values: Values, node: fx.Node) -> int:
    x, by = _operands(values, node)
    shape = values.shape(node)
    if isinstance(by, Tensor):
        scale = _per_channel(values, x, by)
        if scale is None:
            raise Outside
        return values.draft.affine(values.map(x), scale, torch.zeros_like(scale), values.alone(x))
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


@_rule(aten.slice.Tensor)
def all_of_it(values: Values, node: fx.Node) -> int:
    x = source(node)
    if values.shape(x) != values.shape(node) or arguments(node, 0, None, None, 1)[3] != 1:
        raise Outside
    return values.map(x)


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
