"""Data parallelism: what of a sparse module goes over the wire."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsekd.nn.base import sparse_modules


def keep_indices_local(model: nn.Module) -> nn.Module:
    """Leave the indices of sparse modules out of what DistributedDataParallel broadcasts.

    They are buffers, which it sends from rank 0 before every forward pass: as many bytes again as
    the gradients. `sparsify` calls this; a model built from sparse modules needs the call before it
    is wrapped. Ranks get equal indices from equal seeds, and every update checks that they are.

    Args:
        model: the module that is going to be wrapped.

    Returns:
        The model.

    Example:
        >>> import torch, sparsekd as skd
        >>> model = keep_indices_local(torch.nn.Sequential(skd.nn.SparseLinear(4, 2)))
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, _ in sparse_modules(model):
        prefix = f"{name}." if name else ""
        ignored |= {f"{prefix}crow_indices", f"{prefix}col_indices"}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return model
