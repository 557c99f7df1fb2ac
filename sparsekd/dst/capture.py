"""The dense weight gradient of one iteration, formed only when asked for, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsekd.nn import SparseModule
from sparsekd.ops import growth, observe


@dataclass(frozen=True)
class _Held:
    """Hold a tensor that must not change; a copy where it might."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor, lasting: bool) -> _Held:
        tensor = tensor.detach() if lasting else tensor.detach().clone()
        return cls(tensor, tensor._version)

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "an operand of the weight gradient was modified in place after the backward pass; "
                "growth by gradient needs it until step() returns"
            )
        return self.tensor


@dataclass
class _Record:
    """Hold what one layer's gradient is made of."""

    operands: list[tuple[_Held, _Held, list[Any]]] = field(default_factory=list)
    earlier: Tensor | None = None
    backward_pass: int = -1

    @property
    def size(self) -> int:
        return sum(grad.tensor.numel() + x.tensor.numel() for grad, x, _ in self.operands)

    def blocks(self) -> Iterator[growth.Block]:
        operands = [(g.unchanged(), x.unchanged(), geometry) for g, x, geometry in self.operands]
        return growth.gradient(operands, self.earlier)

    def dense(self) -> Tensor:
        rows, *inner = self.operands[0][2][0]
        dense: Tensor | None = None
        for row, col, block in self.blocks():
            if dense is None:
                dense = block.new_empty(rows, math.prod(inner))
            dense[row : row + block.shape[0], col : col + block.shape[1]] = block
        return self.operands[0][0].tensor.new_empty(rows, 0) if dense is None else dense

    def fold(self) -> None:
        """Replace the operands by the gradient they make."""
        self.earlier = self.dense()
        self.operands.clear()


class GradientCapture:
    """Collect the operands of every weight gradient while it is on.

    The operands are seen where the weight gradient at the nonzeros is computed, so a layer that
    runs several times, several backward passes, checkpointing, autocast, padding modes and
    compiled models need no care; forwards without a backward leave nothing. What is held are the
    tensors themselves, which costs no memory at the peak of a backward pass: the activations that
    it frees on the way are as large. Compiled code reuses its buffers, so there copies are held,
    and also of tensors that no operation made, such as the model's input.

    The gradient comes tile by tile, each the sum over all calls of the layer. Only where several
    backward passes add up (gradient accumulation) and their operands together would be larger than
    a dense gradient is one stored: that of all passes but the last.

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
        return self._records.pop(name).dense()

    def blocks(self, name: str) -> Iterator[growth.Block]:
        """Yield that gradient in rectangles, each overwritten by the next; forget its operands."""
        return self._records.pop(name).blocks()

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Hold the operands of a weight gradient, if it is that of a watched layer."""
        seen = observe.weight_gradient(self._modules, op, args)
        if seen is None:
            return
        name, current, grad, x, geometry = seen
        record = self._records.setdefault(name, _Record())
        if record.backward_pass != current:
            if self._modules[name].values.grad is None:
                record = self._records[name] = _Record()  # gradients were zeroed: start afresh
            elif record.size > math.prod(geometry[0]):
                record.fold()  # gradient accumulation: the sum is smaller than its parts
            record.backward_pass = current
        lasting = observe.lasting()
        made = x.grad_fn is not None  # or else it may be a buffer that its owner fills anew
        record.operands.append((_Held.of(grad, lasting), _Held.of(x, lasting and made), geometry))
