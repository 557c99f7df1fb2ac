"""How much faster is a step of the linear layers of transformers at 90 %?

The layers of ViT-Ti at 224 pixels and of GPT-2 small, each by itself: forward and backward, for
the input and all parameters, in float32. Before the race the sparse layer's results are held
against those of the dense layer with the same zeros. Dense and sparse take turns in one process;
the table has medians in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import sparsekd as skd
from sparsekd.timing import interleave

NETWORKS = {
    "ViT-Ti": (
        16 * 197,
        {"qkv": (192, 576), "proj": (192, 192), "fc1": (192, 768), "fc2": (768, 192)},
    ),
    "GPT-2 small": (
        2 * 512,
        {
            "c_attn": (768, 2304),
            "c_proj": (768, 768),
            "c_fc": (768, 3072),
            "mlp.c_proj": (3072, 768),
        },
    ),
}
"""Positions in a batch, and inputs and outputs of the layers of a block."""

LIMIT = 1e-5


def step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Run a layer forward and backward, and return its result."""
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return y


def pair(ins: int, outs: int, positions: int, sparsity: float) -> dict[str, Callable[[], object]]:
    """Return the steps of a dense layer and its sparse counterpart, after comparing them.

    Raises:
        ValueError: a result or gradient differs by more than 1e-5 of the largest.
    """
    torch.manual_seed(0)
    dense = nn.Linear(ins, outs)
    sparse = skd.nn.SparseLinear.from_dense(dense, sparsity=sparsity)
    twin = sparse.to_dense().double()
    x, grad = torch.randn(positions, ins), torch.randn(positions, outs)
    mine, theirs = (t.clone().requires_grad_() for t in (x, x.double()))
    y, expected = step(sparse, mine, grad), step(twin, theirs, grad.double())
    assert twin.weight.grad is not None
    results = {
        "output": (y, expected),
        "gradient of the input": (mine.grad, theirs.grad),
        "gradient of the weight": (sparse.values.grad, twin.weight.grad[sparse.topology.mask()]),
    }
    for name, (found, right) in results.items():
        assert found is not None
        assert right is not None
        error = float((found.double() - right).detach().abs().max() / right.detach().abs().max())
        if error > LIMIT:
            raise ValueError(f"{ins} to {outs}: the {name} is off by {error:.2g}")
    return {
        "dense": partial(step, dense, x.clone().requires_grad_(), grad),
        "sparse": partial(step, sparse, x.clone().requires_grad_(), grad),
    }


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, sparsity {options.sparsity}\n")
    print("| network | layer | positions | dense, ms | sparse, ms | times faster |")
    print("|---|---|---|---|---|---|")
    for network, (positions, layers) in NETWORKS.items():
        total = {"dense": 0.0, "sparse": 0.0}
        rows = {name: (f"{ins} to {outs}", ins, outs) for name, (ins, outs) in layers.items()}
        for name, (size, ins, outs) in rows.items():
            calls = pair(ins, outs, positions, options.sparsity)
            times = interleave(calls, options.rounds, settle=True, shuffle=True)
            ms = {call: statistics.median(taken) for call, taken in times.items()}
            total = {call: total[call] + ms[call] for call in total}
            line(network, f"{name} {size}", positions, ms)
        line(network, "all of a block", positions, total)


def line(network: str, layer: str, positions: int, ms: dict[str, float]) -> None:
    """Print a row."""
    dense, sparse = ms["dense"], ms["sparse"]
    print(
        f"| {network} | {layer} | {positions} | {dense:.2f} | {sparse:.2f} "
        f"| {dense / sparse:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
