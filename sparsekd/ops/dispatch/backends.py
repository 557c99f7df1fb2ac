"""Which implementation runs an op: the table of backends, the choice, and how to see it."""

from __future__ import annotations

import importlib
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from sparsekd import settings
from sparsekd._torch import environment, environment_key
from sparsekd.errors import BackendError, UnsupportedError

VARIABLE = "SPARSEKD_BACKEND"


@dataclass(frozen=True)
class Backend:
    """Describe one implementation of the ops.

    Args:
        name: what users call it.
        module: where its functions are, one per op; None for one this build does not have.
        device: the device type it runs on, None for any.
        dtypes: the dtypes it takes, None for any floating one.
        how_to_get: what a user must do to have it.
        extends: the backend that runs the ops it does not have.
    """

    name: str
    module: str | None
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    how_to_get: str
    extends: str | None = None


_ELSEWHERE = (
    "move the model to the CPU, or run it densely on any device with "
    '`with sparsekd.backend("reference"):`'
)
_TRITON = f"on Linux with a GPU, `pip install triton`; or {_ELSEWHERE}"
_CUDA = (
    "on a machine with a GPU and a torch that has CUDA, build with "
    "`SPARSEKD_CUDA=on pip install .` (needs nvcc on PATH or under CUDA_HOME); "
    f"or {_ELSEWHERE}"
)
_BUILD = "build the compiled module sparsekd._C with `pip install .` (needs a C++17 compiler)"
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("auto", "sparsekd.ops.dispatch.auto", "cpu", _CPU_DTYPES, _BUILD, "cpp"),
        Backend("cpp", "sparsekd.ops.cpu.cpp", "cpu", _CPU_DTYPES, _BUILD),
        Backend("dense", "sparsekd.ops.cpu.dense", "cpu", _CPU_DTYPES, _BUILD, "cpp"),
        Backend("reference", "sparsekd.ops.reference", None, None, "it is always there"),
        Backend("triton", "sparsekd.ops.triton.ops", "cuda", _GPU_DTYPES, _TRITON, "reference"),
        Backend("cuda", "sparsekd.ops.cuda.ops", "cuda", _GPU_DTYPES, _CUDA, "reference"),
        Backend("gpu", "sparsekd.ops.dispatch.gpu", "cuda", _GPU_DTYPES, _CUDA, "reference"),
    )
}

# Of the thread or the asyncio task at hand: contexts of others may end in any order.
_override: ContextVar[str | None] = ContextVar("sparsekd.backend", default=None)
_KEY = environment_key(VARIABLE)


@cache
def load(name: str) -> tuple[Any, str]:
    """Return the backend's module, or None and the reason why it cannot run here."""
    path = BACKENDS[name].module
    if path is None:
        return None, "not part of this build"
    try:
        return importlib.import_module(path), ""
    except ImportError as error:
        return None, str(error)


def module(name: str) -> Any:
    """Return the functions of a backend that can run here."""
    return load(_get(name).name)[0]


def _get(name: str) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    loaded, reason = load(name)
    if loaded is None:
        raise BackendError(
            f"backend {name!r} cannot run here ({reason}): {BACKENDS[name].how_to_get}"
        )
    return BACKENDS[name]


def forced() -> str | None:
    """Return the backend asked for by `backend(...)` or SPARSEKD_BACKEND, None for automatic."""
    override = _override.get()
    if override is not None or _KEY not in environment:
        return override
    return os.environ[VARIABLE] or None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of sparsekd on the named backend while the context lasts.

    It holds for the thread, or the asyncio task, that enters it, and for the backward passes that
    it runs inside; other threads are not affected, nor are those that it starts. A backward pass
    that comes to another thread runs on the backend that its forward pass was asked to run on:
    autograd has threads of its own for CUDA tensors. Outside, the environment variable
    SPARSEKD_BACKEND decides, and without it CPU tensors get "auto" and CUDA tensors "gpu".

    Args:
        name: "auto" for whichever of "cpp" and "dense" measures faster, op by op; "cpp" for the
            sparse kernels and nothing else; "dense" for torch's kernels on a weight that is
            densified for each call; "reference"; "triton" or "cuda", and "gpu" for whichever of
            them measures faster, op by op.

    Raises:
        BackendError: there is no such backend, or it cannot run here; the text says how to get it.

    Example:
        >>> import sparsekd as skd
        >>> with skd.backend("reference"):
        ...     y = skd.nn.SparseLinear(8, 4, sparsity=0.5)(torch.ones(2, 8))
    """
    before = _override.get()
    _override.set(_get(name).name)
    try:
        yield
    finally:
        _override.set(before)


class Asked(NamedTuple):
    """A backend that `backend(...)` asked for, and the thread it was asked for on."""

    name: str
    thread: int


def asked() -> Asked | None:
    """Return what `followed` is to follow; None, as nearly always, outside of `backend(...)`."""
    name = _override.get()
    return None if name is None else Asked(name, threading.get_ident())


def followed(forward: Asked) -> AbstractContextManager[None]:
    """Run a backward pass, where it has come to another thread, as its forward pass was asked to.

    Args:
        forward: `asked()` of the forward pass.
    """
    elsewhere = forward.thread != threading.get_ident()
    return backend(forward.name) if elsewhere and _override.get() is None else nullcontext()


def choose(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the function that runs `op` on tensors like `x`."""
    backend = _backend_for(x)
    own = module(backend.name)
    if backend.extends is not None and not hasattr(own, op):
        return getattr(module(backend.extends), op)
    return getattr(own, op)


def choose_measured(op: str, args: tuple[Any, ...]) -> Any:
    """Return what has a function of this name that runs a product on operands like these.

    Args:
        op: one of `dispatch.OPS`.
        args: those of its schema.
    """
    chosen = module(_backend_for(args[0]).name)
    return chosen.runner(op, args) if hasattr(chosen, "runner") else chosen


def running(op: str, args: tuple[Any, ...]) -> str:
    """Return the name of the backend whose kernels run a product on operands like these."""
    chosen = module(_backend_for(args[0]).name)
    chosen = chosen.backend_of(op, args) if hasattr(chosen, "backend_of") else chosen
    return chosen.NAME


def _backend_for(x: torch.Tensor) -> Backend:
    name = forced() or _automatic(x.device.type)
    if name not in BACKENDS:
        settings.get(VARIABLE)  # which names the variable, where it is the one that is wrong
    chosen = _get(name)
    if chosen.device is not None and x.device.type != chosen.device:
        raise BackendError(
            f"backend {name!r} runs on device {chosen.device!r}, got a tensor on {x.device}"
        )
    if not x.is_floating_point() or (chosen.dtypes is not None and x.dtype not in chosen.dtypes):
        supported = "floating dtypes" if chosen.dtypes is None else chosen.dtypes
        raise UnsupportedError(f"backend {name!r} supports {supported}, got {x.dtype}")
    return chosen


@cache
def _automatic(device: str) -> str:
    if device == "cuda":
        loaded, reason = load("gpu")
        if loaded is None:
            raise BackendError(f"no backend for device 'cuda' ({reason}): {_CUDA}")
        return "gpu"
    if device != "cpu":
        raise BackendError(f"no backend for device {device!r}: {_ELSEWHERE}")
    loaded, reason = load("cpp")
    if loaded is not None:
        return "auto"
    warnings.warn(
        f"sparsekd runs on the slow reference backend, its compiled module is missing ({reason}): "
        f"{BACKENDS['cpp'].how_to_get}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def info() -> dict[str, Any]:
    """Return what runs here: versions, threads, every backend and whether it can run.

    Returns:
        A dict of plain values: `torch`, `python`, `machine`, `threads`, `forced` (the backend
        asked for, or None), `default` (what CPU tensors get), `backends` (name to `available` and
        `detail`), `cpp`, what the compiled module says of itself, and `choices`, the file of
        measured choices, how many of them this process knows and how many were too close to tell
        apart (empty without the module), `gpu_plans`, how much GPU kernels keep between calls, and
        of a GPU `gpu_choices`, the same of choices between "cuda" and "triton", and `tuning`, of
        the sizes that Triton's kernels run with (both empty without one).

    Raises:
        SettingError: an environment variable of sparsekd has a value that it does not take.

    Example:
        >>> info()["backends"]["reference"]["available"]
        True
    """
    settings.check()
    table = {}
    for name, entry in BACKENDS.items():
        loaded, reason = load(name)
        detail = "" if loaded is not None else f"{reason}: {entry.how_to_get}"
        table[name] = {"available": loaded is not None, "detail": detail}
    compiled = load("cpp")[0]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "forced": forced(),
        "default": "auto" if compiled is not None else "reference",
        "backends": table,
        "cpp": {} if compiled is None else compiled.info(),
        "choices": {} if compiled is None else load("auto")[0].choices().info(),
        "gpu_plans": {} if compiled is None else _gpu_plans(),
        "gpu_choices": {} if load("gpu")[0] is None else load("gpu")[0].choices(),
        "tuning": {} if load("triton")[0] is None else load("triton")[0].tuning(),
    }


def _gpu_plans() -> dict[str, int]:
    return importlib.import_module("sparsekd.ops.gpu.structure").info()
