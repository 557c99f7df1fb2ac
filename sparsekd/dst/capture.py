"""The dense weight gradient of one iteration, formed only when asked for, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd.dst.entries import Entries
from sparsekd.dst.passes import Passes
from sparsekd.nn import SparseModule
from sparsekd.ops import growth, observe
from sparsekd.topology import Topology


@dataclass(frozen=True)
class _Held:
    """A tensor that must not change; a copy where it might."""

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


def describe_foreign(who: str, layers: Iterable[str]) -> str:
    """Return what to tell about layers whose `.grad` something else than backward has written."""
    names = ", ".join(f"{name}.values" if name else "values" for name in layers)
    return (
        f"{who}: .grad of {names} is not what the backward passes since it was last zeroed add up "
        "to, nor a multiple of it; where nothing is stored only their sum is known, and growth "
        "goes by that. Combine losses instead of gradients, or let backward() write .grad last"
    )


_Operands = tuple[_Held, _Held, list[Any]]


class _Record:
    """What one layer's gradient is made of: that of the passes which `values.grad` adds up."""

    def __init__(self, module: SparseModule) -> None:
        self.rows, self.numel = module.weight_shape[0], math.prod(module.weight_shape)
        self.passes: Passes[_Operands | Tensor] = Passes(module.values, self._commit)
        self.operands: list[_Operands] = []
        self.earlier: Tensor | None = None

    @property
    def empty(self) -> bool:
        return not self.operands and self.earlier is None

    @property
    def size(self) -> int:
        return sum(grad.tensor.numel() + x.tensor.numel() for grad, x, _ in self.operands)

    def begin(self, backward_pass: int) -> None:
        """Make ready for the first operands of a pass, if these are."""
        if not self.passes.known(backward_pass):
            self.follow()
            if self.size > self.numel:
                self.fold()  # gradient accumulation: the sum is smaller than its parts

    def follow(self) -> None:
        """Do to what has been added up what was done to `values.grad`."""
        factor = self.passes.follow()
        if factor == 0.0:
            self.operands.clear()
            self.earlier = None
        elif factor != 1.0 and not self.empty:
            self.fold()
            assert self.earlier is not None
            self.earlier.mul_(factor)

    def blocks(self) -> Iterator[growth.Block]:
        if not self.operands:
            if self.earlier is not None:
                yield 0, 0, self.earlier
            return
        operands = [(g.unchanged(), x.unchanged(), geometry) for g, x, geometry in self.operands]
        yield from growth.gradient(operands, self.earlier)

    def dense(self) -> Tensor:
        if not self.operands and self.earlier is not None:
            return self.earlier
        dense: Tensor | None = None
        for row, col, block in self.blocks():
            if dense is None:
                dense = block.new_empty(self.rows, self.numel // max(self.rows, 1))
            dense[row : row + block.shape[0], col : col + block.shape[1]] = block
        return self.operands[0][0].tensor.new_empty(self.rows, 0) if dense is None else dense

    def entries(self, topology: Topology) -> Tensor:
        """Return the entries of the gradient at the nonzeros."""
        crow, col = topology.crow_indices, topology.col_indices
        kind = torch.promote_types(self.passes.values.dtype, torch.float32)
        sums = torch.zeros(topology.nnz, dtype=kind, device=col.device)
        if self.earlier is not None:
            sums += self.earlier.reshape(-1)[topology.flat_indices()]
        for grad, x, geometry in self.operands:
            op = "conv2d_wgrad" if geometry[1:] else "linear_wgrad"
            operands = grad.unchanged(), x.unchanged()
            sums += getattr(torch.ops.sparsekd, op)(*operands, crow, col, *geometry)
        return sums

    def fold(self) -> None:
        """Replace the operands by the gradient they make."""
        self.earlier = self.dense()
        self.operands.clear()

    def _commit(self, parts: list[_Operands | Tensor]) -> None:
        for part in parts:
            if isinstance(part, tuple):
                self.operands.append(part)
                continue
            dense = part.reshape(self.rows, -1)
            dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
            self.earlier = dense.clone() if self.earlier is None else self.earlier + dense


class GradientCapture:
    """Collect the operands of every weight gradient while it is on.

    The operands are seen where the weight gradient at the nonzeros is computed, so a layer that
    runs several times, several backward passes, checkpointing, autocast, padding modes and
    compiled models need no care; forwards without a backward leave nothing. What is held are the
    tensors themselves, which costs no memory at the peak of a backward pass: the activations that
    it frees on the way are as large. Compiled code reuses its buffers, so there copies are held,
    and also of tensors that no operation made, such as the model's input.

    A pass counts once it has accumulated into `values.grad`, and until that is zeroed; see
    `Passes`. The gradient comes tile by tile, each the sum over all calls of the layer. Only where
    several backward passes add up (gradient accumulation) and their operands together would be
    larger than a dense gradient is one stored: that of all passes but the last.

    Args:
        modules: the sparse modules to watch, by name.
    """

    def __init__(self, modules: Mapping[str, SparseModule]) -> None:
        self._modules = modules
        self._records: dict[str, _Record] = {}
        self._taken: set[str] = set()
        self._on = False

    def switch(self, on: bool) -> None:
        """Forget everything and start, or stop, collecting."""
        for record in self._records.values():
            record.passes.close()
        self._records.clear()
        self._taken.clear()
        self._on = on
        (observe.listeners.add if on else observe.listeners.discard)(self)

    def __contains__(self, name: str) -> bool:
        return name in self._records and not self._records[name].empty

    def __len__(self) -> int:
        return sum(name in self for name in self._records)

    def settle(self) -> list[str]:
        """Follow what the loop has done to `.grad` since the last backward pass.

        Returns:
            The layers whose `.grad` is not what backward passes have added up in this iteration,
            times one number.
        """
        for record in self._records.values():
            record.passes.close()
            record.follow()
        if not self._on:
            return []
        return [name for name, module in self._modules.items() if self._is_foreign(name, module)]

    def take(self, name: str) -> tuple[Tensor, Entries]:
        """Return the dense gradient of layer `name`, `[rows, cols]`, and forget its operands.

        Under `torch.distributed` it is that of this process; the entries, which are to be written
        into it, are averaged.
        """
        record = self._pop(name)
        record.fold()
        assert record.earlier is not None
        return record.earlier, self._entries(name, record)

    def blocks(self, name: str) -> tuple[Iterator[growth.Block], Entries]:
        """Return that gradient in rectangles, each overwritten by the next, and its entries."""
        record = self._pop(name)
        return record.blocks(), self._entries(name, record)

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Hold the operands of a weight gradient, if it is that of a watched layer."""
        seen = observe.weight_gradient(self._modules, op, args)
        if seen is None:
            return
        name, current, grad, x, geometry = seen
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = _Record(self._modules[name])
        record.begin(current)
        if x is None:
            record.passes.add(current, grad.detach().clone())
            return
        lasting = observe.lasting()
        made = x.grad_fn is not None  # or else it may be a buffer that its owner fills anew
        part = _Held.of(grad, lasting), _Held.of(x, lasting and made), geometry
        record.passes.add(current, part)

    def _is_foreign(self, name: str, module: SparseModule) -> bool:
        record, grad = self._records.get(name), module.values.grad
        if record is not None:
            return record.passes.foreign
        return grad is not None and name not in self._taken and bool(grad.any())

    def _pop(self, name: str) -> _Record:
        record = self._records.pop(name)
        record.passes.close()
        record.follow()
        if record.empty:
            raise KeyError(name)
        self._taken.add(name)
        return record

    def _entries(self, name: str, record: _Record) -> Entries:
        module = self._modules[name]
        grad, left = module.values.grad, record.passes.left
        assert grad is not None  # or else the record would be empty
        assert left is not None
        return Entries(module.topology, grad, left, record.entries(module.topology))
