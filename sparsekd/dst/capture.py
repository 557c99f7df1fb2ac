"""The dense weight gradient of one iteration, formed only when asked for, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from sparsekd.nn import SparseModule
from sparsekd.ops import observe

Geometry = list[Any]
"""What follows the structure in the op's schema: weight_shape, and for conv stride, padding, ..."""


@dataclass
class _Record:
    """Hold what one layer's gradient is made of."""

    operands: list[tuple[Tensor, Tensor, Geometry]] = field(default_factory=list)
    earlier: Tensor | None = None
    backward_pass: int = -1

    @property
    def size(self) -> int:
        return sum(grad.numel() + x.numel() for grad, x, _ in self.operands)

    def fold(self) -> None:
        """Replace the operands by the gradient they make."""
        for operands in self.operands:
            part = dense_gradient(*operands)
            self.earlier = part if self.earlier is None else self.earlier.add_(part)
        self.operands.clear()


class GradientCapture:
    """Collect the operands of every weight gradient while it is on.

    The operands are seen where the weight gradient at the nonzeros is computed, so a layer that
    runs several times, several backward passes, checkpointing, autocast, padding modes and
    compiled models need no care; forwards without a backward leave nothing. It holds copies:
    compiled code reuses its buffers.

    Args:
        modules: the sparse modules to watch, by name.
    """

    def __init__(self, modules: Mapping[str, SparseModule]) -> None:
        self._modules = modules
        self._records: dict[str, _Record] = {}

    def switch(self, on: bool) -> None:
        """Forget everything and start, or stop, collecting."""
        self._records.clear()
        (observe.listeners.add if on else observe.listeners.discard)(self)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __len__(self) -> int:
        return len(self._records)

    def take(self, name: str) -> Tensor:
        """Return the dense gradient of layer `name`, `[rows, cols]`, and forget its operands."""
        record = self._records.pop(name)
        record.fold()
        assert record.earlier is not None
        return record.earlier

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Copy the operands of a weight gradient, if it is that of a watched layer."""
        if op not in ("conv2d_wgrad", "linear_wgrad"):
            return
        grad, x, crow, _, *geometry = args
        name, current = self._owner(crow), torch._C._current_graph_task_id()
        if name is None or current == -1:  # -1: a call of the op outside any backward pass
            return
        record = self._records.setdefault(name, _Record())
        if record.backward_pass != current:
            if self._modules[name].values.grad is None:
                record = self._records[name] = _Record()  # gradients were zeroed: start afresh
            elif record.size > math.prod(geometry[0]):
                record.fold()  # gradient accumulation: the sum is smaller than its parts
            record.backward_pass = current
        record.operands.append((grad.detach().clone(), x.detach().clone(), geometry))

    def _owner(self, crow: Tensor) -> str | None:
        for name, module in self._modules.items():
            if module.crow_indices.data_ptr() == crow.data_ptr():
                return name
        return None


def dense_gradient(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of every weight, zero ones included, in float32 or better.

    Args:
        grad: gradient of the layer's output.
        x: its input, as the op saw it.
        geometry: what follows the structure in the schema of the weight-gradient op.

    Shape:
        - result: `[rows, cols]`, like the topology
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad, x = grad.to(dtype), x.to(dtype)
    weight_shape, *conv = geometry
    if not conv:
        rows, cols = weight_shape
        return grad.reshape(-1, rows).T @ x.reshape(-1, cols)
    stride, (top, bottom, left, right), dilation, groups = conv
    padding = (top, left)
    if padding != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    weight = conv2d_weight(x, weight_shape, grad, stride, padding, dilation, groups)
    return weight.reshape(weight_shape[0], -1)
