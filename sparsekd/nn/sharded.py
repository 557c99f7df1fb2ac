"""Sparse modules of which this process holds a part: those that FSDP has sharded."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sparsekd.errors import UnsupportedError


def sharding(module: nn.Module) -> str | None:
    """Return what shards the values of a sparse module, None where they are this process's own."""
    values: Any = module.values
    distributed = sys.modules.get("torch.distributed.tensor")  # no DTensor exists without it
    if distributed is not None and isinstance(values, distributed.DTensor):
        return "fully_shard"
    # FSDP1 marks the parameters it flattens, or puts views of the flat one in their place.
    if "values" in vars(module) or getattr(values, "_fsdp_flattened", False):
        return "FullyShardedDataParallel"
    return None


def check_own(module: nn.Module, what: str, name: str = "") -> None:
    """Raise UnsupportedError where something shards the values of a sparse module.

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
    """Raise UnsupportedError where this process holds a part of a module's values at present.

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
