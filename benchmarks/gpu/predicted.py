"""What a data sheet allows a competitor of the layer races, by `benchmarks.gpu_roofline`."""

from __future__ import annotations

import torch

from benchmarks.gpu.competitors import GpuCompetitor
from benchmarks.gpu_roofline import (
    Gpu,
    Kernel,
    bound,
    dense,
    gather,
    layer_of,
    sample,
    tile_product,
    tile_sample,
)
from sparsekd.bench.cases import LayerCase


def predicted_ms(
    one: GpuCompetitor, case: LayerCase, op: str, sparsity: float, gpu: Gpu
) -> float | None:
    """Return the milliseconds that a layer takes at the least, None where no bound is known.

    Args:
        one: the competitor.
        case: the layer.
        op: "layer" for forward and backward, "fprop" for the forward pass.
        sparsity: of the weight; 0 of dense ones.
        gpu: the data sheet.

    Example:
        >>> from benchmarks.gpu.competitors import COMPETITORS
        >>> from benchmarks.gpu_roofline import A100
        >>> case = LayerCase("linear", 4096, 4096, batch=4096)
        >>> dense = predicted_ms(COMPETITORS["dense_fp32"], case, "fprop", 0.0, A100)
        >>> round(dense, 3), round(2 * 4096**3 / 19.5e12 * 1e3, 3)
        (7.048, 7.048)
    """
    kernels = _kernels(one)
    if kernels is None:
        return None
    product, gradient = kernels
    layer = layer_of(case, one.dtype)
    passes = [(product, layer)]
    if op == "layer":
        passes += [(product, layer.exchanged), (gradient, layer)]
    seconds = (
        bound(kernel, shape, 1 - sparsity, gpu, _arithmetic(one)) for kernel, shape in passes
    )
    return 1e3 * sum(seconds)


def _kernels(one: GpuCompetitor) -> tuple[Kernel, Kernel] | None:
    """Return the kernel of products, and that of weight gradients."""
    if one.layout is None:
        return dense, dense
    if one.ours and one.layout.name == "csr" and one.backend == "cuda":
        return gather, sample
    if one.ours and one.layout.name == "bcsr":
        return tile_product(one.layout.tile[0]), tile_sample(one.layout.tile[0])
    return None


def _arithmetic(one: GpuCompetitor) -> str:
    if one.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if one.tf32 else "fp32"
