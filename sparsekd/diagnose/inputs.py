"""Example inputs of a network, and the tensors in any output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn


def example_inputs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    make: Callable[[tuple[int, ...], torch.device, torch.dtype], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build the arguments of a call; a positional argument that is a shape becomes a tensor.

    Args:
        model: any network; tensors are made on the device and in the dtype of its parameters.
        args: positional arguments; a tuple or list of integers is a shape.
        kwargs: keyword arguments. None but `args` and `kwargs`, a tuple and a dictionary, are the
            arguments themselves, as torch.export takes them.
        make: a tensor from a shape, a device and a dtype.

    Raises:
        TypeError: `args` is no tuple or list, or `kwargs` no dictionary.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> zeros = lambda shape, device, dtype: torch.zeros(shape, device=device, dtype=dtype)
        >>> example_inputs(layer, [(1, 3)], {}, zeros)
        ((tensor([[0., 0., 0.]]),), {})
    """
    if kwargs and not args and kwargs.keys() <= {"args", "kwargs"}:
        args, kwargs = kwargs.get("args", ()), kwargs.get("kwargs") or {}
        if not isinstance(args, (tuple, list)):
            raise TypeError(f"args: expected a tuple of inputs, got {type(args).__name__}")
        if not isinstance(kwargs, Mapping):
            raise TypeError(f"kwargs: expected inputs by name, got {type(kwargs).__name__}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    made = tuple(make(tuple(a), like.device, like.dtype) if _is_shape(a) else a for a in args)
    return made, dict(kwargs)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in tuples, lists, dictionaries and dataclasses, nested or not.

    Args:
        output: of a network.

    Example:
        >>> [len(t) for t in tensors_in({"logits": torch.ones(2), "cache": (torch.ones(3), None)})]
        [2, 3]
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)
    elif is_dataclass(output):
        yield from tensors_in([getattr(output, field.name) for field in fields(output)])


def random_input(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Return normally distributed numbers, the same ones every time.

    Args:
        shape, device, dtype: of the tensor.
        memory_format: where it has four dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(size, Integral) and not isinstance(size, bool) for size in value
    )
