"""Modules that keep the weights of several linear layers in one parameter, split into these layers.

A split module computes what the packed one does, but calls an nn.Linear for each weight. So all
that is known of linear layers, to be sparse above all, holds for the parts of packed weights.
Until `sparsify` puts a split module in the place of the packed one, its layers are views of the
packed parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sparsekd._torch import emptied, registered

_Split = TypeVar("_Split", bound="SplitModule")


class Place(NamedTuple):
    """Where a packed module keeps a weight or bias of one of its layers.

    Args:
        path: of the packed parameter.
        index: of the layer's part of it; `...` is all of it.
        turned: whether it is a weight stored as [in, out].
    """

    path: str
    index: Any = ...
    turned: bool = False

    def of(self, packed: Tensor) -> Tensor:
        """Return the layer's part, a weight as [out, in], as a view."""
        part = packed[self.index]
        return part.t() if self.turned else part


class Part(NamedTuple):
    """A linear layer of a split module.

    Args:
        layer: path of the layer.
        weight: where the packed module keeps its weight.
        bias: where it keeps its bias; None without one.
    """

    layer: str
    weight: Place
    bias: Place | None

    @property
    def places(self) -> Iterator[tuple[str, Place]]:
        """Yield the places by the names of the layer's parameters."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias


class SplitModule(nn.Module):
    """A module with linear layers in place of packed weights.

    A dense checkpoint of the packed module loads, and `pack` makes such a module again.
    """

    parts: tuple[Part, ...]
    """The layers, and where the packed module keeps their weights."""

    _shapes: dict[str, torch.Size]  # of the packed parameters
    _empty: tuple[nn.Module]  # the packed module without tensors, out of sight of nn.Module

    @classmethod
    def of(cls: type[_Split], dense: nn.Module, parts: Sequence[Part]) -> _Split:
        """Split a module; its layers are views, and everything else is shared.

        Args:
            dense: the packed module; it is left as it is.
            parts: its layers.
        """
        new = emptied(dense, cls)
        packed = dict(dense.named_parameters(remove_duplicate=False))
        new.parts = tuple(parts)
        new._shapes = {p.path: packed[p.path].shape for part in parts for _, p in part.places}
        new._empty = (_without_tensors(dense),)
        for table, own in zip(registered(new), registered(dense), strict=True):
            table.update({n: own[n] for n in own if n not in new._shapes and n not in new._roots})
        for part in parts:
            _put(new, part.layer, _layer(part, packed))
        return new

    @property
    def _roots(self) -> set[str]:
        """Names of the children that are layers or lists of them."""
        return {part.layer.partition(".")[0] for part in self.parts}

    def own_(self) -> None:
        """Give the layers memory of their own, so that the packed parameters can go."""
        for part in self.parts:
            for name, place in part.places:
                if place.index is not ...:
                    parameter = self.get_submodule(part.layer).get_parameter(name)
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)

    def pack(self, dense: Mapping[nn.Module, nn.Module]) -> nn.Module:
        """Return the packed module with the weights that the layers have now.

        Args:
            dense: what stands for a layer that is no nn.Linear.
        """
        (packed,) = copy.deepcopy(self._empty)
        for table, own in zip(registered(packed), registered(self), strict=True):
            table.update({name: own[name] for name in own if name not in self._roots})
        for part in self.parts:
            layer = self.get_submodule(part.layer)
            for name, place in part.places:
                self._fill(packed, place, dense.get(layer, layer).get_parameter(name))
        return packed.train(self.training)

    def pack_state_(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Turn the dense weights and biases of the layers in a checkpoint to packed ones, in place.

        Args:
            state_dict: the checkpoint.
            prefix: of this module's keys in it.
        """
        for part in self.parts:
            for name, place in part.places:
                tensor = state_dict.pop(f"{prefix}{part.layer}.{name}")
                if prefix + place.path not in state_dict:
                    whole = tensor.new_empty(self._shapes[place.path])
                    state_dict[prefix + place.path] = whole
                place.of(state_dict[prefix + place.path]).copy_(tensor)

    def _fill(self, packed: nn.Module, place: Place, source: nn.Parameter) -> None:
        owner, _, name = place.path.rpartition(".")
        table = registered(packed.get_submodule(owner))[0]
        if place.index is ...:
            table[name] = source
            return
        if table.get(name) is None:
            whole = source.detach().new_zeros(self._shapes[place.path])
            table[name] = nn.Parameter(whole, requires_grad=source.requires_grad)
        place.of(table[name].detach()).copy_(source.detach())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Hand the parts of a dense checkpoint to the layers, which load after this."""
        error_msgs: list[str] = args[-1]
        found = {p: state_dict.pop(prefix + p) for p in self._shapes if prefix + p in state_dict}
        for path, tensor in found.items():
            if tensor.shape != self._shapes[path]:
                error_msgs.append(
                    f"size mismatch for {prefix}{path}: copying a param with shape {tensor.shape} "
                    f"from checkpoint, the shape in current model is {self._shapes[path]}."
                )
        for part in self.parts:
            for name, place in part.places:
                tensor = found.get(place.path)
                if tensor is not None and tensor.shape == self._shapes[place.path]:
                    state_dict[f"{prefix}{part.layer}.{name}"] = place.of(tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _layer(part: Part, packed: Mapping[str, nn.Parameter]) -> nn.Linear:
    outs, ins = part.weight.of(packed[part.weight.path]).shape
    layer = nn.Linear(ins, outs, part.bias is not None, device="meta")
    for name, place in part.places:
        whole = packed[place.path]
        view = nn.Parameter(place.of(whole.detach()), requires_grad=whole.requires_grad)
        layer.register_parameter(name, whole if place.index is ... else view)
    return layer


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Register a layer under its name, or under its number in a list of modules."""
    owner, _, name = path.rpartition(".")
    if owner and owner not in dict(module.named_children()):
        module.add_module(owner, nn.ModuleList())
    module.get_submodule(owner).add_module(name, layer)


def _without_tensors(module: nn.Module) -> nn.Module:
    """Return a module like this one, with the names of its parameters and nothing behind them."""
    new = emptied(module, type(module))
    registered(new)[0].update(dict.fromkeys(registered(module)[0]))
    for name, child in module.named_children():
        new.add_module(name, _without_tensors(child))
    return new
