"""Averages of sparse models (EMA, SWA) whose topology moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sparsekd.errors import CheckpointError, ShapeError
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.nn.copies import in_step
from sparsekd.topology import Topology


class AveragedModel(swa_utils.AveragedModel):
    """torch's AveragedModel for models whose sparse layers may move their nonzeros.

    All arguments mean what they do in `torch.optim.swa_utils.AveragedModel`, whose code does the
    averaging. Each update first rewires the average to the model's topologies, whatever moved them.
    At every stored position the average then equals that of a dense model with zeros elsewhere: the
    average of a dropped position is kept beside the layer, decays towards 0, and returns when the
    model grows the position again; a position that was never stored starts at 0. So `avg_fn` must
    work entry by entry and map zeros to 0. Averages of dropped positions are stored until they are
    0, in the worst case as many as a dense model has.

    Index buffers are never averaged, not even with `use_buffers=True`.

    Args:
        model: is copied; dense layers are averaged as in torch.
        device: of the average.
        avg_fn: (average, new, number averaged) -> average.
        multi_avg_fn: the same in place, on lists.
        use_buffers: whether to average buffers too, those of BatchNorm for instance; if not, they
            are copied from the model.

    Example:
        >>> import sparsekd as skd
        >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
        >>> model = skd.nn.SparseLinear(8, 4, sparsity=0.5, bias=False, seed=0)
        >>> ema = skd.optim.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        >>> ema.update_parameters(model)
        >>> _ = model.rewire(~model.topology.mask())
        >>> ema.update_parameters(model)
        >>> ema.module.topology == model.topology, ema.module.values.abs().max().item()
        (True, 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        layers = [module for _, module in sparse_modules(self.module)]
        for layer in layers:
            layer.capturable = False  # no recorded graph knows the copy
        self.rests = nn.ModuleList(_Rest(layer) for layer in layers)
        self._seen: list[tuple[Topology, Topology]] = []

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the model as it is now.

        Args:
            model: of the same architecture as the average; its topologies may differ.

        Raises:
            ShapeError: it does not have the same layers and parameters; nothing has changed then.
        """
        averaged, current = (list(m.parameters()) for m in (self.module, model))
        if len(averaged) != len(current):
            raise ShapeError(
                f"model: expected {len(averaged)} parameters like the average, got {len(current)}"
            )
        self._follow(model)
        rests = [rest.values for rest in self._rests() if len(rest.values)]
        zeros = [torch.zeros_like(rest) for rest in rests]
        # Torch averages two bags of tensors: the indices are left out, the rests are put in.
        torchs = swa_utils.AveragedModel(
            _Bag(), avg_fn=self.avg_fn, multi_avg_fn=self.multi_avg_fn, use_buffers=self.use_buffers
        )
        torchs.module = _Bag([*averaged, *rests], _plain_buffers(self.module))
        torchs.n_averaged = self.n_averaged
        torchs.update_parameters(_Bag([*current, *zeros], _plain_buffers(model)))
        for _, layer in sparse_modules(self.module):
            in_step(layer)

    def _follow(self, model: nn.Module) -> None:
        """Rewire the average to the topologies of `model`."""
        pairs = self._pairs(model)
        now = [(theirs.topology, mine.topology) for theirs, mine in pairs]
        if len(now) == len(self._seen) and all(
            a is c and b is d for (a, b), (c, d) in zip(now, self._seen, strict=True)
        ):
            return
        first = bool(self.n_averaged == 0)
        for (theirs, mine), rest in zip(pairs, self._rests(), strict=True):
            mine._layout = theirs.layout
            if mine.topology != theirs.topology:
                rest.exchange(mine, theirs.topology.mask())
            if first:
                rest.clear()  # this update copies
        self._seen = [(theirs.topology, mine.topology) for theirs, mine in pairs]

    def _pairs(self, model: nn.Module) -> list[tuple[SparseModule, SparseModule]]:
        theirs, mine = ([m for _, m in sparse_modules(x)] for x in (model, self.module))
        shapes = [[m.weight_shape for m in modules] for modules in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                f"model: expected sparse layers of shapes {shapes[0]} like the average, "
                f"got {shapes[1]}; make the average after the model has become sparse"
            )
        return list(zip(theirs, mine, strict=True))

    def _rests(self) -> list[_Rest]:
        return [rest for rest in self.rests if isinstance(rest, _Rest)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": []}


class _Rest(nn.Module):
    """Averages at the positions of a layer that the model has dropped.

    Shape:
        - positions: int64 `[n]`, distinct, in the flat weight
        - values: `[n]`
    """

    positions: Tensor
    values: Tensor

    def __init__(self, layer: SparseModule) -> None:
        super().__init__()
        self._numel = layer.topology.numel
        values = layer.values.detach()
        self.register_buffer("positions", values.new_empty(0, dtype=torch.int64))
        self.register_buffer("values", values.new_empty(0))

    def clear(self) -> None:
        """Discard all averages."""
        self.positions, self.values = self.positions[:0], self.values[:0]

    def exchange(self, layer: SparseModule, mask: Tensor) -> None:
        """Rewire a layer: store the averages it drops, and return those it grows again."""
        before, kept = layer.topology.flat_indices(), layer.values.detach().clone()
        delta = layer.rewire(mask)
        positions = torch.cat([self.positions, before[delta.dropped]])
        values = torch.cat([self.values, kept[delta.dropped]])
        back = layer.topology.mask().view(-1)[positions]
        slots = torch.searchsorted(layer.topology.flat_indices(), positions[back])
        layer.values[slots] = values[back]
        stays = ~back & (values != 0)  # a 0 is what a position starts from
        self.positions, self.values = positions[stays], values[stays]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        positions, values = (state_dict.get(prefix + name) for name in ("positions", "values"))
        if positions is not None and values is not None:
            self._check(prefix, positions, values)
            n = len(positions)
            self.positions, self.values = self.positions.new_empty(n), self.values.new_empty(n)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check(self, prefix: str, positions: Tensor, values: Tensor) -> None:
        good = (
            positions.dtype == torch.int64
            and positions.ndim == 1
            and positions.shape == values.shape
            and (len(positions) == 0 or (positions.min() >= 0 and positions.max() < self._numel))
            and len(positions.unique()) == len(positions)
        )
        if not good:
            raise CheckpointError(
                f"{prefix}positions: expected different int64 numbers below {self._numel}, one per "
                f"entry of values {list(values.shape)}, got {positions.dtype} "
                f"{list(positions.shape)}"
            )


class _Bag(nn.Module):
    """A module that holds given tensors, as the input of torch's AveragedModel."""

    def __init__(self, parameters: Iterable[Tensor] = (), buffers: Iterable[Tensor] = ()) -> None:
        super().__init__()
        for i, tensor in enumerate(parameters):
            shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            self.register_parameter(f"p{i}", shared)
        for i, tensor in enumerate(buffers):
            self.register_buffer(f"b{i}", tensor)


def _plain_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model that are not indices of a sparse layer."""
    indices = {
        id(tensor) for _, m in sparse_modules(model) for tensor in (m.crow_indices, m.col_indices)
    }
    return [tensor for tensor in model.buffers() if id(tensor) not in indices]
