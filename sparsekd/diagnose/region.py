"""Which modules of a network run in the layout of the CPU kernels, and why the others do not.

The network runs forward once. In the graph that autograd records, a block in the layout is one
node, and the parameters that enter it tell which modules the block consists of. So nothing has to
be registered on a module, which would take it out of the layout, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd._torch import function_of, is_bare
from sparsekd.diagnose.inputs import example_inputs, random_input, tensors_in
from sparsekd.modes import in_mode
from sparsekd.nn import SparseConv2d
from sparsekd.nn.blocked import conv_fits, input_fits
from sparsekd.nn.blocked_choice import IMAGE_CHANNELS, sure
from sparsekd.nn.fused import FUSED
from sparsekd.ops.cpu import blocked, preactivation

_NODES = {blocked.__name__, preactivation.__name__}
_PRINTED = 12


@dataclass(frozen=True)
class Region:
    """What runs in the layout of the kernels; print it for a summary.

    Args:
        blocks: names of the modules of each block, blocks in the order of the model.
        outside: name of each other module that has parameters -> why it runs on ordinary maps.
    """

    blocks: tuple[tuple[str, ...], ...]
    outside: dict[str, str]

    def __str__(self) -> str:
        inside = sum(map(len, self.blocks))
        lines = [
            f"in the layout of the kernels: {len(self.blocks)} blocks of {inside} modules, "
            f"{len(self.outside)} modules outside"
        ]
        lines += [f"  {', '.join(block)}" for block in self.blocks[:_PRINTED]]
        if rest := self.blocks[_PRINTED:]:
            lines.append(f"  and {len(rest)} more blocks")
        for why in dict.fromkeys(self.outside.values()):
            names = [name for name, other in self.outside.items() if other == why]
            more = f", and {len(names) - _PRINTED} more" if len(names) > _PRINTED else ""
            lines.append(f"  outside, as {why}: {', '.join(names[:_PRINTED])}{more}")
        return "\n".join(lines)


def region(model: nn.Module, *args: Any, **kwargs: Any) -> Region:
    """Find which modules of a network keep their activations in the layout of the CPU kernels.

    The network runs forward once, in evaluation mode; its parameters, statistics and flags stay as
    they were.

    Args:
        model: any network, as `optimize` has prepared it.
        *args: its inputs, the batch included, since small batches stay outside. A tuple or list of
            integers stands for random numbers in this shape.
        **kwargs: inputs by name. `args=` and `kwargs=` alone may hold all of them.

    Returns:
        Blocks inside, and the modules outside with the reason.

    Example:
        >>> import sparsekd as skd
        >>> model = skd.sparsify(skd.models.resnet20(), sparsity=0.9, distribution="uniform")
        >>> found = region(skd.optimize(model), (16, 3, 32, 32))
        >>> len(found.blocks), found.outside
        (10, {'fc': 'SparseLinear has no place in it'})
    """
    make = partial(random_input, memory_format=torch.channels_last)
    inputs, named = example_inputs(model, args, kwargs, make)
    with in_mode(model, training=False), _differentiable(model), torch.enable_grad():
        outputs = list(tensors_in(model(*inputs, **named)))
        found = [_parameters(node) for node in _nodes(outputs) if _in_layout(node)]
    owners = {
        id(parameter): name
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    order = {name: place for place, name in enumerate(dict.fromkeys(owners.values()))}
    blocks = [
        tuple(sorted({owners[key] for key in block if key in owners}, key=order.__getitem__))
        for block in found
    ]
    blocks = sorted((block for block in blocks if block), key=lambda block: order[block[0]])
    inside = {name for block in blocks for name in block}
    maps = next((t for t in tensors_in([inputs, named]) if t.ndim == 4), None)
    outside = {name: _why(model, name, maps) for name in order if name not in inside}
    return Region(tuple(blocks), outside)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Ask for the gradients of all parameters, frozen ones too, so that the graph has them."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _nodes(outputs: list[Tensor]) -> Iterator[Any]:
    """Iterate over the graph behind tensors."""
    waiting = [output.grad_fn for output in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [ahead for ahead, _ in node.next_functions]


def _in_layout(node: Any) -> bool:
    function = function_of(node)
    return function is not None and function.__module__ in _NODES


def _parameters(node: Any) -> set[int]:
    """Return the ids of the parameters that enter a node, by themselves or reshaped."""
    found = set()
    for ahead, _ in node.next_functions:
        while ahead is not None and len(ahead.next_functions) == 1 and function_of(ahead) is None:
            ahead = ahead.next_functions[0][0]
        if hasattr(ahead, "variable"):
            found.add(id(ahead.variable))
    return found


def _why(model: nn.Module, name: str, maps: Tensor | None) -> str:
    """Return why a module runs outside of the layout."""
    module: Any = model.get_submodule(name)
    sparse = isinstance(module, SparseConv2d)
    if not sparse and not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
        return f"{type(module).__name__} has no place in it"
    if not is_bare(module):
        return "it has hooks, or a forward of its own"
    if maps is None or not input_fits(maps, maps.shape):
        return "it takes maps of the CPU in float32 or float64, and batches that fill its lanes"
    if not isinstance(module, nn.BatchNorm2d):
        if not conv_fits(module, maps.dtype):
            return "it has no kernel for such a convolution" if sparse else "its weight is dense"
        if not sparse:
            reads_images = module.in_channels <= IMAGE_CHANNELS
            alone = "it is dense, and no sparse convolution follows at once"
            return alone if reads_images else "its weight is dense"
        if not sure(module):
            return "so many of its weights are stored that other kernels may be faster"
    parent = _caller(model, name)
    if type(parent) in FUSED:
        return "optimize was not called"
    if type(parent) not in FUSED.values():
        return f"optimize has no row for {type(parent).__name__}"
    return "the other modules of its block do not take part"


def _caller(model: nn.Module, name: str) -> nn.Module:
    """Return the innermost module that is no list of modules and holds `name`."""
    while True:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if not name or not isinstance(parent, nn.ModuleList | nn.ModuleDict):
            return parent
