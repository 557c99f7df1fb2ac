"""A user's model and example inputs, as a command line names them."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.diagnose.inputs import tensors_in
from sparsekd.errors import UnsupportedError
from sparsekd.sparsity import generator_for


def factory(name: str, what: str = "network") -> Callable[[], Any]:
    """Return the function that "package.module:function" or "file.py:function" names.

    Args:
        name: of the function, without arguments.
        what: it is for, in errors.

    Raises:
        UnsupportedError: there is none.

    Example:
        >>> factory("sparsekd.models:lenet5")().fc3.out_features
        10
    """
    place, _, function = name.rpartition(":")
    try:
        found = getattr(_module(place), function)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise UnsupportedError(
            f"{what}: expected package.module:factory, got {name!r}: {error}"
        ) from error
    if not callable(found):
        raise UnsupportedError(f"{what}: expected a function, {name!r} is a {type(found).__name__}")
    return found


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(name: str) -> nn.Module:
    """Build the model of a factory, the same one every time.

    Args:
        name: "package.module:factory" or "file.py:factory".

    Raises:
        UnsupportedError: there is no such function, it raised, or it returned no module.
    """
    model = _call("model", name)
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"model: expected {name} to return a module, got {type(model).__name__}"
        )
    return model


def _call(what: str, name: str) -> Any:
    """Call a function of the user's, with torch's global generator seeded."""
    function = factory(name, what)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return function()
        except Exception as error:
            raise UnsupportedError(
                f"{what}: {name} raised {type(error).__name__}: {error}"
            ) from error


def check_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a model takes its example inputs, by one forward pass of a copy.

    Args:
        model: the copy is in its mode, training or evaluation.
        args: by position.
        kwargs: by name.

    Raises:
        UnsupportedError: the pass raised; the message has what.

    Example:
        >>> check_call(nn.Linear(4, 2), [torch.ones(1, 4)], {})
    """
    trial = copy.deepcopy(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(*args, **kwargs)
    except Exception as error:  # of the user's own code as well
        shapes = ", ".join("x".join(map(str, x.shape)) for x in tensors_in([args, dict(kwargs)]))
        raise UnsupportedError(
            f"input: the model does not take {shapes or 'it'}: {type(error).__name__}: {error}"
        ) from error


def parse_input(text: str) -> Tensor:
    """Draw the input that "SHAPE", "SHAPE:DTYPE" or "SHAPE:DTYPE:BELOW" describes.

    Args:
        text: sizes with commas between them; a dtype of torch, by default float32; for integers,
            such as token ids, the number that they lie below, by default 2.

    Returns:
        Random numbers: normal ones, or integers from 0.

    Raises:
        UnsupportedError: the text does not have this form; the message says which it has.

    Example:
        >>> parse_input("2,3,8,8").shape
        torch.Size([2, 3, 8, 8])
        >>> ids = parse_input("4,16:int64:30522")
        >>> ids.dtype, bool((ids < 30522).all())
        (torch.int64, True)
    """
    shape, dtype_name, below = (*text.split(":"), "", "")[:3]
    words = [word.strip() for word in shape.split(",")]
    dtype = getattr(torch, dtype_name or "float32", None)
    valid = (
        text.count(":") <= 2
        and all(word.isdecimal() and int(word) > 0 for word in words)
        and isinstance(dtype, torch.dtype)
        and (not below or (below.isdecimal() and int(below) > 0))
    )
    if not valid or not isinstance(dtype, torch.dtype):
        raise UnsupportedError(
            f"input: expected sizes, as 128,3,32,32, with a dtype and for integers a bound behind "
            f"them, as 8,128:int64:30522; got {text!r}"
        )
    sizes, generator = tuple(map(int, words)), generator_for(0, text)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, int(below or 2), sizes, generator=generator).to(dtype)


def example_call(
    inputs: Sequence[str], function: str | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a model is called with.

    Args:
        inputs: texts as `parse_input` takes them, one for each positional argument.
        function: instead of them, "package.module:function" or "file.py:function": it returns a
            tensor, a tuple of arguments, or a mapping of arguments by name.

    Raises:
        UnsupportedError: both are given, or none; the function is not there, or it raised.

    Example:
        >>> [tuple(x.shape) for x in example_call(["2,3", "2,5:int64:10"], None)[0]]
        [(2, 3), (2, 5)]
    """
    if bool(inputs) == (function is not None):
        raise UnsupportedError(
            "input: expected --input, as 128,3,32,32, or --inputs with a function that returns "
            "example inputs, and not both"
        )
    if function is None:
        return tuple(map(parse_input, inputs)), {}
    found = _call("inputs", function)
    if isinstance(found, Mapping):
        return (), dict(found)
    return (tuple(found) if isinstance(found, (tuple, list)) else (found,)), {}
