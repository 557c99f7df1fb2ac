"""What does a call of a layer cost beyond its kernel?

Chains of tiny layers, whose kernels take next to no time, run forward and backward. The difference
between a long chain and one layer, over the number of layers, is the cost of a layer: torch's own
beside sparse ones, and an autograd.Function that computes nothing, which no op in Python can beat.
Rows in the layout are blocks between which activations stay blocked; their batch is at least 16,
which fills the lanes, so their kernels take some time too.
All chains take turns in one process. One table goes to the terminal: microseconds per layer,
medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock
from sparsekd.models.wide_resnet import PreActivationBlock
from sparsekd.nn.blocked import call_blocked, conv_norm_act_blocked, leave
from sparsekd.nn.preactivation import run_preactivation
from sparsekd.timing import interleave

Layer = Callable[[Any], Any]


class Nothing(torch.autograd.Function):
    """A node that saves what a sparse layer saves, and whose passes only allocate their results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> Tensor:
        """Return a tensor like `x`."""
        ctx.save_for_backward(x, values, crow, col)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return tensors like `x` and `values`."""
        x, values, _, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(values), None, None


def layers(channels: int, density: float) -> dict[str, tuple[Layer, list[int]]]:
    """Return the layers to compare, and what remains of the shape of their input but the batch."""
    torch.manual_seed(0)
    maps, features = [channels, 4, 4], [channels]
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    sparse = skd.nn.SparseConv2d.from_dense(dense, sparsity=1 - density)
    fully = nn.Linear(channels, channels)
    norm, fused = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
    structure = sparse.crow_indices, sparse.col_indices
    relu = torch.nn.functional.relu
    return {
        "autograd.Function that computes nothing": (
            lambda x: Nothing.apply(x, sparse.values, *structure),
            maps,
        ),
        "nn.Conv2d": (dense, maps),
        "SparseConv2d": (sparse, maps),
        "nn.Linear": (fully, features),
        "SparseLinear": (skd.nn.SparseLinear.from_dense(fully, sparsity=1 - density), features),
        "nn.Conv2d, BatchNorm2d, ReLU": (lambda x: relu(norm(dense(x))), maps),
        "SparseConv2d, BatchNorm2d, ReLU": (lambda x: relu(norm(sparse(x))), maps),
        "conv_norm_act of a SparseConv2d": (
            lambda x: skd.nn.conv_norm_act(sparse, fused, x, relu),
            maps,
        ),
    }


def blocks(channels: int, density: float) -> dict[str, tuple[Layer, Layer]]:
    """Return blocks in the layout, each behind what brings images [N, channels, 4, 4] into it."""
    torch.manual_seed(0)
    stem = skd.nn.SparseConv2d(channels, channels, 3, padding=1, bias=False, sparsity=1 - density)
    norm, relu = nn.BatchNorm2d(channels), nn.ReLU()
    model = nn.Sequential(BasicBlock(channels, channels), PreActivationBlock(channels, channels))
    skd.sparsify(model, sparsity=1 - density, distribution="uniform")
    skd.optimize(model)
    residual, preactivation = model[0], model[1]

    def triple(x: Any) -> Any:
        return conv_norm_act_blocked(stem, norm, x, relu)

    return {
        "conv, norm, ReLU in the layout": (triple, triple),
        "residual block in the layout": (triple, partial(call_blocked, residual)),
        "pre-activation block in the layout": (
            lambda x: run_preactivation(stem, x, None, [], stem),
            partial(call_blocked, preactivation),
        ),
    }


def behind(first: Layer, layer: Layer) -> Layer:
    """Return a layer in front of which images pass another one."""
    return lambda x: layer(first(x) if isinstance(x, Tensor) else x)


def forward(layer: Layer, x: Any, length: int) -> Tensor:
    """Apply a layer several times."""
    for _ in range(length):
        x = layer(x)
    return leave(x)


def both(layer: Layer, x: Tensor, length: int) -> None:
    """Run a chain forward and backward."""
    y = forward(layer, x, length)
    y.backward(y.detach())
    x.grad = None


def inference(layer: Layer, x: Tensor, length: int) -> None:
    """Run a chain without derivatives."""
    with torch.no_grad():
        forward(layer, x, length)


def measure(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return microseconds per layer: without derivatives, and forward and backward."""
    calls: dict[tuple[str, str, int], Callable[[], object]] = {}
    chains = {
        name: (layer, [options.batch, *shape])
        for name, (layer, shape) in layers(options.channels, options.density).items()
    }
    in_layout = [max(options.batch, 16), options.channels, 4, 4]
    for name, (first, layer) in blocks(options.channels, options.density).items():
        chains[name] = behind(first, layer), in_layout
    for name, (layer, size) in chains.items():
        x = torch.randn(size)
        for length in (1, 1 + options.length):
            calls[name, "inference", length] = partial(inference, layer, x, length)
            leaf = x.clone().requires_grad_()
            calls[name, "both", length] = partial(both, layer, leaf, length)
    times = interleave(calls, options.rounds, settle=True, least=0.002)
    ms = {key: statistics.median(taken) for key, taken in times.items()}

    def cost(name: str, kind: str) -> float:
        long, short = ms[name, kind, 1 + options.length], ms[name, kind, 1]
        return 1e3 * (long - short) / options.length

    names = dict.fromkeys(name for name, _, _ in calls)
    return {name: (cost(name, "inference"), cost(name, "both")) for name in names}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=20, help="layers in a chain")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), microseconds per layer")
    print(f"{'':42s}{'no grad':>10s}{'forward + backward':>22s}")
    for name, (inference_us, both_us) in measure(options).items():
        print(f"{name:42s}{inference_us:10.1f}{both_us:22.1f}")


if __name__ == "__main__":
    main()
