"""Sparse modules in several processes: buffers under DDP, values under FSDP."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sparsekd._torch import fsdp_flattened, leave_out_of_ddp
from sparsekd.errors import UnsupportedError
from sparsekd.nn.stored import INDICES, StoredWeight


def keep_indices_local(model: nn.Module) -> nn.Module:
    """Exclude the indices of sparse modules from the broadcasts of DistributedDataParallel.

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
    names = [name for name, module in model.named_modules() if isinstance(module, StoredWeight)]
    leave_out_of_ddp(model, [f"{name}.{index}".lstrip(".") for name in names for index in INDICES])
    return model


def sharding(module: nn.Module) -> str | None:
    """Name what shards the values of a sparse module; None if this process has all of them."""
    values: Any = module.values
    distributed = sys.modules.get("torch.distributed.tensor")  # no DTensor exists without it
    if distributed is not None and isinstance(values, distributed.DTensor):
        return "fully_shard"
    # FSDP1 marks the parameters it flattens, or puts views of the flat one in their place.
    if "values" in vars(module) or fsdp_flattened(values):
        return "FullyShardedDataParallel"
    return None


def check_own(module: nn.Module, what: str, name: str = "") -> None:
    """Refuse, with UnsupportedError, a sparse module whose values are sharded.

    Args:
        module: a sparse module.
        what: needs the values as they are without that.
        name: of the module.
    """
    found = sharding(module)
    if found is not None:
        raise UnsupportedError(
            f"{name + '.' if name else ''}values: {what} needs them whole on every process, but "
            f"{found} shards them; the topology of a sharded model is static. Do this before "
            "sharding, or train with DistributedDataParallel"
        )


def check_whole(module: nn.Module, nnz: int, what: str) -> None:
    """Refuse, with UnsupportedError, a module of whose values this process now has only a part.

    Within its forward pass a sharded module has them all.

    Args:
        module: a sparse module.
        nnz: how many weights it stores over all processes.
        what: needs them all.
    """
    found = sharding(module)
    if found is None:
        return
    values: Any = module.values
    freed = nnz and found != "fully_shard" and not values.untyped_storage().size()
    if found == "fully_shard" or freed or values.shape != (nnz,):
        raise UnsupportedError(
            f"values: {what} needs all of them, but {found} keeps a part of them on each process; "
            "gather the model with torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
