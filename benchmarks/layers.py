"""Time sparse convolutions against dense ones, layer by layer; --help lists the options.

Dense (contiguous and channels_last) and sparse run interleaved in one process on the same threads;
the dense baseline of a layer is the better of its two layouts. Before anything is timed, the sparse
results are compared with the masked dense ones. Sparse means the sparse kernels, also where a user's
layer would run dense. SPARSEKD_ISA=avx2 pins an instruction set. One JSON line per layer and
sparsity goes to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import sparsekd as skd
from sparsekd.memory import keep_memory_warm

# (in channels, out channels, input size, kernel, stride): every distinct 3x3 of the CIFAR ResNet-18
# behind its stem, and the 1x1 of ResNet-50 that speed comparisons usually quote.
LAYERS = {
    "resnet18": [
        (64, 64, 32, 3, 1),
        (64, 128, 32, 3, 2),
        (128, 128, 16, 3, 1),
        (128, 256, 16, 3, 2),
        (256, 256, 8, 3, 1),
        (256, 512, 8, 3, 2),
        (512, 512, 4, 3, 1),
    ],
    "pointwise": [(256, 64, 32, 1, 1), (64, 256, 32, 1, 1), (1024, 256, 8, 1, 1)],
}
Step = Callable[[], tuple[torch.Tensor, ...]]


def dense_step(
    x: torch.Tensor, weight: torch.Tensor, stride: int, layout: torch.memory_format
) -> Step:
    """Return a call that runs forward and backward of a dense convolution in one layout."""
    x = x.detach().to(memory_format=layout).requires_grad_()
    weight = weight.detach().to(memory_format=layout).requires_grad_()
    padding = weight.shape[-1] // 2
    grad = torch.ones_like(F.conv2d(x, weight, None, stride, padding))

    def step() -> tuple[torch.Tensor, ...]:
        y = F.conv2d(x, weight, None, stride, padding)
        return (y, *torch.autograd.grad(y, (x, weight), grad))

    return step


def sparse_step(x: torch.Tensor, conv: skd.nn.SparseConv2d, layout: torch.memory_format) -> Step:
    """Return a call that runs forward and backward of a sparse convolution in one layout."""
    x = x.detach().to(memory_format=layout).requires_grad_()
    grad = torch.ones_like(conv(x))

    def step() -> tuple[torch.Tensor, ...]:
        y = conv(x)
        return (y, *torch.autograd.grad(y, (x, conv.values), grad))

    return step


def check(dense: Step, sparse: Step, mask: torch.Tensor) -> None:
    """Raise unless both calls give the same output and gradients at the nonzeros."""
    y, dx, dw = dense()
    for name, expected, got in zip(
        ("output", "input gradient", "weight gradient"), (y, dx, dw[mask]), sparse(), strict=True
    ):
        error = (expected - got).abs().max() / expected.abs().max()
        if not error < 2e-5:
            raise SystemExit(
                f"{name} differs by {error:.1e}: no speed is printed for wrong results"
            )


def medians(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return every call's times in milliseconds, taken in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if done:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def measure(layer: tuple[int, ...], sparsity: float, batch: int, rounds: int) -> dict[str, object]:
    """Time one layer at one sparsity and return its row."""
    channels, outs, size, kernel, stride = layer
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(channels, outs, kernel, stride, kernel // 2, bias=False)
    conv = skd.nn.SparseConv2d.from_dense(dense, sparsity=sparsity)
    x = torch.randn(batch, channels, size, size)
    weight = conv.dense_weight()
    steps: dict[str, Step] = {}
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        steps[f"dense_{name}"] = dense_step(x, weight, stride, layout)
        steps[f"sparse_{name}"] = sparse_step(x, conv, layout)
        check(steps[f"dense_{name}"], steps[f"sparse_{name}"], conv.topology.mask())
    times = medians(steps, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    best = min(median["dense_contiguous"], median["dense_channels_last"])
    return {
        "layer": f"{channels}>{outs} {size}x{size} k{kernel} s{stride}",
        "sparsity": sparsity,
        "batch": batch,
        "ms": {name: round(value, 2) for name, value in median.items()},
        "spread": {name: [round(min(v), 2), round(max(v), 2)] for name, v in times.items()},
        "speedup_channels_last": round(best / median["sparse_channels_last"], 2),
        "speedup_contiguous": round(best / median["sparse_contiguous"], 2),
    }


def main() -> None:
    """Measure the chosen layers and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="resnet18", choices=[*LAYERS, "all"])
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory_warm()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "isa": skd.ops.info()["cpp"]["isa"],
    }
    names = LAYERS if options.layers == "all" else [options.layers]
    for layer in (layer for name in names for layer in LAYERS[name]):
        for sparsity in map(float, options.sparsity.split(",")):
            with skd.backend("cpp"):
                row = measure(layer, sparsity, options.batch, options.rounds) | {"machine": machine}
            ms = row["ms"]
            print(
                f"{row['layer']:>22} {sparsity:.2f}  dense {ms['dense_contiguous']:7.1f} / "
                f"{ms['dense_channels_last']:7.1f} ms  sparse {ms['sparse_contiguous']:7.1f} / "
                f"{ms['sparse_channels_last']:7.1f} ms  speed-up {row['speedup_contiguous']:.2f} / "
                f"{row['speedup_channels_last']:.2f}",
                flush=True,
            )
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
