"""`optimize`: fused BatchNorm and one memory layout, for cheap steps around the convolutions."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from sparsekd._torch import become
from sparsekd.nn.conv import SparseConv2d
from sparsekd.nn.fused import FUSED, load_rows
from sparsekd.ops.memory_format import memory_format_of

_log = logging.getLogger(__name__)


@torch.no_grad()
def optimize(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Prepare a model for fast steps on the CPU, in place, without changing what it computes.

    Modules that call an nn.BatchNorm2d, and that are known, get a class that runs it as one op with
    the residual addition and the ReLU behind it, forward and backward; the results equal the plain
    ones to rounding. Known are the networks of `sparsekd.models`, nn.Sequential, the blocks of
    torchvision's ResNets, DenseNets, MobileNets, RegNets, GoogLeNet and Inception, timm's
    BatchNormAct2d, and what `sparsekd.nn.register_fused` adds; only modules of exactly these
    classes change. `fused_norms` lists which norms that reaches and which are left, and `unfuse`
    takes it back.

    From one sparse convolution with a norm to the next, and through residual blocks, activations
    stay in the layout of the kernels, in batches of 10 images or more; see `sparsekd.nn.blocked`.
    `sparsekd.diagnose.region` lists what does, and why other modules do not.

    Modules stay the objects they are, with parameters, buffers, hooks, names and state_dict, and
    their new classes are subclasses of the old ones, so optimizers, `sparsify`, `densify` and
    rewiring are not concerned. Where a hook is registered on one of the modules that run as one,
    now or later, and on other devices and dtypes, they are called one after the other as before.

    Convolutions take the channels_last layout, so that the whole network runs in it whatever the
    layout of the images. Calling this again does nothing; call it after adding modules.

    Args:
        model: any module, sparse or dense.
        channels_last: False leaves the layout of the convolutions as it is.

    Returns:
        The model.

    Example:
        >>> import sparsekd as skd
        >>> model = skd.optimize(skd.sparsify(skd.models.resnet20(), sparsity=0.9))
        >>> print(skd.nn.fused_norms(model))
        21 of 21 BatchNorm2d fused
    """
    load_rows()
    for module in model.modules() if channels_last else ():
        if isinstance(module, SparseConv2d):
            module.channels_last = True
        elif isinstance(module, nn.Conv2d) and not nn.parameter.is_lazy(module.weight):
            _to_channels_last(module.weight)
    for module in model.modules():
        if type(module) in FUSED and _has_norm(module):
            become(module, FUSED[type(module)])
    _log.info("optimize: %s", fused_norms(model))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo the fusion of `optimize`, in place; the memory layout stays.

    Args:
        model: any module.

    Returns:
        The model, of modules of the classes that they had.

    Example:
        >>> import sparsekd as skd
        >>> print(fused_norms(unfuse(skd.optimize(skd.models.resnet20()))))
        0 of 21 BatchNorm2d fused
          left, as optimize was not called: bn1, layer1.0.bn1, ...
    """
    plain = {fused: cls for cls, fused in FUSED.items()}
    for module in model.modules():
        if type(module) in plain:
            become(module, plain[type(module)])
    return model


@dataclass(frozen=True)
class FusedNorms:
    """The norms of a model that run as one op with what follows them, and the others."""

    fused: tuple[str, ...]
    """Names of the norms."""

    left: dict[str, str]
    """Name of each other norm -> why it is left."""

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} BatchNorm2d fused"]
        for why in dict.fromkeys(self.left.values()):
            names = ", ".join(name for name, other in self.left.items() if other == why)
            lines.append(f"  left, as {why}: {names}")
        return "\n".join(lines)


def fused_norms(model: nn.Module) -> FusedNorms:
    """List the nn.BatchNorm2d of a model that `optimize` has fused, and why others are left.

    Args:
        model: any module.

    Returns:
        The names; `print` shows them with the reasons.

    Example:
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm = nn.BatchNorm2d(4)
        >>> model = optimize(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Head()))
        >>> print(fused_norms(model))
        1 of 2 BatchNorm2d fused
          left, as optimize has no row for Head: 2.norm
    """
    replaced = set(FUSED.values())
    fused, left = [], {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            if not isinstance(child, nn.BatchNorm2d):
                continue
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if type(child) in replaced or (
                type(parent) in replaced and type(child) is nn.BatchNorm2d
            ):
                fused.append(name)
            elif type(child) is not nn.BatchNorm2d and type(child) not in FUSED:
                left[name] = f"its class is {type(child).__name__}"
            elif {type(parent), type(child)} & set(FUSED):
                left[name] = "optimize was not called"
            else:
                left[name] = f"optimize has no row for {_caller(model, parent_name)}"
    return FusedNorms(tuple(fused), left)


def _caller(model: nn.Module, name: str) -> str:
    """Return the class of the innermost module that is no list of modules and holds `name`."""
    while name and isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return type(model.get_submodule(name)).__name__


def _has_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, calls one itself, or calls blocks one after the other."""
    return isinstance(module, nn.BatchNorm2d) or any(
        isinstance(child, nn.BatchNorm2d) or hasattr(FUSED.get(type(child)), "forward_blocked")
        for child in module.children()
    )


def _to_channels_last(weight: torch.Tensor) -> None:
    """Change the layout of a weight; the parameter stays the same object."""
    if weight.ndim == 4 and memory_format_of(weight) is not torch.channels_last:
        # clone also gives a single channel the strides that tell the layout
        weight.data = weight.data.clone(memory_format=torch.channels_last)
