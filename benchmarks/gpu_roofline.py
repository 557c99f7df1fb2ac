"""Bound the GPU kernels on paper, for GPUs that nobody here has: prints the tables of docs/gpu.md.

A kernel takes at least as long as its arithmetic at the peak of the units it uses, as its accesses
to shared memory at 128 bytes a clock and multiprocessor, as its reads from L2 at the L2's
bandwidth, and as its traffic with memory at the memory's. Real kernels reach a
part of the largest of the four. Dense products in cuBLAS and cuDNN come near the peak where
matrices are large, so they are taken at it, which favours dense. Nothing here was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sparsekd.bench.cases import LayerCase
from sparsekd.ops.cuda.plans import forward_cut
from sparsekd.ops.gpu.convolution import Conv

SPARSITY = 0.9


@dataclass(frozen=True)
class Gpu:
    """A data sheet, in operations and bytes a second.

    NVIDIA A100 Tensor Core GPU Architecture (2020), tables 1 and 4; NVIDIA H100 Tensor Core GPU
    Architecture (2022), tables 2 and 3; both SXM, without sparsity. The H100's L2 is not in it; the
    A100's 5,120 bytes a clock are assumed. NVIDIA H200 Tensor Core GPU, data sheet (2023): an H100
    with faster memory.
    """

    name: str
    fp32: float
    tf32: float
    bf16: float
    shared: float
    l2: float
    memory: float

    def peak(self, arithmetic: str) -> float:
        """Return the peak of "fp32", "tf32" or "bf16"."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[arithmetic]


A100 = Gpu("A100", 19.5e12, 156e12, 312e12, 108 * 128 * 1.41e9, 5120 * 1.41e9, 2.039e12)
H100 = Gpu("H100", 66.9e12, 494.7e12, 989.4e12, 132 * 128 * 1.83e9, 5120 * 1.83e9, 3.35e12)
H200 = replace(H100, name="H200", memory=4.8e12)
GPUS = (A100, H100, H200)


def sheet_of(device: str) -> Gpu | None:
    """Return the data sheet of a device by its name, None if it is of none of these.

    Example:
        >>> sheet_of("NVIDIA A100-SXM4-80GB").name, sheet_of("NVIDIA GH200 480GB")
        ('A100', None)
    """
    words = re.split(r"\W+", device)
    return next((gpu for gpu in GPUS if gpu.name in words), None)


@dataclass(frozen=True)
class Layer:
    """A layer: `positions` outputs of each of `outs` channels, `fan_in` weights each.

    Its input, without the pixels that no tap meets, and its output have `maps` elements. A block of
    csrc/cuda reads windows `halo` times as large as the outputs that it computes, a `chunk` of
    channels at a time.
    """

    name: str
    channels: int
    outs: int
    fan_in: int
    positions: int
    maps: int
    halo: float
    chunk: int

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return self.outs * self.fan_in

    @property
    def exchanged(self) -> Layer:
        """The layer whose forward pass stands for the input gradient.

        It is that with a stride of 1; with another, as many products go in phases, over windows
        about as large.
        """
        fan_in = self.numel // self.channels
        return replace(self, channels=self.outs, outs=self.channels, fan_in=fan_in)


def layer_of(case: LayerCase, dtype: torch.dtype = torch.float32) -> Layer:
    """Describe a layer, as csrc/cuda cuts it in a dtype.

    Example:
        >>> layer = layer_of(LayerCase("conv", 64, 128, size=32, kernel=3, stride=2, batch=8))
        >>> layer.name, layer.halo * 32  # a patch is 4x8 outputs
        ('convolution 3x3, 64>128, 32x32 maps, stride 2, batch 8', 153.0)
        >>> layer.maps == 8 * (64 * 32 * 32 + 128 * 16 * 16)
        True
    """
    name = f"linear {case.channels}>{case.outs}, {case.batch} rows"
    if case.kind == "conv":
        stride = f", stride {case.stride}" if case.stride > 1 else ""
        name = (
            f"convolution {case.kernel}x{case.kernel}, {case.channels}>{case.outs}, "
            f"{case.size}x{case.size} maps{stride}, batch {case.batch}"
        )
    shape = (case.outs, case.channels, case.kernel, case.kernel)
    conv = Conv(shape, (case.stride,) * 2, (case.padding,) * 4, (1, 1), 1)
    x = torch.empty(case.batch, dtype=dtype, device="meta")
    cut = forward_cut(conv, x, (case.out_size, case.out_size))
    read = min(case.size, case.out_size * case.kernel)
    return Layer(
        name,
        case.channels,
        case.outs,
        case.fan_in,
        case.positions,
        maps=case.batch * (case.channels * read**2 + case.outs * case.out_size**2),
        halo=math.prod(axis.patches * axis.window / axis.outputs for axis in cut.axes),
        chunk=cut.chunk,
    )


LAYERS = (
    layer_of(LayerCase("conv", 256, 256, size=16, kernel=3)),
    layer_of(LayerCase("linear", 4096, 4096, batch=4096)),
)


@dataclass(frozen=True)
class Demand:
    """Needs of a kernel: operations, bytes from and to memory, from L2, and of shared memory."""

    flops: float
    memory: float
    l2: float = 0.0
    shared: float = 0.0

    def seconds(self, gpu: Gpu, arithmetic: str) -> dict[str, float]:
        """Return the time at each of the roofs."""
        return {
            "arithmetic": self.flops / gpu.peak(arithmetic),
            "shared memory": self.shared / gpu.shared,
            "L2": self.l2 / gpu.l2,
            "memory": self.memory / gpu.memory,
        }


Kernel = Callable[[Layer, float, str], Demand]


def _size(arithmetic: str) -> int:
    return 2 if arithmetic == "bf16" else 4


def dense(layer: Layer, density: float, arithmetic: str) -> Demand:
    """A dense pass; density has no say in it."""
    size = _size(arithmetic)
    moved = size * (layer.maps + layer.numel)
    return Demand(2.0 * layer.numel * layer.positions, moved)


def gather(layer: Layer, density: float, arithmetic: str) -> Demand:
    """`gather_kernel`: a window for every 64 rows, from which each nonzero is read at all outputs.

    A nonzero is broadcast to 32 lanes of 16 bytes by an access of 128 bytes.
    """
    size, nnz = _size(arithmetic), density * layer.numel
    products = size * nnz * layer.positions
    moved = size * layer.maps + nnz * (size + 8)
    window = size * layer.channels * layer.positions * layer.halo * math.ceil(layer.outs / 64)
    reads = window + nnz * (size + 8) * layer.positions * size / (32 * 16)
    return Demand(2 * nnz * layer.positions, moved, reads, 1.25 * products + window)


def sample(layer: Layer, density: float, arithmetic: str) -> Demand:
    """`sample_kernel`: a window for every 32 rows, and the gradients of these for every chunk.

    Nonzeros are broadcast as in gather, 31 shuffles fold 32 of them, and those of a row that a
    chunk has share a vector of the gradient.
    """
    size, nnz = _size(arithmetic), density * layer.numel
    products = size * nnz * layer.positions
    together = max(density * layer.chunk * layer.fan_in / layer.channels, 1.0)
    moved = size * layer.maps + nnz * (size + 8)
    window = size * layer.channels * layer.positions * layer.halo * math.ceil(layer.outs / 32)
    window += size * layer.outs * layer.positions * math.ceil(layer.channels / layer.chunk)
    return Demand(
        2 * nnz * layer.positions, moved, window, (1.5 + 1 / together) * products + window
    )


def grow(layer: Layer, density: float, arithmetic: str) -> Demand:
    """`grow_*`: keys of 8 bytes, written once, read nine times to count and to take."""
    return Demand(0.0, layer.numel * (4.0 + 8.0 + 9 * 8.0))


def tile_product(block: int, positions: int = 128) -> Kernel:
    """`tile_product`: an input tile serves `block` channels, a weight tile `positions` outputs."""

    def demand(layer: Layer, density: float, arithmetic: str) -> Demand:
        size, nnz = _size(arithmetic), density * layer.numel
        moved = size * (layer.maps + nnz)
        reads = size * nnz * layer.positions * (1 / block + 1 / positions)
        return Demand(2 * nnz * layer.positions, moved, reads)

    return demand


def tile_sample(block: int) -> Kernel:
    """`tile_sample`: per tile of the weight a tile of gradients and one of inputs."""

    def demand(layer: Layer, density: float, arithmetic: str) -> Demand:
        size, nnz = _size(arithmetic), density * layer.numel
        moved = size * layer.maps + 8 * nnz
        return Demand(2 * nnz * layer.positions, moved, size * nnz * layer.positions * 2 / block)

    return demand


KERNELS = (
    ("gather", "fp32", gather),
    ("gather", "bf16", gather),
    ("sample", "fp32", sample),
    ("sample", "bf16", sample),
    ("grow", "fp32", grow),
    *((f"tile_product, block {b}", "bf16", tile_product(b)) for b in (16, 32, 64, 128)),
    ("tile_product, block 64", "tf32", tile_product(64)),
    *((f"tile_sample, block {b}", "bf16", tile_sample(b)) for b in (16, 32, 64, 128)),
)


def bound(kernel: Kernel, layer: Layer, density: float, gpu: Gpu, arithmetic: str) -> float:
    """Return the seconds that a kernel takes at the least."""
    return max(kernel(layer, density, arithmetic).seconds(gpu, arithmetic).values())


def break_even(layer: Layer, gpu: Gpu, arithmetic: str, kernel: Kernel, rival: str) -> float | None:
    """Return the sparsity from which a kernel's bound is below dense's, None if there is none.

    Args:
        layer: the layer.
        gpu: the GPU.
        arithmetic: of the kernel.
        kernel: its demand.
        rival: arithmetic of the dense product.
    """
    aim = bound(dense, layer, 1.0, gpu, rival)
    low, high = 0.0, 1.0  # densities
    if bound(kernel, layer, low, gpu, arithmetic) > aim:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        slower = bound(kernel, layer, middle, gpu, arithmetic) > aim
        low, high = (low, middle) if slower else (middle, high)
    return 1 - low


def table(layer: Layer, gpu: Gpu) -> str:
    """Return the Markdown table of a layer on a GPU."""
    lines = [
        f"| {gpu.name}, {layer.name} | GFLOP | shared MB | L2 MB | memory MB | bound | us | "
        "beats dense fp32 from | TF32 | bf16 |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, arithmetic, kernel in KERNELS:
        demand = kernel(layer, 1 - SPARSITY, arithmetic)
        times = demand.seconds(gpu, arithmetic)
        roof = max(times, key=lambda name: times[name])
        sizes = [demand.flops / 1e9, demand.shared / 1e6, demand.l2 / 1e6, demand.memory / 1e6]
        cells = [f"{size:,.0f}" if size else "-" for size in sizes]
        if demand.flops:
            rivals = [
                break_even(layer, gpu, arithmetic, kernel, r) for r in ("fp32", "tf32", "bf16")
            ]
            cells += [roof, f"{1e6 * times[roof]:,.0f}"]
            cells += ["never" if r is None else f"{100 * max(r, 0):.0f} %" for r in rivals]
        else:
            cells += [roof, f"{1e6 * times[roof]:,.0f}", "", "", ""]
        lines.append(f"| `{name}`, {arithmetic} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print every table; an H200's would differ from an H100's in the time of the memory alone."""
    print("\n\n".join(table(layer, gpu) for gpu in (A100, H100) for layer in LAYERS))


if __name__ == "__main__":
    main()
