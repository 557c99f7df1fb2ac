"""Which layers of a model can be sparse."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsekd.sparsity.attention import SplitAttention
from sparsekd.sparsity.experts import SplitExperts
from sparsekd.sparsity.packed import SplitModule
from sparsekd.sparsity.wrappers import imported, refuse_wrappers

NAMED_FROM = 0.01
"""Share of a model's weights from which on a parameter that stays dense is worth naming."""

_OTHERS = 4  # parameters of other modules that an error names


class DensePart(NamedTuple):
    """A parameter of two or more dimensions that is stored densely.

    `names` are all it has in the model, `share` is its part of all weights, zeros included, and
    `holder` the module that has it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    share: float
    holder: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class Survey(NamedTuple):
    """The layers of a model as `sparsify` sees them.

    `convertible` maps the name of each layer it understands to the layer; `left_alone` maps the
    name of each layer of such a class it does not understand to the reason; `aliases` maps each of
    these names to all names of the same module. `weights` maps them to the parameters of two or
    more dimensions that the layer has, and `others` lists those of all other modules. `splits` maps
    each module with packed weights (nn.MultiheadAttention, experts of transformers) to one that has
    layers instead, which are among the layers here, under the names that they are going to have.
    """

    convertible: dict[str, nn.Module]
    left_alone: dict[str, str]
    aliases: dict[str, list[str]]
    weights: dict[str, list[DensePart]]
    others: list[DensePart]
    splits: dict[nn.Module, SplitModule]


def survey(model: nn.Module, total: int | None = None) -> Survey:
    """List the layers of a model that `sparsify` converts, and those it leaves alone and why.

    Args:
        model: any module; it is only read.
        total: number of parameters that shares are of, by default those that the model stores.

    Returns:
        The layers by name; one that occurs several times appears once, under its first name.

    Example:
        >>> found = survey(torch.nn.TransformerEncoderLayer(8, 2))
        >>> list(found.convertible)[2:]
        ['self_attn.v_proj', 'self_attn.out_proj', 'linear1', 'linear2']
    """
    kinds = _kinds()
    holders: dict[Tensor, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter].add(module)
    found = Survey({}, {}, {}, defaultdict(list), [], _splits(model, holders))
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in _named_layers(model, found.splits):
        if isinstance(module, kinds):
            names[module].append(name)
    for module, aliases in names.items():
        found.aliases[aliases[0]] = aliases
        reason = _reason_to_leave(module, holders)
        if reason:
            found.left_alone[aliases[0]] = reason
        else:
            found.convertible[aliases[0]] = module
    first = {alias: name for name, aliases in found.aliases.items() for alias in aliases}
    packed = _packed_parts(model, found.splits)
    for part in dense_parts(model, total):
        if part.name in packed:
            for path, size in packed[part.name]:
                share = part.share * size.numel() / math.prod(part.shape)
                found.weights[first[path]].append(part._replace(shape=tuple(size), share=share))
            continue
        paths = (path for name in part.names for path in _around(name))
        owner = next((first[path] for path in paths if path in first), None)
        (found.others if owner is None else found.weights[owner]).append(part)
    return found


def _splits(
    model: nn.Module, holders: Mapping[Tensor, set[nn.Module]]
) -> dict[nn.Module, SplitModule]:
    """Split the modules with packed weights, all of whose parts can be layers."""
    found: dict[nn.Module, SplitModule] = {}
    for module in model.modules():
        shared = any(len(holders[parameter]) > 1 for parameter in module.parameters())
        if shared or "forward" in vars(module):
            continue
        split = SplitAttention.split(module) or SplitExperts.split(module)
        if split is not None:
            found[module] = split
    return found


def _named_layers(
    model: nn.Module, splits: Mapping[nn.Module, SplitModule]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules under all their names, the layers of split modules in their place."""
    inside = {child for module in splits for child in module.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in splits:
            for part in splits[module].parts:
                layer = splits[module].get_submodule(part.layer)
                yield f"{name}.{part.layer}".removeprefix("."), layer
        elif module not in inside:
            yield name, module


def _packed_parts(
    model: nn.Module, splits: Mapping[nn.Module, SplitModule]
) -> dict[str, list[tuple[str, torch.Size]]]:
    """Return the names and shapes of the layers that packed weights become, by their names."""
    found: dict[str, list[tuple[str, torch.Size]]] = defaultdict(list)
    for name, module in model.named_modules():
        if module in splits:
            for part in splits[module].parts:
                layer = splits[module].get_submodule(part.layer)
                packed = f"{name}.{part.weight.path}".removeprefix(".")
                shape = layer.get_parameter("weight").shape
                found[packed].append((f"{name}.{part.layer}".removeprefix("."), shape))
    return found


def with_layers(model: nn.Module) -> nn.Module:
    """Return the model, or where weights are packed a twin that has layers for them.

    The twin shares all tensors with the model.

    Args:
        model: any module; it is only read.

    Example:
        >>> list(dict(with_layers(nn.MultiheadAttention(4, 2)).named_children()))
        ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    if not survey(model).splits:
        return model
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    splits = survey(twin).splits
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if child in splits:
                module.add_module(name, splits[child])
    return splits.get(twin, twin)


def dense_parts(model: nn.Module, total: int | None = None) -> Iterator[DensePart]:
    """Yield the parameters of two or more dimensions of a model, each once, in its order.

    Args:
        model: any module; weights of sparse layers, which are stored in one dimension, do not
            occur.
        total: number of parameters that shares are of, by default those that the model stores.

    Example:
        >>> [part.name for part in dense_parts(nn.GRU(4, 4, bias=False))]
        ['weight_ih_l0', 'weight_hh_l0']
    """
    if total is None:
        total = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    names: dict[Tensor, list[str]] = defaultdict(list)
    holders: dict[Tensor, nn.Module] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not is_lazy(parameter) and parameter.ndim > 1:
                names[parameter].append(f"{prefix}.{leaf}" if prefix else leaf)
                holders.setdefault(parameter, module)
    for parameter, aliases in names.items():
        share = parameter.numel() / max(total, 1)
        yield DensePart(tuple(aliases), tuple(parameter.shape), share, holders[parameter])


def conv1d_class() -> Any:
    """Return the Conv1D class of transformers, or None if nothing has imported it.

    Example:
        >>> isinstance(nn.Linear(2, 2), conv1d_class() or ())
        False
    """
    return imported("transformers.pytorch_utils", "Conv1D")


def outputs_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Transpose a dense layer's weight or mask so that its rows are the outputs, or back.

    Args:
        layer: of a class that can be sparse.
        tensor: of the weight's shape, or as this function returns it.

    Shape:
        [in, out] -> [out, in] and [out, in] -> [in, out] of a Conv1D of transformers; others have
        the outputs first and stay as they are.

    Returns:
        A view, or the tensor itself.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> outputs_first(layer, layer.weight) is layer.weight
        True
    """
    return tensor.t() if isinstance(layer, conv1d_class() or ()) else tensor


def _kinds() -> tuple[type[nn.Module], ...]:
    """Return the classes that can be sparse."""
    kinds, conv1d = (nn.Linear, nn.Conv2d, nn.Conv1d), conv1d_class()
    return kinds if conv1d is None else (*kinds, conv1d)


def _reason_to_leave(module: nn.Module, holders: Mapping[Tensor, set[nn.Module]]) -> str | None:
    if type(module) not in _kinds():
        return f"{type(module).__name__} may compute something else than its base class"
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm or pruning hooks)"
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}"
    if parameters.keys() - {"weight", "bias"} or [*module.buffers(), *module.children()]:
        return "it holds parameters, buffers or modules besides weight and bias"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if len(holders[weight]) > 1:
        return "its weight is shared with another module"
    return None


def layers_to_prune(model: nn.Module, skip: str | Iterable[str] = ()) -> dict[str, nn.Module]:
    """Return the layers of a dense model that can be sparse, less those to skip.

    Args:
        model: any module; it is only read.
        skip: as in `skipped_layers`.

    Raises:
        ValueError: there are none, or a pattern of `skip` matches no layer.
        UnsupportedError: the model is, or holds, a wrapper.

    Example:
        >>> list(layers_to_prune(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "0"))
        ['2']
    """
    refuse_wrappers(model, "this")
    found = survey(model)
    skipped = skipped_layers(found, skip)
    layers = {name: layer for name, layer in found.convertible.items() if name not in skipped}
    if not layers:
        raise ValueError(
            "model: expected an nn.Linear or nn.Conv2d, or another layer that can be sparse "
            "(nn.Conv1d, nn.MultiheadAttention, Conv1D and experts of transformers), to convert, "
            f"{_why(found)}"
        )
    return layers


def skipped_layers(found: Survey, skip: str | Iterable[str]) -> set[str]:
    """Find the layers whose name, or that of a module around them, matches a pattern.

    Args:
        found: result of `survey`.
        skip: names or fnmatch patterns, of layers or of modules around them. They may also name
            parameters that `sparsify` does not convert, or the modules of such parameters.

    Raises:
        ValueError: a pattern matches neither a layer nor such a parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
        >>> skipped_layers(survey(model), "1")
        {'1.0'}
    """
    aliases, skipped = found.aliases, set[str]()
    for pattern in [skip] if isinstance(skip, str) else skip:
        matched = {name for name in aliases if _matches(_names(found, name), pattern)}
        if not matched and not any(_matches(part.names, pattern) for part in found.others):
            raise ValueError(
                f"skip: {pattern!r} matches no layer; the layers are {', '.join(aliases)}"
            )
        skipped |= matched
    return skipped


def dense_parameters(found: Survey, skip: str | Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Yield the parameters of modules that `sparsify` does not know: name, reason, share of all.

    Args:
        found: result of `survey`.
        skip: as in `skipped_layers`; what matches is left out.

    Example:
        >>> list(dense_parameters(survey(nn.Embedding(4, 2)), ()))
        [('weight', 'an Embedding is not converted', 1.0)]
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for part in found.others:
        if not any(_matches(part.names, pattern) for pattern in patterns):
            kind = type(part.holder).__name__
            article = "an" if kind[0] in "AEIOU" else "a"
            yield part.name, f"{article} {kind} is not converted", part.share


def _names(found: Survey, layer: str) -> list[str]:
    """Return the names that a pattern may match for a layer: those of a shared weight, or of the
    packed one that it is a part of, included."""
    aliases, own = found.aliases[layer], set[str]()
    if layer in found.convertible:
        own = {f"{alias}.weight".removeprefix(".") for alias in aliases}
    weights = [name for part in found.weights.get(layer, []) for name in part.names]
    return aliases + [name for name in weights if name not in own]


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for name in names for path in _paths(name))


def _paths(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around a parameter, the innermost first, the model last."""
    yield from _paths(name.rpartition(".")[0])
    yield ""


def _why(found: Survey) -> str:
    others = sorted(dense_parameters(found, ()), key=lambda other: -other[2])[:_OTHERS]
    reasons = [f"{name}: {why}" for name, why in found.left_alone.items()]
    reasons += [f"{name}: {why}" for name, why, share in others if share >= NAMED_FROM]
    return "; ".join(["all are skipped or left alone" if found.aliases else "found none", *reasons])
