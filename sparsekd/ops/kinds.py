"""Kinds of work: operands that take an op equally long, so that one measurement serves them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekd.ops.checks import conv2d_shape, geometry
from sparsekd.ops.layout import memory_format_of


def density_step(density: float) -> int:
    """Return a number that densities within 5 % of each other share."""
    return round(math.log(density) / math.log(1.05))


def products(op: str, args: tuple[Any, ...]) -> int:
    """Return how many multiplications an op on these operands takes with a dense weight."""
    weight_shape, *conv = geometry(op, args)
    if not conv:
        return args[0].numel() // max(args[0].shape[-1], 1) * math.prod(weight_shape)
    n, _, high, wide = conv2d_shape(_input_shape(op, args), weight_shape, *conv)
    return n * high * wide * math.prod(weight_shape)


def describe(op: str, args: tuple[Any, ...], tile: tuple[int, int], *facts: str) -> str:
    """Return all that the time of an op depends on but the density, in words.

    The rows of a linear layer's input count within 5 %: their number may change with every batch.

    Args:
        op: its name.
        args: those of its schema.
        tile: output times input channels of the tiles that the weight consists of.
        facts: what else its time depends on.
    """
    weight_shape, *conv = geometry(op, args)
    first, second = args[:2]
    words = [op, str(first.dtype).removeprefix("torch."), *facts, f"weight={_times(weight_shape)}"]
    if tile != (1, 1):
        words.append(f"tiles={_times(tile)}")
    if not conv:
        rows = first.numel() // max(first.shape[-1], 1)
        return " ".join([*words, f"rows=1.05^{density_step(rows)}"])
    words.append(f"input={_times(_input_shape(op, args))}")
    names = ("stride", "padding", "dilation")
    words += [f"{name}={_times(sizes)}" for name, sizes in zip(names, conv, strict=False)]
    words += [f"groups={conv[3]}", _layout(first)]
    return " ".join([*words, _layout(second)] if op == "conv2d_wgrad" else words)


def _input_shape(op: str, args: tuple[Any, ...]) -> Sequence[int]:
    if op == "conv2d_dgrad":
        return args[4]
    return args[1 if op == "conv2d_wgrad" else 0].shape


def _layout(maps: Tensor) -> str:
    if memory_format_of(maps) == torch.channels_last:
        return "channels_last"
    return "contiguous" if maps.is_contiguous() else "strided"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
