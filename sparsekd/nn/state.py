"""The state_dict of a sparse module: sizes that have to agree, and topologies that need not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd._torch import metadata_of
from sparsekd.csr import validate
from sparsekd.errors import CheckpointError, TopologyError
from sparsekd.nn.stored import INDICES, StoredWeight
from sparsekd.sparsity import outputs_first, survey
from sparsekd.topology import Topology

_SHAPE = "weight_shape"


def note_shape(module: StoredWeight, state_dict: Any, prefix: str) -> None:
    """Add the topology's shape to the metadata of a state_dict; indices do not tell the columns.

    Args:
        module: whose state it is.
        state_dict: being filled.
        prefix: of the module's keys.
    """
    metadata = metadata_of(state_dict).get(prefix[:-1])
    if metadata is not None:
        metadata[_SHAPE] = list(module.weight_shape)


def stored_masks(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return where the sparse layers of a checkpoint store weights, for a dense model like it.

    `sparsify(model, masks=stored_masks(state, model))` gives the model that was saved its layers
    back, whatever reads the file; the state then loads into it.

    Args:
        state_dict: of a model with sparse layers.
        model: the same model with dense layers; it is only read.

    Returns:
        Bool masks by layer name, of the shapes of the dense weights.

    Raises:
        CheckpointError: a sparse layer of the checkpoint has no counterpart with a weight.
        TopologyError: the indices do not fit the layer.

    Example:
        >>> import sparsekd as skd
        >>> state = nn.Sequential(skd.nn.SparseLinear(8, 4, sparsity=0.75)).state_dict()
        >>> stored_masks(state, nn.Sequential(nn.Linear(8, 4)))["0"].sum()
        tensor(8)
    """
    modules: dict[str, nn.Module] = {**dict(model.named_modules()), **survey(model).convertible}
    masks = {}
    for key in state_dict:
        name, _, leaf = f".{key}".rpartition(".")
        if leaf != INDICES[0]:
            continue
        name = name.removeprefix(".")
        layer = modules.get(name)
        weight = None if layer is None else dict(layer.named_parameters()).get("weight")
        if layer is None or weight is None:
            raise CheckpointError(f"{name}: sparse in the checkpoint, but no dense layer here")
        rest = key.removesuffix(leaf)
        shape = outputs_first(layer, weight).shape
        topology = Topology(state_dict[key], state_dict[rest + INDICES[1]], shape)
        masks[name] = outputs_first(layer, topology.mask())
    return masks


@dataclass(frozen=True)
class LayerState:
    """The part of a checkpoint that belongs to a sparse module."""

    rest: dict[str, Any]
    """What torch loads: all but the indices, a dense `weight` turned into `values`."""

    topology: Topology | None
    """Where the values of `rest` belong; None if there are none."""

    problems: list[str]
    """Lines for torch's report where sizes do not agree; nothing is loaded then."""

    absent: list[str]
    """Keys of a sparse state that are missing, None of them where the weight is dense."""


def read_state(
    module: StoredWeight, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> LayerState:
    """Read a module's part of a checkpoint: values of any topology, or a dense `weight`.

    Args:
        module: to load into; it is not changed.
        state_dict: the checkpoint.
        prefix: of the module's keys.
        metadata: of the module in the checkpoint.

    Raises:
        TopologyError: the indices are damaged.
    """
    own = {name: state_dict.get(prefix + name) for name in ("values", "bias", *INDICES)}
    rest = {k: v for k, v in state_dict.items() if k not in {prefix + n for n in INDICES}}
    topology: Topology | None = None
    absent: list[str] = []
    problems = _size_problems(module, prefix, own, metadata)
    if own["values"] is not None:
        absent = [n for n in own if own[n] is None and getattr(module, n) is not None]
    if own["values"] is None and prefix + "weight" in rest:
        weight = rest.pop(prefix + "weight")
        if tuple(weight.shape) != module.dense_shape:
            problems.append(_mismatch(prefix + "weight", weight.shape, module.dense_shape))
        elif not problems:
            topology = module.topology
            flat = topology.flat_indices().to(weight.device)
            rest[prefix + "values"] = module._turned(weight.detach()).reshape(-1)[flat]
    elif not problems and all(own[name] is not None for name in ("values", *INDICES)):
        topology = _stored_topology(module, prefix, own)
    return LayerState(rest, topology, problems, [prefix + name for name in absent])


def _stored_topology(module: StoredWeight, prefix: str, own: Mapping[str, Any]) -> Topology:
    """Check a checkpoint's structure; the current one is kept if the positions are the same."""
    try:
        found = Topology(
            own["crow_indices"].detach(),
            own["col_indices"].detach(),
            module.weight_shape,
            version=module._topology.version + 1,
        )
        known = module._known_or(found)
    except TopologyError as error:
        raise TopologyError(f"{prefix}{error}") from None
    if own["values"].shape != (found.nnz,):
        raise TopologyError(
            f"{prefix}values: expected shape [{found.nnz}], one entry per nonzero, "
            f"got {list(own['values'].shape)}"
        )
    return known


def _size_problems(
    module: StoredWeight,
    prefix: str,
    own: Mapping[str, Tensor | None],
    metadata: Mapping[str, Any],
) -> list[str]:
    """List size mismatches of a layer's tensors in torch's words; empty if sizes agree.

    Indices that are of no layer at all are no matter of size, and not looked for here.
    """
    values, crow, col = own["values"], own["crow_indices"], own["col_indices"]
    if values is not None and (crow is None) is not (col is None):
        missing = "crow_indices" if crow is None else "col_indices"
        return [f"{prefix}values: cannot be placed, as {prefix}{missing} is missing"]
    bias = _differing(module, prefix, own, ("bias",))
    if values is None or crow is None or col is None:
        return bias
    shape = _noted(metadata)
    noted = shape is not None and shape != module.weight_shape
    if not noted and not bias and crow.shape == module.crow_indices.shape:
        return []
    if not _is_structure(crow, col, values):
        return []  # the check of the indices is going to say what is wrong
    if not noted and crow.shape == module.crow_indices.shape:
        return bias
    weight = []
    if shape and noted:
        weight = [_mismatch(prefix + "weight", module._turned_shape(shape), module.dense_shape)]
    return _differing(module, prefix, own, ("values", "bias", *INDICES)) + weight


def _mismatch(key: str, got: Sequence[int], expected: Sequence[int]) -> str:
    """Build torch's message for a size mismatch, which tools look for."""
    return (
        f"size mismatch for {key}: copying a param with shape {torch.Size(got)} from checkpoint, "
        f"the shape in current model is {torch.Size(expected)}."
    )


def _differing(
    module: StoredWeight, prefix: str, own: Mapping[str, Tensor | None], names: Sequence[str]
) -> list[str]:
    found = []
    for name in names:
        got, mine = own[name], getattr(module, name)
        if got is not None and mine is not None and got.shape != mine.shape:
            found.append(_mismatch(prefix + name, got.shape, mine.shape))
    return found


def _noted(metadata: Mapping[str, Any]) -> tuple[int, ...] | None:
    shape = metadata.get(_SHAPE)
    if isinstance(shape, list | tuple) and all(isinstance(size, int) for size in shape):
        return tuple(shape)
    return None


def _is_structure(crow: Tensor, col: Tensor, values: Tensor) -> bool:
    """Return whether tensors of a checkpoint are the weight of a layer of whatever size."""
    if crow.ndim != 1 or crow.numel() < 1 or col.ndim != 1 or values.shape != col.shape:
        return False
    if col.dtype not in (torch.int32, torch.int64):
        return False
    try:
        validate(crow, col, crow.numel() - 1, int(col.max()) + 1 if col.numel() else 0)
    except TopologyError:
        return False
    return True
