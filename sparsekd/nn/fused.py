"""The table of modules that `optimize` replaces, with their replacements.

A row is a class and a subclass of it, whose forward runs each norm together with what follows it by
`norm_act`. The subclass holds nothing of its own: a module and its replacement share parameters,
buffers, children and hooks, so either can take the other's place at any time. Rows for classes of
other libraries are in files that are imported once the library is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.nn.blocked import Blocked, call_blocked, conv_norm_act_blocked, leave
from sparsekd.nn.norm_act import FusedBatchNormAct2d, norm_act

_Module = TypeVar("_Module", bound=nn.Module)

FUSED: dict[type[nn.Module], type[nn.Module]] = {BatchNormAct2d: FusedBatchNormAct2d}
"""Class of a module -> class of its replacement; `register_fused` adds to it."""

_LIBRARIES = {
    "torchvision.models": "sparsekd.nn.fused_torchvision",
    "timm.layers": "sparsekd.nn.fused_timm",
}


def register_fused(plain: type[nn.Module]) -> Callable[[type[_Module]], type[_Module]]:
    """Register the class that `optimize` puts in the place of modules of exactly class `plain`.

    Args:
        plain: a class of modules that call nn.BatchNorm2d, or are one.

    Returns:
        A decorator of the replacement: a subclass of `plain` with another forward and without an
        `__init__` or attributes of its own.

    Raises:
        TypeError: the replacement is no subclass of `plain`.

    Example:
        >>> import torch, sparsekd as skd
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        ...     def forward(self, x):
        ...         return torch.relu(self.norm(self.conv(x)) + x)
        >>> @skd.nn.register_fused(Block)
        ... class FusedBlock(Block):
        ...     def forward(self, x):
        ...         return skd.nn.conv_norm_act(self.conv, self.norm, x, torch.relu, residual=x)
        >>> print(skd.nn.fused_norms(skd.optimize(nn.Sequential(Block()))))
        1 of 1 BatchNorm2d fused
    """

    def register(replacement: type[_Module]) -> type[_Module]:
        if not issubclass(replacement, plain):
            raise TypeError(f"{replacement.__name__}: expected a subclass of {plain.__name__}")
        FUSED[plain] = replacement
        return replacement

    return register


def load_rows() -> None:
    """Add the rows for libraries that have been imported by now."""
    importlib.import_module("sparsekd.nn.blocked_models")
    importlib.import_module("sparsekd.nn.preactivation")
    for library, rows in _LIBRARIES.items():
        if library in sys.modules:
            importlib.import_module(rows)


@register_fused(nn.Sequential)
class FusedSequential(nn.Sequential):
    """Modules in a row, each BatchNorm2d as one op with a ReLU behind it.

    Example:
        >>> import torch
        >>> FusedSequential(nn.BatchNorm2d(2), nn.ReLU())(torch.ones(4, 2, 3, 3)).sum().item()
        0.0
    """

    def forward_blocked(self, x: Tensor | Blocked) -> Tensor | Blocked:
        """Call one module after the other, on ordinary or blocked images."""
        rest = list(self)
        while rest:
            conv, norm = None, rest.pop(0)
            if type(norm) is not nn.BatchNorm2d and rest and type(rest[0]) is nn.BatchNorm2d:
                conv, norm = norm, rest.pop(0)
            if type(norm) is not nn.BatchNorm2d:
                x = call_blocked(norm, x)
                continue
            act = rest.pop(0) if rest and type(rest[0]) is nn.ReLU else None
            if conv is None:
                x = norm_act(norm, leave(x), act)
            else:
                x = conv_norm_act_blocked(conv, norm, x, act, rest[0] if rest else None)
        return x

    def forward(self, input: Tensor) -> Tensor:
        """Call one module after the other."""
        return leave(self.forward_blocked(input))
