"""Operations of the ops that `torch.utils.flop_counter` has no formula for, from their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from sparsekd._torch import ATTENTION_OPS, CUDNN_RNN_OP, TRILINEAR_OP

Shape = Sequence[int]

aten = torch.ops.aten


def _mv(matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _addmv(start: Shape, matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _dot(first: Shape, second: Shape, **_: Any) -> int:
    return 2 * prod(first)


def _addbmm(start: Shape, first: Shape, second: Shape, **_: Any) -> int:
    return 2 * prod(first) * second[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count query x key and weights x value, masked positions included, as torch does."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _trilinear(first: Shape, weight: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(weight) * first[0]


def _recurrent(x: Shape, *weights: Any, **_: Any) -> int:
    """Count every matrix once per step and sequence, those of all layers and directions."""
    positions = prod(x[:-1])
    return 2 * positions * sum(prod(w) for w in weights if len(w) == 2)


def _onednn_layer(x: Shape, *args: Any, **_: Any) -> int:
    return _recurrent(x, *args[:4])


def _cudnn_layers(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _recurrent(x, *weights)


_NAMES: dict[str, Callable[..., int]] = {
    "mv": _mv,
    "addmv": _addmv,
    "dot": _dot,
    "vdot": _dot,
    "addbmm": _addbmm,
    **dict.fromkeys(ATTENTION_OPS, _attention),
    TRILINEAR_OP: _trilinear,
    "mkldnn_rnn_layer": _onednn_layer,
    CUDNN_RNN_OP: _cudnn_layers,
    "miopen_rnn": _cudnn_layers,
}
FORMULAS = {getattr(aten, name): f for name, f in _NAMES.items() if hasattr(aten, name)}
RECURRENT = ("aten::mkldnn_rnn_layer", f"aten::{CUDNN_RNN_OP}", "aten::miopen_rnn")
"""Ops that multiply by all matrices among their operands, where others have one."""
