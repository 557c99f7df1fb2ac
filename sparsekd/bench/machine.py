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
        "build": _digest(compiled.get("file")),
        **(more or {}),
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return {"id": hashlib.blake2b(text, digest_size=4).hexdigest(), **facts}


def keep_choices(folder: Path) -> None:
    """Keep what the dispatcher measures from now on in a folder of its own.

    So its choices are made on this machine as it is now, not as it was on a busy day, and every
    process of a run shares them. A SPARSEKD_CACHE that the user has set stays.

    Args:
        folder: made when the first choice is.
    """
    if not os.environ.get("SPARSEKD_CACHE"):
        os.environ["SPARSEKD_CACHE"] = str(folder.absolute())


def _digest(file: str | None) -> str | None:
    return file and hashlib.blake2b(Path(file).read_bytes(), digest_size=4).hexdigest()
