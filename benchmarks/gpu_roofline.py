"""Bound the GPU kernels on paper, for GPUs that nobody here has: prints the tables of docs/gpu.md.

A kernel takes at least as long as its arithmetic at the peak of the units it uses, as its accesses
to shared memory at 128 bytes a clock and multiprocessor, as its reads from L2 at the L2's
bandwidth, and as its traffic with memory at the memory's. Real kernels reach a
part of the largest of the four. Dense products in cuBLAS and cuDNN come near the peak where
matrices are large, so they are taken at it, which favours dense. Nothing here was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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


GPUS = (
    Gpu("A100", 19.5e12, 156e12, 312e12, 108 * 128 * 1.41e9, 5120 * 1.41e9, 2.039e12),
    Gpu("H100", 66.9e12, 494.7e12, 989.4e12, 132 * 128 * 1.83e9, 5120 * 1.83e9, 3.35e12),
)
H200 = replace(GPUS[-1], name="H200", memory=4.8e12)


@dataclass(frozen=True)
class Layer:
    """A layer: `positions` outputs of each of `outs` channels, `fan_in` weights each.

    A block of csrc/cuda reads windows `halo` times as large as the outputs that it computes, a
    `chunk` of channels at a time.
    """

    name: str
    channels: int
    outs: int
    fan_in: int
    positions: int
    halo: float
    chunk: int

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return self.outs * self.fan_in


LAYERS = (
    Layer(
        "convolution 3x3, 256>256, 16x16 maps, batch 128",
        256,
        256,
        9 * 256,
        128 * 16 * 16,
        60 / 32,
        16,
    ),
    Layer("linear 4096>4096, 4096 rows", 4096, 4096, 4096, 4096, 1.0, 32),
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


def _size(arithmetic: str) -> int:
    return 2 if arithmetic == "bf16" else 4


def dense(layer: Layer, density: float, arithmetic: str) -> Demand:
    """A dense pass; density has no say in it."""
    size = _size(arithmetic)
    moved = size * ((layer.channels + layer.outs) * layer.positions + layer.numel)
    return Demand(2.0 * layer.numel * layer.positions, moved)


def gather(layer: Layer, density: float, arithmetic: str) -> Demand:
    """`gather_kernel`: a window for every 64 rows, from which each nonzero is read at all outputs.

    A nonzero is broadcast to 32 lanes of 16 bytes by an access of 128 bytes.
    """
    size, nnz = _size(arithmetic), density * layer.numel
    products = size * nnz * layer.positions
    moved = size * (layer.channels + layer.outs) * layer.positions + nnz * (size + 8)
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
    moved = size * (layer.channels + layer.outs) * layer.positions + nnz * (size + 8)
    window = size * layer.channels * layer.positions * layer.halo * math.ceil(layer.outs / 32)
    window += size * layer.outs * layer.positions * math.ceil(layer.channels / layer.chunk)
    return Demand(
        2 * nnz * layer.positions, moved, window, (1.5 + 1 / together) * products + window
    )


def grow(layer: Layer, density: float, arithmetic: str) -> Demand:
    """`grow_*`: keys of 8 bytes, written once, read nine times to count and to take."""
    return Demand(0.0, layer.numel * (4.0 + 8.0 + 9 * 8.0))


def tile_product(block: int, positions: int = 128) -> Callable[[Layer, float, str], Demand]:
    """`tile_product`: an input tile serves `block` channels, a weight tile `positions` outputs."""

    def demand(layer: Layer, density: float, arithmetic: str) -> Demand:
        size, nnz = _size(arithmetic), density * layer.numel
        moved = size * ((layer.channels + layer.outs) * layer.positions + nnz)
        reads = size * nnz * layer.positions * (1 / block + 1 / positions)
        return Demand(2 * nnz * layer.positions, moved, reads)

    return demand


def tile_sample(block: int) -> Callable[[Layer, float, str], Demand]:
    """`tile_sample`: per tile of the weight a tile of gradients and one of inputs."""

    def demand(layer: Layer, density: float, arithmetic: str) -> Demand:
        size, nnz = _size(arithmetic), density * layer.numel
        moved = size * (layer.channels + layer.outs) * layer.positions + 8 * nnz
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


def break_even(
    layer: Layer, gpu: Gpu, arithmetic: str, kernel: Callable[..., Demand], rival: str
) -> float | None:
    """Return the sparsity from which a kernel's bound is below dense's, None if there is none.

    Args:
        layer: the layer.
        gpu: the GPU.
        arithmetic: of the kernel.
        kernel: its demand.
        rival: arithmetic of the dense product.
    """
    aim = max(dense(layer, 1.0, rival).seconds(gpu, rival).values())
    low, high = 0.0, 1.0  # densities
    if max(kernel(layer, low, arithmetic).seconds(gpu, arithmetic).values()) > aim:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        slower = max(kernel(layer, middle, arithmetic).seconds(gpu, arithmetic).values()) > aim
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
        bound = max(times, key=lambda roof: times[roof])
        sizes = [demand.flops / 1e9, demand.shared / 1e6, demand.l2 / 1e6, demand.memory / 1e6]
        cells = [f"{size:,.0f}" if size else "-" for size in sizes]
        if demand.flops:
            rivals = [
                break_even(layer, gpu, arithmetic, kernel, r) for r in ("fp32", "tf32", "bf16")
            ]
            cells += [bound, f"{1e6 * times[bound]:,.0f}"]
            cells += ["never" if r is None else f"{100 * max(r, 0):.0f} %" for r in rivals]
        else:
            cells += [bound, f"{1e6 * times[bound]:,.0f}", "", "", ""]
        lines.append(f"| `{name}`, {arithmetic} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print every table."""
    print("\n\n".join(table(layer, gpu) for gpu in GPUS for layer in LAYERS))


if __name__ == "__main__":
    main()
