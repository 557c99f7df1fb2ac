"""FLOPs for torch's counter: a multiplication and an addition per nonzero and position.

torch's counter imports Triton where that is installed, which takes longer than all of sparsekd.
Hence the formulas are registered when something imports the counter, not before.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sparsekd.ops.register import namespace

_COUNTER = "torch.utils.flop_counter"


def _conv2d(x: Any, values: list[int], *args: Any, out_shape: list[int], **_: Any) -> int:
    return 2 * values[0] * out_shape[0] * math.prod(out_shape[2:])


def _conv2d_gradient(grad: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any):
    return 2 * col[0] * grad[0] * math.prod(grad[2:])


def _linear(x: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any) -> int:
    return 2 * col[0] * math.prod(x[:-1])


def _register(counter: ModuleType) -> None:
    register = counter.register_flop_formula
    register(namespace.conv2d)(_conv2d)
    register([namespace.conv2d_dgrad, namespace.conv2d_wgrad])(_conv2d_gradient)
    register([namespace.linear, namespace.linear_dgrad, namespace.linear_wgrad])(_linear)


class _Waiting:
    """A finder of modules that waits for the counter's import, and goes when it has seen it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Waiting())
