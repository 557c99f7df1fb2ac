"""Detection of copies of a module that were averaged without regard to topology.

An average over parameters mixes entry `i` of the copy with entry `i` of the model, which is another
weight after the model has moved its nonzeros. A module therefore keeps track of its living copies
and marks them when it is rewired. A copy whose values change after that, although it neither
trains nor loads nor follows, has been averaged; so has one whose index buffers were replaced. A
change of size would end such an average in torch's error about shapes, so the module itself warns.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.nn.stored import StoredWeight

ADVICE = (
    "Averages over parameters and buffers (torch.optim.swa_utils.AveragedModel, timm's ModelEma, a "
    "loop) mix different weights once the nonzeros move, and averaged indices are rounded: use "
    "skd.optim.AveragedModel"
)


class Source:
    """The module that a copy is made of, passed on to the copy; not pickled."""

    def __init__(self, module: StoredWeight) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()

    def link(self, twin: StoredWeight) -> None:
        """Register `twin` as a copy that its source marks when it is rewired."""
        if twin.values is not self.module.values:
            twin._is_copy = True
            twin._made_at = _state(twin)
            self.module._copies = self.module._copies or weakref.WeakSet()
            self.module._copies.add(twin)


def moved(module: StoredWeight) -> None:
    """Mark the copies of a module as left behind by its nonzeros, and itself as up to date."""
    in_step(module)
    for twin in module._copies or ():
        if twin._is_copy and twin._left_at is None:
            twin._left_at, made_at = _state(twin), twin._made_at
            resized = twin.values.shape != module.values.shape
            if resized and made_at is not None and not torch.equal(made_at, twin._left_at):
                _warn(
                    f"{module} has changed its number of weights, and a copy of it was changed "
                    f"before, as averages are. {ADVICE}"
                )


def in_step(module: StoredWeight) -> None:
    """Mark the values of a module as those of its topology, whatever its source does."""
    module._left_at = module._made_at = None


def check(module: StoredWeight, *, in_forward: bool = False) -> None:
    """Warn if a module's values were written, or its indices replaced, behind its back.

    Args:
        module: about to be used.
        in_forward: whether it is about to compute, which in training makes it a model of its own.
    """
    training = module.training and torch.is_grad_enabled()
    if module._topology.written and not (training and _ranks() > 1):
        _ = module.topology  # warns; the ranks of a run broadcast buffers, and compare topologies
    if module._left_at is not None and not torch.equal(module._left_at, _state(module)):
        in_step(module)
        _warn(
            f"{module} is a copy of a layer that has moved its nonzeros since, and its values were "
            f"changed after that. {ADVICE}"
        )
    elif in_forward and training and module.values.requires_grad:
        module._is_copy = False


@contextmanager
def converting(module: StoredWeight) -> Iterator[None]:
    """Allow the values of a module to change dtype or device in the context."""
    check(module)
    yield
    for name in ("_left_at", "_made_at"):
        if getattr(module, name) is not None:
            setattr(module, name, _state(module))


def warn_overwritten(module: StoredWeight) -> None:
    """Warn that the index buffers of a module were overwritten with other positions."""
    _warn(
        f"{module}: something wrote other positions into its index buffers. {ADVICE}. If all "
        "tensors were copied from one model, values included, the numbers are right; "
        "load_state_dict does that without this warning"
    )


def _state(module: StoredWeight) -> Tensor:
    # Not a version counter, which misses what is written through `.data`.
    return module.values.detach().sum(dtype=torch.float64).nan_to_num(nan=0.5)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
