"""The backends: one table, and the protocol they share.

A backend says which ops it has and decides what runs a product. Most run it themselves; "auto" and
"gpu" choose among others. Which backend a tensor gets is in `decisions`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from sparsekd.errors import BackendError, UnavailableError
from sparsekd.ops.dispatch.cache_key import Key

PRODUCTS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad")
"""The ops that compute with a weight, of which some backends choose each by its operands."""

BY_STRUCTURE = "structure of the weight"
"""The reason of a choice on a GPU that no measurement has made."""

_OPTIONAL = ("sparsekd._C", "triton")  # modules that an installation may lack


@dataclass(frozen=True)
class Decision:
    """The backend of a product on given operands, and why.

    Args:
        backend: the name of the backend whose kernels run it.
        run: the function to call, with the operands of the schema.
        whole: for a weight without zeros, torch's own layer, derivative included; it may return
            None, and then `run` computes. None where the backend has no such function.
        reason: a rule, or where the measurement comes from.
        key: what measurements are looked up by; None where a rule decides.
        ms: milliseconds by backend, as far as they are known.
    """

    backend: str
    run: Callable[..., Any]
    whole: Callable[..., Any] | None = None
    reason: str = "this backend runs every product itself"
    key: Key | None = None
    ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops.

    Args:
        name: what users call it.
        module: where its functions are, one per op.
        device: the device type it runs on, None for any.
        dtypes: the dtypes it takes, None for any floating one.
        how_to_get: what a user must do to have it.
        extends: the backend that runs the ops it does not have, and products that it does not take.
    """

    name: str
    module: str
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    how_to_get: str
    extends: str | None = None

    def supports(self, op: str) -> bool:
        """Return whether it has a function of its own for an op."""
        return op in vars(module(self.name))

    def takes(self, op: str, args: tuple[Any, ...]) -> bool:
        """Return whether its own function runs a product on these operands.

        A module that has a function for some operands only has a function `takes` that says which.
        """
        among = getattr(module(self.name), "takes", None)
        return self.supports(op) and (among is None or among(op, args))

    def function(self, op: str) -> Callable[..., Any]:
        """Return the function that runs an op: its own, or that of the backend it extends."""
        if self.extends is not None and not self.supports(op):
            return BACKENDS[self.extends].function(op)
        return getattr(module(self.name), op)

    def prepared(self, op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Return a function for calls like this one, with equal `cache_key.call_key`.

        That is `function`, or what its module has prepared, which checks and converts less.
        """
        prepare = getattr(module(self.name), "prepare", None)
        return (prepare and prepare(op, args)) or self.function(op)

    def decide(self, op: str, args: tuple[Any, ...]) -> Decision:
        """Decide what runs a product on these operands.

        Args:
            op: one of `PRODUCTS`.
            args: those of its schema.
        """
        if self.extends is not None and not self.takes(op, args):
            return BACKENDS[self.extends].decide(op, args)
        whole = f"whole_{op}"
        return Decision(
            self.name, self.function(op), self.function(whole) if self.supports(whole) else None
        )


class Choosing(Backend):
    """A backend that chooses, product by product, which other one runs it."""

    def decide(self, op: str, args: tuple[Any, ...]) -> Decision:
        """Return the decision of its module for these operands."""
        return module(self.name).decide(op, args)


ELSEWHERE = (
    "move the model to the CPU, or run it densely on any device with "
    '`with sparsekd.backend("reference"):`'
)
_TRITON = f"on Linux with a GPU, `pip install triton`; or {ELSEWHERE}"
_CUDA = (
    "on a machine with a GPU and a torch that has CUDA, build with "
    "`SPARSEKD_CUDA=on pip install .` (needs nvcc on PATH or under CUDA_HOME); "
    f"or {ELSEWHERE}"
)
_SEMI_STRUCTURED = f"on Linux with an NVIDIA GPU of compute capability 8.x; or {ELSEWHERE}"
_BUILD = "build the compiled module sparsekd._C with `pip install .` (needs a C++17 compiler)"
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS = {
    backend.name: backend
    for backend in (
        Choosing("auto", "sparsekd.ops.dispatch.auto", "cpu", _CPU_DTYPES, _BUILD, "cpp"),
        Backend("cpp", "sparsekd.ops.cpu.cpp", "cpu", _CPU_DTYPES, _BUILD),
        Backend("dense", "sparsekd.ops.cpu.dense", "cpu", _CPU_DTYPES, _BUILD, "cpp"),
        Backend("reference", "sparsekd.ops.reference", None, None, "it is always there"),
        Backend("triton", "sparsekd.ops.triton.ops", "cuda", _GPU_DTYPES, _TRITON, "reference"),
        Backend("cuda", "sparsekd.ops.cuda.ops", "cuda", _GPU_DTYPES, _CUDA, "reference"),
        Backend(
            "semi_structured", "sparsekd.ops.semi_structured.ops", "cuda", _GPU_DTYPES,
            _SEMI_STRUCTURED, "gpu",
        ),
        Backend("dense_cuda", "sparsekd.ops.cuda.dense", "cuda", _GPU_DTYPES, _CUDA, "gpu"),
        Choosing("gpu", "sparsekd.ops.dispatch.gpu", "cuda", _GPU_DTYPES, _CUDA, "reference"),
    )
}  # fmt: skip


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """Return a backend's module, or None and the reason why it cannot run here.

    That is so where the compiled module, Triton or a GPU is missing. Any other error of an import
    is a fault, of sparsekd or of an installation, and is raised as it is.
    """
    try:
        return importlib.import_module(BACKENDS[name].module), ""
    except UnavailableError as error:
        return None, str(error)
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL:
            raise
        return None, str(error)


def module(name: str) -> Any:
    """Return the module of a backend; raise BackendError, which says how to get it, without one."""
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    loaded, reason = load(name)
    if loaded is None:
        raise BackendError(
            f"backend {name!r} cannot run here ({reason}): {BACKENDS[name].how_to_get}"
        )
    return loaded


def can_take(name: str, op: str, args: tuple[Any, ...]) -> bool:
    """Return whether a backend can run here, and takes a product on these operands."""
    return load(name)[0] is not None and BACKENDS[name].takes(op, args)
