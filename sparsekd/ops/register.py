"""The ops as torch knows them: schemas, kernels, shapes of results, and autocast.

`autograd` adds derivatives, `flop_counter` the operations that torch's counter adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import without_autocast
from sparsekd.ops import checks
from sparsekd.ops.kernel import kernels
from sparsekd.ops.memory_format import memory_format_of
from sparsekd.ops.schemas import SCHEMAS

library = torch.library.Library("sparsekd", "DEF")
_MAPS = ("conv2d", "conv2d_dgrad")


def _fake(name: str) -> Callable[..., Tensor]:
    """Return the fake of an op: an empty result of the right shape, dtype and memory format."""
    check = getattr(checks, name)
    dtype = torch.int64 if name == "grow_topk" else None

    def fake(*args: Any) -> Tensor:
        checks.refuse_onnx()
        layout = memory_format_of(args[0]) if name in _MAPS else torch.contiguous_format
        result = args[0].new_empty(check(*args), dtype=dtype)
        return result.contiguous(memory_format=layout)

    return fake


# torch.compile records CUDA graphs by itself, and is to leave these ops out: the first call of a
# structure makes plans and keeps them, neither of which may happen in the memory of a graph.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=_TAGS)
    library.impl(_name, getattr(kernels, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekd::{_name}", _fake(_name), lib=library)

namespace = torch.ops.sparsekd
conv2d = namespace.conv2d.default
conv2d_dgrad = namespace.conv2d_dgrad.default
conv2d_wgrad = namespace.conv2d_wgrad.default
linear = namespace.linear.default
linear_dgrad = namespace.linear_dgrad.default
linear_wgrad = namespace.linear_wgrad.default
grow_topk = namespace.grow_topk.default
overloads = SimpleNamespace(**{name: getattr(namespace, name).default for name in SCHEMAS})
"""Every op by name, as `kernels` has what is below it."""


def _autocast(op: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Return an autocast rule: cast the factors and the bias; kernels accumulate in float32."""
    done = without_autocast(device)

    def run(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: Any) -> Any:
            # as torch's own rule has it, float64 stays float64
            lowered = isinstance(arg, Tensor) and arg.is_floating_point()
            return arg.to(dtype) if lowered and arg.dtype != torch.float64 else arg

        with done():
            return op(*map(cast, args))

    return run


for _device in ("cpu", "cuda"):
    library.impl("conv2d", _autocast(conv2d, _device), f"Autocast{_device.upper()}")
    library.impl("linear", _autocast(linear, _device), f"Autocast{_device.upper()}")
