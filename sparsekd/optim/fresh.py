"""The optimizer state that a new parameter starts from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekd.optim.placement import unwrapped


def fresh_state(optimizer: Optimizer, param: Parameter) -> Mapping[str, float]:
    """Find the number that each state entry of a new parameter starts from.

    A second optimizer of the same class and options gets a single weight, and the first value of
    each state entry is recorded, whether the constructor or the first step creates it: 0 for
    momenta, the learning rate for Rprop's step sizes, `initial_accumulator_value` for Adagrad's
    sums.

    Args:
        optimizer: any optimizer; neither it nor torch's random state changes.
        param: one of its parameters, for options, dtype and device.

    Returns:
        Key of the state -> number. Empty, with a RuntimeWarning, if the second optimizer cannot be
        built or stepped.

    Example:
        >>> weight = Parameter(torch.ones(3))
        >>> fresh_state(torch.optim.Rprop([weight], lr=0.25), weight)["step_size"]
        0.25
    """
    optimizer = unwrapped(optimizer)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            first = _first_state(optimizer, param)
    except Exception as error:
        warnings.warn(
            f"{type(optimizer).__name__}: cannot tell what state a new weight starts from, 0 is "
            f"taken ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=3,
        )
        return {}
    return {
        key: value.item()
        for key, value in first.items()
        if isinstance(value, Tensor) and value.numel() == 1
    }


def _first_state(optimizer: Optimizer, param: Parameter) -> dict[str, Any]:
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    probe = Parameter(torch.zeros(1, dtype=param.dtype, device=param.device))
    probe.grad = torch.zeros_like(probe)
    accepted = inspect.signature(type(optimizer)).parameters
    known = {k: v for k, v in (optimizer.defaults | options).items() if k in accepted}
    twin = type(optimizer)([{**options, "params": [probe]}], **known)
    state = twin.state[probe] = _FirstValues(twin.state.get(probe, {}))
    twin.step()
    return {**state, **state.first}


class _FirstValues(dict[str, Any]):
    """A state dict that records the first value of each key."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        self.update(state)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, Tensor) else value
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others: Any, **more: Any) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = value
