"""What the tensors of a checkpoint say of the layer they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekd.csr import validate
from sparsekd.errors import TopologyError

if TYPE_CHECKING:
    from sparsekd.nn.base import SparseModule

INDICES = ("crow_indices", "col_indices")
_SHAPE = "weight_shape"


def note_shape(module: SparseModule, state_dict: Any, prefix: str) -> None:
    """Add the topology's shape to the metadata of a state_dict; indices do not tell the columns.

    Args:
        module: whose state it is.
        state_dict: being filled.
        prefix: of the module's keys.
    """
    metadata = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata[_SHAPE] = list(module.weight_shape)


def size_problems(
    module: SparseModule,
    prefix: str,
    own: Mapping[str, Tensor | None],
    metadata: Mapping[str, Any],
) -> list[str]:
    """Return what torch would say of the tensors of a layer of another size.

    Indices that are of no layer at all are no matter of size, and not looked for here.

    Args:
        module: to load into.
        prefix: of its keys.
        own: its tensors in the checkpoint, by name; None for those that are not there.
        metadata: of the module in the checkpoint.

    Returns:
        Lines for `error_msgs`, none where sizes agree.
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
        weight = [mismatch(prefix + "weight", module._turned_shape(shape), module.dense_shape)]
    return _differing(module, prefix, own, ("values", "bias", *INDICES)) + weight


def mismatch(key: str, got: Sequence[int], expected: Sequence[int]) -> str:
    """Say that sizes differ in the words of torch, which tools look for.

    Args:
        key: of the tensor.
        got: its shape in the checkpoint.
        expected: its shape in the model.

    Example:
        >>> mismatch("fc.bias", (3,), (2,))[:26]
        'size mismatch for fc.bias:'
    """
    return (
        f"size mismatch for {key}: copying a param with shape {torch.Size(got)} from checkpoint, "
        f"the shape in current model is {torch.Size(expected)}."
    )


def _differing(
    module: SparseModule, prefix: str, own: Mapping[str, Tensor | None], names: Sequence[str]
) -> list[str]:
    found = []
    for name in names:
        got, mine = own[name], getattr(module, name)
        if got is not None and mine is not None and got.shape != mine.shape:
            found.append(mismatch(prefix + name, got.shape, mine.shape))
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
