"""Who competes on a GPU: dense torch in every precision, its sparse storage, and our layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import sparsekd as skd
from sparsekd.bench.cases import LayerCase
from sparsekd.layouts import Layout
from sparsekd.testing import available_backends

_TF32 = torch.float16  # rounds as TF32 does, to eleven bits


@dataclass(frozen=True)
class GpuCompetitor:
    """One way to compute a layer or a training step on a GPU.

    Args:
        name: in rows.
        label: in tables and figures.
        layout: of its masks; None if it is dense.
        dtype: of its operands.
        tf32: whether float32 products may be rounded to TF32.
        channels_last: memory layout of maps and dense weights.
        storage: "weight" for torch's own layers and for ours, or what torch converts a masked
            matrix to for inference: "bsr" or "2:4".
        backend: of sparsekd that runs on a GPU; "gpu" is free to run dense.
    """

    name: str
    label: str
    layout: Layout | None = None
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    channels_last: bool = True
    storage: str = "weight"
    backend: str | None = None

    @property
    def sparse(self) -> bool:
        """Whether its time depends on the sparsity."""
        return self.layout is not None

    @property
    def precision(self) -> torch.dtype:
        """The dtype to whose rounding its results are held."""
        # Of dense ones too: cuDNN may choose Winograd's algorithm, which rounds more than float32.
        dense = not self.sparse and self.dtype == torch.float32
        return _TF32 if self.tf32 or dense else self.dtype

    @property
    def ours(self) -> bool:
        """Whether it runs kernels of sparsekd."""
        return self.sparse and self.storage == "weight"

    def missing(self, case: LayerCase, op: str, device: torch.device) -> str | None:
        """Return why it cannot run a layer here, None if it can."""
        if self.storage != "weight" and (case.kind != "linear" or op != "fprop"):
            return f"torch has no training with {self.storage} weights"
        if self.storage != "weight" and device.type != "cuda":
            return f"{self.storage} weights are timed on GPUs"
        if case.kind == "linear" and not self.channels_last:
            return "a matrix has one layout"
        if device.type == "cuda" and self.backend not in (None, *available_backends()):
            return f"the backend {self.backend} cannot run here"
        if self.tf32 and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8:
            return "TF32 needs compute capability 8.0"
        return None

    def rules(self) -> AbstractContextManager[Any]:
        """Return a context of its backend and of TF32, in which cuDNN chooses by measurement."""
        return _rules(self.tf32, self.backend) if torch.cuda.is_available() else nullcontext()


@contextmanager
def _rules(tf32: bool, backend: str | None) -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32, tf32
    try:
        with skd.backend(backend) if backend else nullcontext():
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


EXACT = GpuCompetitor("exact", "dense, float64", dtype=torch.float64, channels_last=False)
_BF16 = torch.bfloat16
CSR, _BCSR, _FANIN = Layout("csr"), Layout("bcsr", block=32), Layout("fanin", group=32, block=16)
_24 = Layout("nm")
COMPETITORS = {
    competitor.name: competitor
    for competitor in (
        GpuCompetitor("dense_fp32", "dense, float32, contiguous", channels_last=False),
        GpuCompetitor("dense_fp32_last", "dense, float32"),
        GpuCompetitor("dense_tf32", "dense, TF32", tf32=True),
        GpuCompetitor("dense_bf16", "dense, bfloat16", dtype=_BF16),
        GpuCompetitor("torch_bsr", "torch BSR 32, bfloat16", _BCSR, _BF16, storage="bsr"),
        GpuCompetitor("torch_24", "torch 2:4, bfloat16", _24, _BF16, storage="2:4"),
        GpuCompetitor("csr_fp32", "sparsekd csr, float32", CSR, backend="cuda"),
        GpuCompetitor("csr_bf16", "sparsekd csr, bfloat16", CSR, _BF16, backend="cuda"),
        GpuCompetitor("gpu_bf16", "sparsekd csr, bfloat16, chosen", CSR, _BF16, backend="gpu"),
        GpuCompetitor("bcsr_tf32", "sparsekd bcsr 32, TF32", _BCSR, tf32=True, backend="triton"),
        GpuCompetitor("bcsr_bf16", "sparsekd bcsr 32, bfloat16", _BCSR, _BF16, backend="triton"),
        GpuCompetitor(
            "fanin_bf16", "sparsekd fanin 32x16, bfloat16", _FANIN, _BF16, backend="triton"
        ),
        GpuCompetitor("nm_bf16", "sparsekd 2:4, bfloat16, chosen", _24, _BF16, backend="gpu"),
    )
}
