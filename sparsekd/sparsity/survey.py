"""Which layers of a model can be sparse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekd.coverage import NAMED_FROM, DensePart, dense_parts
from sparsekd.sparsity.wrappers import refuse_wrappers

_OTHERS = 4  # parameters of other modules that an error names
DenseLayer = nn.Linear | nn.Conv2d


class Survey(NamedTuple):
    """What `sparsify` would find in a model.

    `convertible` maps the name of each layer it understands to the layer; `left_alone` maps the
    name of each nn.Linear or nn.Conv2d it does not understand to the reason; `aliases` maps each of
    these names to all names of the same module. `weights` maps them to the parameters of two or
    more dimensions that the layer has, and `others` lists those of all other modules.
    """

    convertible: dict[str, DenseLayer]
    left_alone: dict[str, str]
    aliases: dict[str, list[str]]
    weights: dict[str, list[DensePart]]
    others: list[DensePart]


def survey(model: nn.Module) -> Survey:
    """List the layers of a model that `sparsify` converts, and those it leaves alone and why.

    Args:
        model: any module; it is only read.

    Returns:
        The layers by name; one that occurs several times appears once, under its first name.

    Example:
        >>> found = survey(torch.nn.TransformerEncoderLayer(8, 2))
        >>> list(found.convertible), list(found.left_alone)
        (['linear1', 'linear2'], ['self_attn.out_proj'])
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Conv2d):
            names[module].append(name)
    holders: dict[Tensor, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter].add(module)
    found = Survey({}, {}, {}, defaultdict(list), [])
    for module, aliases in names.items():
        found.aliases[aliases[0]] = aliases
        reason = _reason_to_leave(module, holders)
        if reason:
            found.left_alone[aliases[0]] = reason
        elif isinstance(module, nn.Linear | nn.Conv2d):
            found.convertible[aliases[0]] = module
    first = {alias: name for name, aliases in found.aliases.items() for alias in aliases}
    for part in dense_parts(model):
        paths = (path for name in part.names for path in _around(name))
        owner = next((first[path] for path in paths if path in first), None)
        (found.others if owner is None else found.weights[owner]).append(part)
    return found


def _reason_to_leave(module: nn.Module, holders: Mapping[Tensor, set[nn.Module]]) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} may compute something else than its base class"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm or pruning hooks)"
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}"
    if set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules:
        return "it holds parameters, buffers or modules besides weight and bias"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if len(holders[weight]) > 1:
        return "its weight is shared with another module"
    return None


def layers_to_prune(model: nn.Module, skip: str | Iterable[str] = ()) -> dict[str, DenseLayer]:
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
        raise ValueError(f"model: expected an nn.Linear or nn.Conv2d to convert, {_why(found)}")
    return layers


def skipped_layers(found: Survey, skip: str | Iterable[str]) -> set[str]:
    """Return the layers that match a pattern by a name of theirs or of a module around them.

    Args:
        found: what `survey` said of the model.
        skip: names or fnmatch patterns, of layers or of modules around them. They may also be of
            parameters that `sparsify` does not convert, or of their modules.

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
    """Yield what no layer holds that `sparsify` understands: name, reason, share of the model.

    Args:
        found: what `survey` said of the model.
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
    """Return the names that a pattern may give a layer: those of a weight it only shares too."""
    weights = found.weights.get(layer, []) if layer in found.left_alone else []
    return found.aliases[layer] + [name for part in weights for name in part.names]


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
