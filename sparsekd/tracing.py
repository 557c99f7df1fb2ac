"""Our modules in graphs of torch.fx: one node each, as torch's own modules are.

So the graph follows a rewire and `train()`, and `sparse_modules` finds its sparse modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from sparsekd._torch import is_bare


def stays_whole(module: nn.Module, forward: Callable[..., Tensor], x: Proxy) -> bool:
    """Return whether a call of `module` can be one node of the graph.

    It cannot where more is being traced than its forward pass, which would then run twice: hooks,
    or the forward of a subclass that calls this one. Nor where the module is all of the graph.

    Args:
        module: the one called.
        forward: the function that is running.
        x: what it was called with.
    """
    root = getattr(x.tracer, "root", module)
    return type(module).forward is forward and is_bare(module) and module is not root


def call_module(module: nn.Module, *args: Any) -> Any:
    """Record a call of `module`; return the proxy of its result.

    Args:
        module: the one called.
        *args: what it was called with, a proxy first.
    """
    tracer: Any = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
