"""The GPU that rows were measured on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparsekd import cuda_library, ops
from sparsekd.errors import UnsupportedError


def gpu() -> torch.device:
    """Return the current GPU.

    Raises:
        UnsupportedError: there is none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("device: expected one that torch sees as a CUDA device, found none")
    return torch.device("cuda")


def describe(device: torch.device) -> dict[str, Any]:
    """Describe a device, for the rows measured on it.

    Example:
        >>> describe(torch.device("cpu"))["device"]
        'cpu'
    """
    if device.type != "cuda":
        return {"device": device.type}
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": kernels_digest(),
        "backends": ", ".join(name for name, b in ops.info()["backends"].items() if b["available"]),
    }


def kernels_digest() -> str:
    """Return a digest of the GPU kernels, so that rows of others are never taken for theirs.

    Example:
        >>> len(kernels_digest())
        8
    """
    sources = sorted((Path(ops.__file__).parents[1] / "kernels").glob("*.py"))
    digest = hashlib.blake2b(digest_size=4)
    for path in (cuda_library.PATH, *sources):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()
