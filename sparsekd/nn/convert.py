"""Conversion of a model's layers to sparse ones in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsekd._torch import take_hooks
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.nn.base import SparseModule, sparse_modules
from sparsekd.nn.conv import SparseConv1d, SparseConv2d
from sparsekd.nn.conv1d import SparseConv1D
from sparsekd.nn.distributed import keep_indices_local
from sparsekd.nn.held import replace_modules
from sparsekd.nn.init import kaiming_
from sparsekd.nn.linear import SparseLinear
from sparsekd.nn.stored import parameter_count
from sparsekd.sparsity import (
    NAMED_FROM,
    Survey,
    allocate,
    dense_parameters,
    generator_for,
    layers_to_prune,
    layout_masks,
    living_rows,
    magnitude_masks,
    outputs_first,
    random_masks,
    refuse_wrappers,
    skipped_layers,
    survey,
    warn_of_dead,
)
from sparsekd.sparsity.packed import SplitModule

CRITERIA = ("random", "magnitude")
INITS = ("keep", "sparse")


@torch.no_grad()
def sparsify(
    model: nn.Module,
    sparsity: float = 0.9,
    distribution: str = "erk",
    criterion: str = "random",
    skip: str | Iterable[str] = (),
    layout: str | Layout = "csr",
    seed: int = 0,
    masks: Mapping[str, Tensor] | str | None = None,
    *,
    init: str = "keep",
) -> nn.Module:
    """Replace the linear and convolutional layers of a model by weight-sparse ones, in place.

    These are every nn.Linear, nn.Conv2d, nn.Conv1d and `Conv1D` of transformers, the projections of
    every nn.MultiheadAttention, and the experts of transformers. Of the last two, whose weights
    are packed in one parameter, each part becomes a layer: `q_proj`, `k_proj`, `v_proj` and
    `out_proj` of a `SplitAttention`, and lists of layers of a `SplitExperts`, one an expert.

    The total number of nonzeros over the replaced layers is `round((1 - sparsity) * N)` exactly,
    or as near as whole tiles of the layout come to it.
    A layer the distribution makes dense becomes a sparse module with a full mask. A module used in
    several places is converted once. Biases and everything else in the model stay the same
    objects; build the optimizer after this call, since the weights are new parameters.

    Layers of another class than exactly one of these, parametrised, lazy or weight-tied ones are
    left alone and named in a warning, and so is every other parameter of two or more dimensions
    with 1 % or more of the model: of embeddings, recurrent layers. `survey` lists them,
    `skip` silences it, and `sparsekd.coverage` says how sparse the whole model is.

    Lists, dicts, tuples and other objects that attributes of the model reach get the new layers as
    well; where one cannot be given it, a warning says which. References elsewhere, as in local
    variables, keep the dense layer. Layers and output channels that end up without a weight are
    named in a RuntimeWarning.

    Args:
        model: any module without a wrapper; an nn.Linear or the like itself is fine.
        sparsity: fraction of zeros over all replaced layers together.
        distribution: "uniform" (the same in every layer; RigL's variant with a dense first layer
            is this plus `skip=<its name>`), "er" or "erk".
        criterion: "random" places the nonzeros at random, "magnitude" at the largest weights of
            each layer, or its tiles of largest mean magnitude.
        skip: names of layers that stay dense, of modules whose layers all do, or fnmatch patterns
            of such names; also those of packed parameters, of parameters that are not converted,
            and of their modules.
        layout: structure that the masks have and keep: "csr" (any), "bcsr" (blocks of 16 x 16),
            "fanin" (the same number in every row), "nm" (2 of 4 input channels in every layer,
            with `sparsity=0.5`), or a `sparsekd.Layout` with other numbers.
        seed: seed of the masks (and values); each layer draws from its own generator, so the
            result does not depend on torch's global generator, which is left alone.
        masks: bool masks by layer name, of the shapes of the dense weights, instead of a
            distribution and criterion; layers without one stay dense. Or "nonzero": a layer that
            has zeros keeps its other weights, as of a pruned model stored dense; one that has none
            stays dense.
        init: "keep" leaves the weights at the nonzeros as they are, which is what a pretrained
            model and a lottery ticket (the dense net's own initialisation) need; "sparse" draws
            them anew with the active fan-in, as a fresh SparseLinear or SparseConv2d does.

    Returns:
        The model; if it is itself a layer, the sparse module in its place.

    Raises:
        ValueError: if `sparsity` is outside [0, 1] or not that of "nm", a pattern of `skip` matches
            no layer, a name in `masks` is no layer that can be converted, or there is nothing to
            convert.
        ShapeError, TopologyError: if a mask does not fit its layer.
        UnsupportedError: if a word is not among those above; the text lists them. Or if a mask
            does not fit the layout; the message names the layer. Or if the model is, or holds, a
            wrapper (DistributedDataParallel, FSDP, a compiled module, AveragedModel).

    Source: Evci et al., Rigging the Lottery, section 3 (1), for the distributions.

    Example:
        >>> import torch, sparsekd as skd
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.Linear(50, 10))
        >>> model = skd.sparsify(model, sparsity=0.9, distribution="uniform")
        >>> sum(module.topology.nnz for _, module in skd.nn.sparse_modules(model))
        550
    """
    layout = Layout.parse(layout)
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("init", init, INITS)
    refuse_wrappers(model, "sparsify")
    skip = [skip] if isinstance(skip, str) else list(skip)
    found = survey(model, parameter_count(model))
    skipped = skipped_layers(found, skip)
    layers = {name: m for name, m in found.convertible.items() if name not in skipped}
    if isinstance(masks, str):
        masks = _nonzero_masks(masks, layers)
    if masks is not None:
        chosen = _given_masks(masks, layers, found, skipped)
    else:
        drawn = layers_to_prune(model, skip)
        chosen = _drawn_masks(drawn, sparsity, distribution, criterion, seed, layout)
    # Every replacement exists before the first one takes its place: an error changes nothing.
    replacements: dict[nn.Module, nn.Module] = {}
    for name, mask in chosen.items():
        layout.check(mask, f"masks[{name!r}]")
        sparse = _sparse_twin(layers[name], mask, layout)
        sparse.known_as = name
        sparse.asked_sparsity = None if masks is not None else float(sparsity)
        if init == "sparse":
            generator = generator_for(seed, f"{name}.values")
            kaiming_(sparse.values, sparse.topology, generator=generator)
        replacements[layers[name]] = sparse
    for packed, split in found.splits.items():
        if any(layer in replacements for layer in split.modules()):
            split.own_()
            replacements[packed] = split
    _warn_of_dense(found, chosen, skip, given=masks is not None)
    warn_of_dead({name: living_rows(mask) for name, mask in chosen.items()}, stacklevel=3)
    model = replace_modules(model, replacements, "sparsify")
    _leave_fast_path(model)
    return keep_indices_local(model)


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Replace every weight-sparse module of a model by its dense counterpart, in place.

    Args:
        model: any module; a sparse module itself is fine.

    Returns:
        The model, with dense layers that store the zeros; if it is itself a sparse module, the
        dense one in its place. Other references to the layers follow, as in `sparsify`.

    Raises:
        UnsupportedError: if the model is, or holds, a wrapper.

    Example:
        >>> import torch, sparsekd as skd
        >>> skd.densify(torch.nn.Sequential(skd.nn.SparseLinear(4, 2, sparsity=0.5)))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    refuse_wrappers(model, "densify")
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear | SparseConv2d | SparseConv1d):
            dense = module.to_dense()
            if module.bias is not None:
                dense.register_parameter("bias", module.bias)
            take_hooks(dense, module)
            replacements[module] = dense
    for module in model.modules():
        if isinstance(module, SplitModule):
            replacements[module] = module.pack(replacements)
    return replace_modules(model, replacements, "densify")


def relayout(model: nn.Module, layout: str | Layout) -> nn.Module:
    """Change the layout of every weight-sparse module of a model, in place.

    No weight moves and no mask changes: a layout is what masks have to fit from here on. "csr"
    takes every mask; the others take those that have their structure already. Updaters look at
    layouts when they are built, so call this before.

    Args:
        model: any module; a sparse module itself is fine.
        layout: its name, or a `sparsekd.Layout`.

    Returns:
        The model.

    Raises:
        UnsupportedError: the mask of a layer does not fit, or the layout is not known; the text
            names the layer, and no layer has changed then.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(64, 64, sparsity=0.75, layout="bcsr")
        >>> str(relayout(layer, skd.Layout("fanin", group=64)).layout)
        Traceback (most recent call last):
        sparsekd.errors.UnsupportedError: ...
        >>> str(relayout(layer, skd.Layout("bcsr", block=8)).layout)
        'bcsr:8'
    """
    layout = Layout.parse(layout)
    modules = dict(sparse_modules(model))
    for name, module in modules.items():
        layout.check(module.topology.mask(), f"{name or 'model'}: mask")
    for module in modules.values():
        module._layout = layout
    return model


def _sparse_twin(layer: nn.Module, mask: Tensor, layout: Layout) -> SparseModule:
    sparse: SparseModule
    mask = outputs_first(layer, mask)  # of the dense weight's shape
    if isinstance(layer, nn.Conv2d):
        sparse = SparseConv2d.from_dense(layer, mask, layout=layout)
    elif isinstance(layer, nn.Conv1d):
        sparse = SparseConv1d.from_dense(layer, mask, layout=layout)
    elif isinstance(layer, nn.Linear):
        sparse = SparseLinear.from_dense(layer, mask, layout=layout)
    else:
        sparse = SparseConv1D.from_dense(layer, mask, layout=layout)
    sparse.register_parameter("bias", dict(layer.named_parameters()).get("bias"))
    take_hooks(sparse, layer)
    return sparse


def _warn_of_dense(
    found: Survey, chosen: Mapping[str, Tensor], skip: list[str], *, given: bool
) -> None:
    """Warn about what stays dense: layers that cannot be converted, and large parameters.

    With given masks it is for the caller which layers are small enough to be left out.
    """
    skipped = skipped_layers(found, skip)
    named: dict[str, tuple[str, float]] = {}
    for name in found.aliases:
        why = found.left_alone.get(name, "no mask was given for it")
        share = sum(part.share for part in found.weights.get(name, []))
        if name not in chosen and name not in skipped and (share >= NAMED_FROM or not given):
            named[name] = why, share
    for name, why, share in dense_parameters(found, skip):
        if share >= NAMED_FROM:
            named[name] = why, share
    if named:
        lines = "".join(
            f"\n  {name or 'the model itself'}: {why} ({share:.1%})"
            for name, (why, share) in named.items()
        )
        warnings.warn(
            "sparsify leaves these layers dense, in brackets their share of all parameters (skip "
            f"silences this, sparsekd.coverage(model) sums up):{lines}",
            stacklevel=4,
        )


def _leave_fast_path(model: nn.Module) -> None:
    """Make torch's Transformer encoder call its layers instead of reading their weights.

    Its inference shortcut hands `linear1.weight` to one fused dense kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and next(sparse_modules(module), None):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and next(sparse_modules(module), None):
            module.use_nested_tensor = False


def _drawn_masks(
    layers: Mapping[str, nn.Module],
    sparsity: float,
    distribution: str,
    criterion: str,
    seed: int,
    layout: Layout,
) -> dict[str, Tensor]:
    """Return masks whose rows are the outputs, whatever the order of the dense weights."""
    weights = {
        name: outputs_first(layer, layer.get_parameter("weight").detach())
        for name, layer in layers.items()
    }
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if not layout.unstructured:
        return layout_masks(
            shapes,
            sparsity,
            distribution,
            layout,
            seed=seed,
            weights=weights if criterion == "magnitude" else None,
        )
    nnz = allocate(shapes, sparsity, distribution)
    if criterion == "random":
        return random_masks(shapes, nnz, seed=seed)
    return magnitude_masks(weights, nnz)


def _given_masks(
    masks: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    found: Survey,
    skipped: set[str],
) -> dict[str, Tensor]:
    """Check the masks a caller gave, turn them as the drawn ones, key them by first names."""
    first = {alias: name for name, aliases in found.aliases.items() for alias in aliases}
    chosen: dict[str, Tensor] = {}
    for alias, mask in masks.items():
        name = first.get(alias)
        if name is None or name not in layers:
            if name in skipped:
                why = "it is skipped"
            else:
                why = found.left_alone.get(name or "", f"the layers are {', '.join(layers)}")
            raise ValueError(f"masks: {alias!r} is no layer that can be converted: {why}")
        shape = layers[name].get_parameter("weight").shape
        if mask.shape != shape:
            raise ShapeError(
                f"masks[{alias!r}]: expected shape {list(shape)}, got {list(mask.shape)}"
            )
        mask = outputs_first(layers[name], mask)
        if name in chosen and not torch.equal(chosen[name], mask):
            raise ValueError(f"masks: {alias!r} and {name!r} are one module but differ")
        chosen[name] = mask
    return chosen


def _nonzero_masks(word: str, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the masks of the layers that have zeros."""
    _check_choice("masks", word, ("nonzero",))
    masks = {name: layer.get_parameter("weight") != 0 for name, layer in layers.items()}
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    if not masks:
        raise ValueError(f"masks: none of {len(layers)} layers has a weight that is zero")
    return masks


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnsupportedError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
