"""The dense gradient that growth ranks: formed when asked for, one layer at a time.

A layer's backward computes the weight gradient at the nonzeros only. Growth also ranks the entries
where nothing is stored, so the operands of that product, the gradient of the output and the input,
are held until the update and multiplied then, tile by tile. Which products count is decided by
`values.grad`: those of the backward passes that it adds up (`Passes`), times whatever hooks and
other ranks have made of it since (`_Nonzeros`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd._torch import version_of
from sparsekd.csr import row_indices
from sparsekd.dst import replicas
from sparsekd.dst.passes import Passes
from sparsekd.nn import SparseModule
from sparsekd.ops import growth, observe
from sparsekd.topology import Topology

AGREE = 2.0**-7
"""Relative error below which gradients of several ranks count as their mean: the error of half
precision, to which communication hooks compress."""

FEW = 8
"""Entries below which two gradients may be multiples of each other by chance."""


class NonFiniteGradient(ArithmeticError):
    """A gradient with NaN or infinity, by which no position can be ranked."""


@dataclass(frozen=True)
class _Held:
    """An operand that must stay as it is until the update; a copy where it might not."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor, lasting: bool) -> _Held:
        tensor = tensor.detach() if lasting else tensor.detach().clone()
        return cls(tensor, version_of(tensor))

    def unchanged(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "an operand of the weight gradient was modified in place after the backward pass; "
                "growth by gradient needs it until step() returns"
            )
        return self.tensor


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


class _Nonzeros:
    """What a dense gradient has to be at the nonzeros: the gradient of a layer's values.

    Besides what the loop does to `.grad`, which `Passes` follows, a hook of the values may have
    scaled what the passes added to it. A term that depends on the values alone, such as weight
    decay in the loss, adds to the entries and leaves the rest of the gradient as it is. Under
    `torch.distributed` the collective that averages all of it is part of making this.

    Args:
        topology: of the layer.
        grad: of its values.
        left: what the backward passes of this process have left in it.
        added: the entries of the gradient that is made of their operands.
    """

    def __init__(self, topology: Topology, grad: Tensor, left: Tensor, added: Tensor) -> None:
        self._row = row_indices(topology.crow_indices, topology.nnz)
        self._col = topology.col_indices.long()
        self.values, self.foreign = grad.detach(), False
        if replicas.several():
            everything = torch.stack([t.detach().double() for t in (grad, left, added)])
            self.values, left, added = replicas.mean_(everything)
            self.foreign = _factor(self.values, left) is None
        factor = _factor(self.values, added) if topology.nnz >= FEW else None
        if factor is None and replicas.several():
            factor = _factor(self.values, left)
        self.factor = 1.0 if factor is None or abs(factor - 1) <= AGREE else factor

    def write_into(self, row: int, col: int, block: Tensor) -> None:
        """Bring a rectangle of the gradient that the passes have added up to what `.grad` says."""
        if self.factor != 1.0:
            block.mul_(self.factor)
        rows, cols = self._row - row, self._col - col
        inside = (rows >= 0) & (rows < block.shape[0]) & (cols >= 0) & (cols < block.shape[1])
        block[rows[inside], cols[inside]] = self.values[inside].to(block.dtype)


class DenseGradients:
    """Dense gradients of sparse layers, made of the operands that backward passes leave.

    Operands are taken where the weight gradient at the nonzeros is computed, so a layer that runs
    several times, several backward passes, checkpointing, autocast, padding modes and compiled
    models need no care; a forward without a backward leaves nothing. The tensors themselves are
    held, which costs no memory at the peak of a backward pass: the activations that it frees on the
    way are as large. Compiled code reuses its buffers, so its operands are copied, and so are
    tensors that no operation made, such as the model's input.

    A pass counts after it has accumulated into `values.grad`, and until that is zeroed; see
    `Passes`. The gradient comes tile by tile, each the sum over all calls of the layer. A dense
    gradient is stored only where several backward passes add up (gradient accumulation) and their
    operands together would be larger: that of all passes but the last.

    Args:
        modules: the sparse modules to watch, by name.
    """

    def __init__(self, modules: Mapping[str, SparseModule]) -> None:
        self._modules = modules
        self._records: dict[str, _Record] = {}
        self._taken: set[str] = set()
        self._on = False
        self.foreign: dict[str, None] = {}
        """Layers whose `.grad` holds what no backward pass has written."""

    @property
    def watched(self) -> Mapping[str, SparseModule]:
        """The layers whose gradients these are, by name."""
        return self._modules

    def switch(self, on: bool) -> None:
        """Forget all operands, and start or stop collecting them."""
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

    def settle(self) -> None:
        """Follow what the loop has done to `.grad` since the last backward pass."""
        for record in self._records.values():
            record.passes.close()
            record.follow()
        if self._on:
            for name, module in self._modules.items():
                if module.values.requires_grad and self._is_foreign(name, module):
                    self.foreign[name] = None

    def warn_of_foreign(self, who: str) -> None:
        """Return, and clear, the layers whose `.grad` backward passes alone do not explain."""
        if not self.foreign:
            return
        names = ", ".join(f"{name}.values" if name else "values" for name in self.foreign)
        self.foreign.clear()
        message = (
            f"{who}: .grad of {names} is not what the backward passes since it was last zeroed add "
            "up to, nor a multiple of it; where nothing is stored only their sum is known, and "
            "growth goes by that. Combine losses instead of gradients, or let backward() write "
            ".grad last"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def take(self, name: str) -> Tensor:
        """Return the gradient of layer `name`, the mean over all ranks, and forget its operands.

        Shape:
            `[rows, columns]`

        Raises:
            NonFiniteGradient: an entry is NaN or infinite.
        """
        record = self._pop(name)
        record.fold()
        assert record.earlier is not None
        self._complete(name, (0, 0, record.earlier), self._nonzeros(name, record))
        return record.earlier

    def blocks(self, name: str) -> Iterator[growth.Block]:
        """Yield that gradient in rectangles, each overwritten by the next."""
        record = self._pop(name)
        nonzeros = self._nonzeros(name, record)
        for block in record.blocks():
            self._complete(name, block, nonzeros)
            yield block

    def on_call(self, op: str, args: tuple[Any, ...]) -> None:
        """Keep the operands of a weight gradient, if it is that of a watched layer."""
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

    def _nonzeros(self, name: str, record: _Record) -> _Nonzeros:
        module = self._modules[name]
        grad, left = module.values.grad, record.passes.left
        assert grad is not None  # or else the record would be empty
        assert left is not None
        return _Nonzeros(module.topology, grad, left, record.entries(module.topology))

    def _complete(self, name: str, block: growth.Block, nonzeros: _Nonzeros) -> None:
        """Average a rectangle of the gradient over all ranks, and put in what `.grad` holds."""
        row, col, numbers = block
        if not is_finite(replicas.mean_(numbers)) or not is_finite(nonzeros.values):
            raise NonFiniteGradient(f"the dense gradient of {name} is not finite")
        nonzeros.write_into(row, col, numbers)
        if nonzeros.foreign:
            self.foreign[name] = None


def _factor(grad: Tensor, of: Tensor) -> float | None:
    """Return the factor from one gradient to another, None where it is no multiple of it."""
    grad, of = grad.double(), of.double()
    length = float(of.norm())
    if not length:
        return None if bool(grad.any()) else 1.0
    factor = float(torch.dot(grad / length, of / length))
    near = float((grad - factor * of).norm()) <= AGREE * float(grad.norm())
    return factor if near and factor else None


def check_finite(model: nn.Module) -> None:
    """Raise NonFiniteGradient, naming the parameter, where a gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            raise NonFiniteGradient(f"the gradient of {name} is not finite")


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number is finite; of a sparse tensor, every number that it stores."""
    if tensor.layout != torch.strided:  # the gradient of an embedding
        tensor = (tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor).values()
    # A finite sum has finite terms and is found faster; an infinite one may have overflowed.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
