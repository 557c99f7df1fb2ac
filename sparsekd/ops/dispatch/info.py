"""The backends and versions of this machine, in plain values: `sparsekd info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from sparsekd import settings
from sparsekd.ops.dispatch.backends import BACKENDS, load, module
from sparsekd.ops.dispatch.context import forced
from sparsekd.ops.gpu import structure as gpu_structure


def info() -> dict[str, Any]:
    """Report versions, threads, and every backend with whether it can run.

    Returns:
        A dict of plain values: `torch`, `python`, `machine`, `threads`, `forced` (the backend
        asked for, or None), `default` (what CPU tensors get), `backends` (name to `available` and
        `detail`), `cpp`, what the compiled module says of itself, and `choices`, the file of
        measured choices, how many of them this process knows and how many were too close to tell
        apart (empty without the module), `gpu_plans`, how much GPU kernels keep between calls, and
        of a GPU `gpu_choices`, the same of choices between its backends, and `tuning`, of the sizes
        that Triton's kernels run with (both empty without one).

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

    def of(name: str) -> dict[str, Any]:
        return module(name).info() if table[name]["available"] else {}

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "forced": forced(),
        "default": "auto" if table["cpp"]["available"] else "reference",
        "backends": table,
        "cpp": of("cpp"),
        "choices": of("auto"),
        "gpu_plans": gpu_structure.info(),
        "gpu_choices": of("gpu"),
        "tuning": of("triton"),
    }
