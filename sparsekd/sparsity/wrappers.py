"""Detection of wrapped models (DDP, FSDP, torch.compile), whose layers must not be replaced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparsekd._torch import COMPILED_MODULE
from sparsekd.errors import UnsupportedError


def refuse_wrappers(model: nn.Module, call: str) -> None:
    """Refuse a model that is, or contains, a wrapper around layers to be replaced.

    A wrapper has already registered the parameters, to reduce, shard, compile or average them, and
    does not notice when they are replaced.

    Args:
        model: any module.
        call: the function that refuses, as "sparsify"; the message names it.

    Raises:
        UnsupportedError: there is a wrapper; the message says where, and what to do instead.

    Example:
        >>> refuse_wrappers(nn.Linear(2, 2), "sparsify")
        >>> refuse_wrappers(nn.DataParallel(nn.Linear(2, 2)), "sparsify")
        Traceback (most recent call last):
        sparsekd.errors.UnsupportedError: ...
    """
    kinds = list(_wrappers())
    for name, module in model.named_modules():
        for kind, inner, again in kinds:
            if isinstance(module, kind) and (kind is not torch.jit.ScriptModule or not name):
                where = f"the module {name!r} in it is" if name else "it is"
                raise UnsupportedError(
                    f"model: expected one without wrappers, but {where} a {kind.__name__}, which "
                    f"does not see its parameters replaced; call {call} on {inner}, then {again}"
                )


def _wrappers() -> Iterator[tuple[Any, str, str]]:
    """Yield each class, how to reach what it wraps, and what to do after the call."""
    yield DistributedDataParallel, "its .module", "wrap the result and build the optimizer"
    yield DataParallel, "its .module", "wrap the result"
    yield torch.jit.ScriptModule, "the module it was made of", "script or trace the densified one"
    averaged = imported("torch.optim.swa_utils", "AveragedModel")
    if averaged is not None:
        yield averaged, "the model it averages", "make a new AveragedModel of that"
    compiled = imported(*COMPILED_MODULE)
    if compiled is not None:
        yield compiled, "the module that was compiled", "torch.compile the result"
    for name in ("FullyShardedDataParallel", "FSDPModule"):
        sharded = imported("torch.distributed.fsdp", name)
        if sharded is not None:
            yield sharded, "the module before it is sharded", "shard the result"


def imported(module: str, name: str) -> Any:
    """Return a class if its module has been imported, else None: then no instance exists.

    Args:
        module: its full name.
        name: of the class.

    Example:
        >>> imported("torch.nn", "Linear"), imported("no.such.module", "Linear")
        (<class 'torch.nn.modules.linear.Linear'>, None)
    """
    return getattr(sys.modules.get(module), name, None)
