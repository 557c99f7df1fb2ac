"""The machine of a row: processor, instruction sets, threads, versions, allocator."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sparsekd as skd
from sparsekd.memory import keep_memory_warm
from sparsekd.ops.cpu.processor import cpu_name


def describe(more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe this machine and process; applies the allocator setting that all competitors get.

    Args:
        more: what else tells rows apart, as the GPU.

    Returns:
        Plain values. `build` is a digest of the compiled module, so that rows of different kernels
        are never taken for rows of one; `id` sums up everything else here.

    Example:
        >>> describe()["torch"] == torch.__version__
        True
    """
    compiled = skd.ops.info()["cpp"]
    file = compiled.get("file")
    facts = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": compiled.get("isa"),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        "threads": torch.get_num_threads(),
        "memory_warm": keep_memory_warm(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsekd": skd.__version__,
        "build": file and _digest(Path(file).read_bytes()),
        **(more or {}),
    }
    return {"id": _digest(json.dumps(facts, sort_keys=True).encode()), **facts}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()
